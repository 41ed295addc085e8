"""The fields of one object of a row: typed access, and a record of which fields were read.

What is not read is either refused, because it carries meaning (`unread.py`), or counted as ignored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from delib_fast.data.rows import DataError

SYSTEM_KEYS = ("system", "system_prompt", "system_message")
TOOL_KEYS = ("tools", "functions")
WEIGHT_KEYS = ("weight", "loss_weight")
TRAIN_FLAGS = ("train", "training", "trainable", "loss")
"""Flags that are true if a message is trained on."""
MASK_FLAGS = ("mask", "masked")
"""Flags that are true if a message is not trained on."""


class Fields:
    """The fields of an object. A null field counts as absent, as in a Parquet file.

    Args:
        item: the object.
        where: its location in the row, e.g. `messages[2]`; "" for the row itself.
    """

    def __init__(self, item: Mapping[str, Any], where: str = "") -> None:
        self.where = where
        self._values = {key: value for key, value in item.items() if value is not None}
        self.nulls = [key for key, value in item.items() if value is None]
        self._read: set[str] = set()

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def name(self, key: str) -> str:
        """The name of a field in messages."""
        return f"{self.where}.{key}" if self.where else repr(key)

    def get(self, key: str) -> Any:
        """Read a field; None if it is absent."""
        self._read.add(key)
        return self._values.get(key)

    def peek(self, key: str) -> Any:
        """Return a field without marking it as read."""
        return self._values.get(key)

    def unread(self) -> dict[str, Any]:
        """The fields that have not been read."""
        return {key: value for key, value in self._values.items() if key not in self._read}

    def single_key(self, keys: tuple[str, ...], because: str = "") -> str:
        """Return which of several keys is given. Exactly one must be."""
        found = self.optional_key(keys)
        if found is None:
            why = f": {because}" if because else ""
            fail("missing_field", f"{self._prefix}has none of {', '.join(map(repr, keys))}{why}")
        return found

    def optional_key(self, keys: tuple[str, ...]) -> str | None:
        """Return which of several keys is given, or None. More than one is an error."""
        found = [key for key in keys if key in self._values]
        if len(found) > 1:
            fail(
                "ambiguous",
                f"{self._prefix}has both {found[0]!r} and {found[1]!r}: which of them counts is ambiguous; keep one",
            )
        return found[0] if found else None

    @property
    def _prefix(self) -> str:
        return f"{self.where} " if self.where else ""

    def string(self, key: str) -> str:
        """Read a text. Raises DataError if it is absent or not a text."""
        value = self.get(key)
        name = self.name(key)
        if value is None:
            if key in self.nulls:
                fail("wrong_type", f"{name} is null, but a string is expected")
            fail("missing_field", f"{name} is missing")
        if not isinstance(value, str):
            fail("wrong_type", f"{name} is {type_name(value)}, but a string is expected")
        if "\0" in value:
            fail("nul", f"{name} contains a NUL character: the file is damaged, or is not text")
        try:
            value.encode()
        except UnicodeEncodeError:
            fail(
                "surrogate",
                f"{name} contains half of a surrogate pair (a single \\ud800 … \\udfff escape): the "
                "text was cut inside a character",
            )
        return value

    def text(self, keys: tuple[str, ...]) -> str | None:
        """Read the text of one of several keys; None if none is given, or if the text is empty or white space.

        Several keys may be given if only one has a text, or if the texts are the same.
        """
        texts = {key: value for key in keys if key in self._values and (value := self.string(key)).strip()}
        if len({value.strip() for value in texts.values()}) > 1:
            self.optional_key(tuple(texts))
        return next(iter(texts.values()), None)

    def text_key(self, keys: tuple[str, ...]) -> str | None:
        """The key whose text `text` returns."""
        return next((key for key in keys if isinstance(v := self._values.get(key), str) and v.strip()), None)

    def loss_weight(self) -> float:
        """Read the weight and the flags that say whether the row or message is trained on; 1 without any of them."""
        says = {key: self._flag(key) for key in TRAIN_FLAGS if key in self._values}
        says |= {key: not self._flag(key) for key in MASK_FLAGS if key in self._values}
        if len(set(says.values())) > 1:
            keys = [next(key for key, value in says.items() if value is wanted) for wanted in (True, False)]
            fail("ambiguous", f"{self._prefix}has {keys[0]!r} and {keys[1]!r}, which contradict each other; keep one")
        weight = self._weight(self.optional_key(WEIGHT_KEYS))
        return 0.0 if False in says.values() else weight

    def asks_for_loss(self) -> str | None:
        """The name of a field that asks to train on the message, or None. Validates all of them."""
        if self.loss_weight() == 0:
            return None
        found = next((key for key in (*WEIGHT_KEYS, *TRAIN_FLAGS, *MASK_FLAGS) if key in self._values), None)
        return None if found is None else self.name(found)

    def _flag(self, key: str) -> bool:
        value = self.get(key)
        if not isinstance(value, bool):
            fail(
                "bad_weight",
                f"{self.name(key)} is {type_name(value)}, but true or false is expected; rename it if it is not about "
                "the loss",
            )
        return value

    def _weight(self, key: str | None) -> float:
        if key is None:
            return 1.0
        value, name = self.get(key), self.name(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            fail("bad_weight", f"{name} is {type_name(value)}, but a number is expected")
        if not 0 <= value <= 1e6 or not math.isfinite(value):
            shown = f"{value:g}" if abs(value) < 1e300 else "too large"
            fail("bad_weight", f"{name} is {shown}; a weight must be a number from 0 to 1e6")
        return float(value)


def says_nothing(value: Any) -> bool:
    """Whether a value is false, blank or empty, so that nothing is lost if it is ignored."""
    return value is None or value is False or (isinstance(value, str | list | dict | tuple) and not _content(value))


def _content(value: Any) -> Any:
    return value.strip() if isinstance(value, str) else value


def type_name(value: Any) -> str:
    """What a JSON value is, with its article."""
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "true or false",
        int: "a number",
        float: "a number",
        type(None): "null",
        bytes: "bytes",
    }
    return names.get(type(value), f"a {type(value).__name__}")


def fail(reason: str, message: str) -> NoReturn:
    """Raise DataError without a location, which the caller adds."""
    raise DataError(message, reason=reason)
