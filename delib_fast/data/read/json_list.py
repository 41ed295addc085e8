"""The values of one JSON list, one by one, through a window: the list is never whole in memory."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from delib_fast.data.read.strict_json import strict_decoder
from delib_fast.data.rows import DataError

WINDOW_BYTES = 1 << 18
_SPACE = re.compile(r"[ \t\n\r]*")
_NEAR_THE_END = 16  # characters: an escape or a name that the window cuts is reported where it begins


class Readable(Protocol):
    def read(self, size: int) -> bytes: ...


def list_values(head: bytes, file: Readable, path: Path, most_bytes: int) -> Iterator[tuple[int, Any, str]]:
    """(line, value, its text) for each value of the list that `head` begins and `file` goes on with.

    Raises DataError, with its place: what is no UTF-8, no list, cut, or a value of more than `most_bytes` characters.
    """
    window = _Window(head, file, path, most_bytes)
    window.advance(window.next() + 1)
    first = True
    while not (window.character() == "]" and first):
        value, end = window.value()
        yield window.line, value, window.text[window.mark : end]
        first = False
        window.advance(end)
        character = window.character()
        if character == "]":
            break
        if character != ",":
            window.fail(
                "the file ends inside the list: it may have been cut"
                if not character
                else "not valid JSON: a comma or ] is expected here"
            )
        window.advance(window.mark + 1)
    window.advance(window.mark + 1)
    if window.character():
        window.fail("not valid JSON: more follows after the list")


class _Window:
    """A part of the text. What lies before `mark` is done with, and goes when more is read."""

    def __init__(self, head: bytes, file: Readable, path: Path, most_bytes: int) -> None:
        self._file, self._path, self._most = file, path, most_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._decoded = 0  # bytes
        self._newlines = 0  # in all of the text that was read
        self._ended = False
        self.text, self.mark, self.line = "", 0, 1
        self._line_start = 0  # where the line of `mark` begins in the window; before it, perhaps
        self._append(head)

    def next(self) -> int:
        """Goes on to what is not space; its place in the window."""
        while True:
            match = _SPACE.match(self.text, self.mark)
            assert match is not None
            self.advance(match.end())
            if self.mark < len(self.text) or not self._more():
                return self.mark

    def character(self) -> str:
        """The next character that is not space; empty at the end of the file."""
        at = self.next()
        return self.text[at : at + 1]

    def advance(self, at: int) -> None:
        if lines := self.text.count("\n", self.mark, at):
            self.line += lines
            self._line_start = self.text.rfind("\n", self.mark, at) + 1
        self.mark = at

    def value(self) -> tuple[Any, int]:
        """The value at `mark`, and where it ends."""
        while True:
            try:
                value, end = strict_decoder.raw_decode(self.text, self.mark)
                if end <= len(self.text) - len("1e+") or not self._more():  # else a number may go on
                    return value, end
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - _NEAR_THE_END
                if not (cut and self._more()):
                    self._fail_at(error)
            except DataError as error:
                self.fail(str(error), error.reason)
            except RecursionError:
                self.fail("objects or lists are nested too deep")
            except ValueError:  # an integer of more digits than Python reads
                self.fail("not valid JSON: a number has too many digits")

    def fail(self, what: str, reason: str = "not_json") -> None:
        raise DataError(what, reason=reason, location=f"{self._path}:{self.line}") from None

    def _fail_at(self, error: json.JSONDecodeError) -> None:
        cut = error.pos >= len(self.text.rstrip()) or error.msg.startswith("Unterminated string")
        self.advance(error.pos)
        self.fail(
            f"not valid JSON: {error.msg.removesuffix(' at')} at column {error.pos - self._line_start + 1}"
            + ("; the file ends too early and may have been cut" if cut else "")
        )

    def _more(self) -> bool:
        """Reads on, at least as much again as is not done with. False at the end of the file: then all is as it was."""
        kept = len(self.text) - self.mark
        if kept > self._most:
            self.fail(
                f"a row of more than {self._most >> 20} MiB: no row is so long; keep long text in a .txt or .md file",
                "long_line",
            )
        data = b"" if self._ended else self._file.read(max(WINDOW_BYTES, kept))
        if data:
            self.text = self.text[self.mark :]
            self._line_start -= self.mark
            self.mark = 0
        self._append(data)
        return bool(data)

    def _append(self, data: bytes) -> None:
        self._ended = not data
        pending = len(self._decoder.getstate()[0])
        try:
            text = self._decoder.decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            line = 1 + self._newlines + error.object.count(b"\n", 0, error.start)
            at = self._decoded - pending + error.start + 1
            raise DataError(
                f"not UTF-8: byte 0x{error.object[error.start]:02x} at byte {at} of the file",
                reason="invalid_utf8",
                location=f"{self._path}:{line}",
            ) from None
        self._decoded += len(data)
        self._newlines += text.count("\n")
        self.text += text
