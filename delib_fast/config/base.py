"""The base class of every section of a configuration, and the error that explains what is wrong with one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class ConfigError(ValueError):
    """The configuration cannot be used. The message names the value, its location, and what to do."""


class Section(BaseModel):
    """A section of a configuration. Unknown keys are errors; attribute docstrings are the help text of the keys."""

    removed_keys: ClassVar[Mapping[str, str]] = {}
    """Keys that earlier versions had, each with the message that says what to do instead."""
    model_config = ConfigDict(extra="forbid", validate_default=True, use_attribute_docstrings=True)


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
