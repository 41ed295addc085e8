"""JSON decoding that refuses what other readers silently accept: duplicate keys, NaN and control characters."""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from delib_fast.data.rows import DataError

SAFE_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,31}")
"""Messages show only keys of this form; any other key may be private text of the row."""


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    item = dict(pairs)
    if len(item) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                name = repr(key) if SAFE_KEY.fullmatch(key) else "a key"
                _fail("duplicate_key", f"{name} occurs twice in one object: which one counts is ambiguous")
            seen.add(key)
    return item


def _refuse_constant(name: str) -> NoReturn:
    _fail("not_json", f"{name} is not valid JSON")


strict_decoder = json.JSONDecoder(object_pairs_hook=_object_without_duplicates, parse_constant=_refuse_constant)


def decode(text: str) -> Any:
    """Decode one JSON value. Raises DataError if the text is not strictly valid JSON."""
    try:
        return strict_decoder.decode(text)
    except json.JSONDecodeError as error:
        cut = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
        _fail(
            "not_json",
            f"not valid JSON: {error.msg.removesuffix(' at')} at column {error.colno}"
            + ("; it ends too early and may have been cut off" if cut else ""),
        )
    except RecursionError:
        _fail("not_json", "objects or lists are nested too deeply")
    except DataError:
        raise
    except ValueError:  # an integer with more digits than Python reads
        _fail("not_json", "not valid JSON: a number has too many digits")


def _fail(reason: str, message: str) -> NoReturn:
    raise DataError(message, reason=reason)
