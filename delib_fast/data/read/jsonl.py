"""Objects of a JSONL file or a JSON list, one at a time, each with its line number."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from delib_fast.data.read.json_list import MAX_LIST_BYTES, list_values, refuse_large_list
from delib_fast.data.read.strict_json import decode
from delib_fast.data.rows import DataError, fingerprint
from delib_fast.files import open_regular

MAX_LINE_BYTES = 64 << 20
_MAGIC = (
    (b"\x1f\x8b", "gzip data: decompress it first"),
    (b"\x28\xb5\x2f\xfd", "zstd data: decompress it first"),
    (b"BZh", "bzip2 data: decompress it first"),
    (b"\xfd7zXZ", "xz data: decompress it first"),
    (b"PK\x03\x04", "a zip archive: unpack it first"),
    (b"PAR1", "a Parquet file: rename it to .parquet"),
    (b"ARROW1", "an Arrow file: convert it to .parquet or .jsonl"),
    (b"SQLite format 3", "an SQLite database: export it to .jsonl"),
    (b"\x80\x04\x95", "a pickle, which is never read because it can run code: convert it to .jsonl"),
    (b"\x80\x05\x95", "a pickle, which is never read because it can run code: convert it to .jsonl"),
    (b"\xff\xfe", "UTF-16 text: convert it to UTF-8"),
    (b"\xfe\xff", "UTF-16 text: convert it to UTF-8"),
    (b"version https://git-lfs", "a Git LFS pointer instead of the file itself: run git lfs pull"),
    (b"<!DOCTYPE", "a web page: the download failed"),
    (b"<html", "a web page: the download failed"),
)


@dataclass(slots=True)
class Item:
    """One decoded object of a source, or the error that prevented decoding it."""

    line: int
    """Line in the file, or number of the row in a table, from 1."""
    value: Any = None
    error: DataError | None = None
    raw: bytes = b""
    """The undecoded row, for the fingerprint only."""

    @property
    def fingerprint(self) -> str:
        """12 hex digits that identify the row in messages without showing its text."""
        return fingerprint(self.raw)


class HashingFile:
    """A file that is read from start to end, and hashed while it is read."""

    def __init__(self, path: Path) -> None:
        self._file: IO[bytes] = open_regular(path)
        self._digest = hashlib.sha256()

    def readline(self, limit: int) -> bytes:
        data = self._file.readline(limit)
        self._digest.update(data)
        return data

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._digest.update(data)
        return data

    def hexdigest(self) -> str:
        """Read the rest of the file, and return the sha256 of the whole."""
        while chunk := self._file.read(1 << 20):
            self._digest.update(chunk)
        return self._digest.hexdigest()

    def close(self) -> None:
        self._file.close()


def refuse_foreign_bytes(head: bytes, path: Path) -> None:
    """Raise DataError, naming the actual format, if the first bytes of a file show that it is not UTF-8 text."""
    for magic, what in _MAGIC:
        if head.startswith(magic):
            raise DataError(f"is {what}", reason="foreign_file", location=path)
    if b"\0" in head[:512]:
        raise DataError(
            "contains NUL bytes: it is not UTF-8 text, but UTF-16 or a binary file",
            reason="foreign_file",
            location=path,
        )


def read_items(file: HashingFile, path: Path) -> Iterator[Item]:
    """Yield the objects of a file. It is a JSON list if its first character is `[`, and JSONL otherwise."""
    head = file.readline(MAX_LINE_BYTES + 1)
    refuse_foreign_bytes(head, path)
    head = head.removeprefix(b"\xef\xbb\xbf")
    blank: list[bytes] = []
    while head and not head.strip():
        blank.append(head)
        head = file.readline(MAX_LINE_BYTES + 1)
    if head.lstrip().startswith(b"["):
        data = b"".join((*blank, head, file.read(MAX_LIST_BYTES)))
        refuse_large_list(len(data), path)
        for line, value, text in list_values(decode_text(data, path), path):
            yield Item(line, value, raw=text.encode("utf-8", "surrogatepass"))
    else:
        yield from _line_items(file, head, len(blank) + 1)


def _line_items(file: HashingFile, line: bytes, number: int) -> Iterator[Item]:
    while line:
        if len(line) > MAX_LINE_BYTES:
            error = DataError(
                f"the line is longer than {MAX_LINE_BYTES >> 20} MiB, the limit for a row; store long text in a .txt "
                "or .md file",
                reason="long_line",
            )
            yield Item(number, error=error, raw=line)
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE_BYTES)
        elif line.strip():
            yield _decode_line(line, number)
        line = file.readline(MAX_LINE_BYTES + 1)
        number += 1


def _decode_line(line: bytes, number: int) -> Item:
    try:
        return Item(number, decode(line.decode("utf-8").strip("\r\n")), raw=line)
    except UnicodeDecodeError as error:
        what = f"not UTF-8: byte 0x{line[error.start]:02x} at byte {error.start + 1} of the line"
        return Item(number, error=DataError(what, reason="invalid_utf8"), raw=line)
    except DataError as error:
        return Item(number, error=error, raw=line)


def decode_text(data: bytes, path: Path) -> str:
    """Decode a whole file, without its byte order mark. Raises DataError if it is not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + data.count(b"\n", 0, error.start)
        raise DataError(
            f"not UTF-8: byte 0x{data[error.start]:02x} at byte {error.start + 1} of the file",
            reason="invalid_utf8",
            location=f"{path}:{line}",
        ) from None


def without_nulls(value: Any) -> Any:
    """Remove null fields, also in nested objects. All rows of a table have the same columns, so null means absent."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value
