"""The values of a file that is one JSON list. The whole file is in memory; larger data belongs in JSONL files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from delib_fast.data.read.strict_json import strict_decoder
from delib_fast.data.rows import DataError

MAX_LIST_BYTES = 256 << 20
_SPACE = re.compile(r"[ \t\n\r]*")


def refuse_large_list(size_bytes: int, path: Path) -> None:
    """Raise DataError if a file is too large to be read as one JSON list."""
    if size_bytes > MAX_LIST_BYTES:
        raise DataError(
            f"is a JSON list of more than {MAX_LIST_BYTES >> 20} MiB, which cannot be streamed. Convert it to "
            f"JSONL: jq -c '.[]' {path.name} > {path.stem}.jsonl",
            reason="large_list",
            location=path,
        )


def list_values(text: str, path: Path) -> Iterator[tuple[int, Any, str]]:
    """Yield (line, value, its text) for each value of a JSON list.

    Raises DataError, with `file:line`, if the text is not valid JSON, is cut off, or continues after the list.
    """
    line, line_start = 1, 0

    def advance(at: int, to: int) -> int:
        """Move to a later position, and count the lines on the way."""
        nonlocal line, line_start
        if newlines := text.count("\n", at, to):
            line, line_start = line + newlines, text.rindex("\n", at, to) + 1
        return to

    def skip_space(at: int) -> int:
        match = _SPACE.match(text, at)
        return advance(at, match.end() if match else at)

    def fail(message: str, reason: str = "not_json") -> NoReturn:
        raise DataError(message, reason=reason, location=f"{path}:{line}") from None

    at = skip_space(skip_space(0) + 1)  # after the opening bracket
    closed = text.startswith("]", at)
    while not closed:
        try:
            value, end = strict_decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            cut = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
            advance(at, error.pos)
            fail(
                f"not valid JSON: {error.msg.removesuffix(' at')} at column {error.pos - line_start + 1}"
                + ("; the file ends too early and may have been cut off" if cut else "")
            )
        except DataError as error:
            fail(str(error), error.reason)
        except RecursionError:
            fail("objects or lists are nested too deeply")
        except ValueError:  # an integer with more digits than Python reads
            fail("not valid JSON: a number has too many digits")
        yield line, value, text[at:end]
        at = skip_space(advance(at, end))
        closed = text.startswith("]", at)
        if not closed:
            if at == len(text):
                fail("the file ends inside the list and may have been cut off")
            if text[at] != ",":
                fail("not valid JSON: expected a comma or ] here")
            at = skip_space(at + 1)
    if skip_space(at + 1) < len(text):
        fail("not valid JSON: the file continues after the end of the list")
