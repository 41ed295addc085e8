"""The base class of every section of a configuration, and the error that explains what is wrong with one."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


class ConfigError(ValueError):
    """The configuration cannot be used. The message names the value, its location, and what to do."""


class Section(BaseModel):
    """A section of a configuration. Unknown keys are errors; attribute docstrings are the help text of the keys.

    A number must be finite, and `true` or `false` is not a number.
    """

    removed_keys: ClassVar[Mapping[str, str]] = {}
    """Keys that earlier versions had, each with the message that says what to do instead."""
    model_config = ConfigDict(extra="forbid", validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_odd_numbers(cls, values: Any) -> Any:
        """Refuse `true` and `false`, which pydantic would convert to 1 and 0, and integers of more than 64 bits."""
        if isinstance(values, Mapping):
            for key, value in values.items():
                problem = _odd_number(value) if key in cls.model_fields and _is_numeric(cls, key) else None
                if problem:  # a validator of each field would also know the key, but cannot have a discriminator
                    raise PydanticCustomError("odd_number", problem, {"key": key})
        return values

    @model_validator(mode="after")
    def _refuse_huge_integers(self) -> Self:
        """Refuse an integer of more than 64 bits that was given as a float or as text."""
        for key, value in self:
            if isinstance(value, int) and not isinstance(value, bool) and (problem := _odd_number(value)):
                raise PydanticCustomError("odd_number", problem, {"key": key})
        return self


@cache
def _is_numeric(section: type[Section], field: str) -> bool:
    """Whether a field consists of numbers only, e.g. float | None or dict[str, float]."""
    found: set[Any] = set()

    def visit(annotation: Any) -> None:
        arguments = get_args(annotation)
        if getattr(annotation, "__metadata__", None) is not None:
            arguments = arguments[:1]
        if get_origin(annotation) is Literal:
            found.update(map(type, arguments))
            return
        if not arguments:
            found.add(annotation)
        for argument in arguments:
            visit(argument)

    visit(section.model_fields[field].annotation)
    return bool(found & {int, float}) and found <= {int, float, str, type(None), ...}


def _odd_number(value: Any) -> str | None:
    """What is wrong with a numeric value, or with one in a list or mapping; None if it is left to pydantic."""
    if isinstance(value, bool):
        return f"a number is expected, not {str(value).lower()}"
    if isinstance(value, int) and abs(value) >= 1 << 63:
        return "the number is too large; it must fit in 64 bits"
    if isinstance(value, dict | list | tuple):
        items = value.values() if isinstance(value, dict) else value
        return next((problem for item in items if (problem := _odd_number(item))), None)
    return None


_VARIABLE = re.compile(r"\$\{([^}]*)\}|\$([A-Za-z_][A-Za-z0-9_]*)")


def expand_path(path: str) -> str:
    """Replace `~`, `~user`, `${NAME}` and `$NAME` in a path. A `$NAME` that is not an environment variable is kept.

    Raises:
        ValueError: the path is empty, `${NAME}` is not an environment variable, or the user does not exist.
    """

    def value_of(match: re.Match[str]) -> str:
        name = match[1] if match[1] is not None else match[2]
        if name not in os.environ and match[1] is not None:
            raise ValueError(f"{path}: the environment variable {name!r} is not set; set it, or write the path out")
        return os.environ.get(name, match[0])

    if not path.strip():
        raise ValueError("the path is empty; write null for no path, or . for the current folder")
    expanded = _VARIABLE.sub(value_of, path)
    if not expanded.startswith("~"):
        return expanded
    try:
        return str(Path(expanded).expanduser())
    except RuntimeError:
        user = expanded.split("/", 1)[0]
        raise ValueError(f"{path}: the home folder of {user} is not known; write the path out") from None


FilePath = Annotated[str, AfterValidator(expand_path)]
"""A path, in which `~` and environment variables are expanded. It may also be a hub name where the key allows one."""


def is_same_file(path: str, other: str) -> bool:
    """Whether two paths lead to one file or folder, e.g. through a symbolic link."""
    if path == other or os.path.realpath(path) == os.path.realpath(other):
        return True
    try:
        return os.path.samefile(path, other)
    except OSError:
        return False


_MAX_LISTED = 40


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint to append to an error: ` (did you mean 'x'?)` if a known word is similar, else the list of known words.

    The hint is empty if there are more than 40 known words and none is similar.
    """
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f" (did you mean {close[0]!r}?)"
    return f" (known: {', '.join(sorted(known))})" if 0 < len(known) <= _MAX_LISTED else ""
