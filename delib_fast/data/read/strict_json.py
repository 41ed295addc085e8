"""JSON as training data should be written: what other readers let pass in silence is refused here."""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from delib_fast.data.rows import DataError

SAFE_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,31}")
"""Keys of this form are shown in messages; anything else might be text of the row."""


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    item = dict(pairs)
    if len(item) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                name = repr(key) if SAFE_KEY.fullmatch(key) else "a key"
                _fail("duplicate_key", f"{name} is written twice in one object: which counts can't be told")
            seen.add(key)
    return item


def _no_constant(name: str) -> NoReturn:
    _fail("not_json", f"{name} is no JSON")


strict_decoder = json.JSONDecoder(object_pairs_hook=_object_without_duplicates, parse_constant=_no_constant)


def decode(text: str) -> Any:
    """One JSON value, strictly: no duplicate keys, no NaN, no control characters. Raises DataError."""
    try:
        return strict_decoder.decode(text)
    except json.JSONDecodeError as error:
        cut = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
        _fail(
            "not_json",
            f"not valid JSON: {error.msg.removesuffix(' at')} at column {error.colno}"
            + ("; it ends too early and may have been cut" if cut else ""),
        )
    except RecursionError:
        _fail("not_json", "objects or lists are nested too deep")
    except DataError:
        raise
    except ValueError:  # an integer of more digits than Python reads
        _fail("not_json", "not valid JSON: a number has too many digits")


def _fail(reason: str, message: str) -> NoReturn:
    raise DataError(message, reason=reason)
