"""The objects of a JSONL file or a JSON list, one by one, each with its line."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from delib_fast.data.read.json_list import list_values
from delib_fast.data.read.strict_json import decode
from delib_fast.data.rows import DataError, fingerprint

MAX_LINE_BYTES = 64 << 20
_MAGIC = (
    (b"\x1f\x8b", "gzip data: decompress it first"),
    (b"\x28\xb5\x2f\xfd", "zstd data: decompress it first"),
    (b"BZh", "bzip2 data: decompress it first"),
    (b"\xfd7zXZ", "xz data: decompress it first"),
    (b"PK\x03\x04", "a zip archive: unpack it first"),
    (b"PAR1", "Parquet: give the file the ending .parquet"),
    (b"ARROW1", "an Arrow file: convert it to .parquet or .jsonl"),
    (b"SQLite format 3", "an SQLite database"),
    (b"\x80\x04\x95", "a pickle, which is never read: it can run code"),
    (b"\x80\x05\x95", "a pickle, which is never read: it can run code"),
    (b"\xff\xfe", "UTF-16: convert it to UTF-8"),
    (b"\xfe\xff", "UTF-16: convert it to UTF-8"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file it stands for: run git lfs pull"),
    (b"<!DOCTYPE", "a web page: the download went wrong"),
    (b"<html", "a web page: the download went wrong"),
)


@dataclass(slots=True)
class Item:
    """One object, or the reason why there is none at this line."""

    line: int
    value: Any = None
    error: DataError | None = None
    raw: bytes = b""

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.raw)


class HashingFile:
    """A file read from its start to its end, hashed on the way."""

    def __init__(self, path: Path) -> None:
        self._file: IO[bytes] = path.open("rb")
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
        """sha256 of the whole file; reads what was left unread."""
        while chunk := self._file.read(1 << 20):
            self._digest.update(chunk)
        return self._digest.hexdigest()

    def close(self) -> None:
        self._file.close()


def refuse_foreign_bytes(head: bytes, path: Path) -> None:
    """Say what a file is that is no UTF-8 text, judged by its first bytes."""
    for magic, what in _MAGIC:
        if head.startswith(magic):
            raise DataError(f"is {what}", reason="foreign_file", location=path)
    if b"\0" in head[:512]:
        raise DataError(
            "holds NUL bytes: it is no UTF-8 text (UTF-16, or a binary file)", reason="foreign_file", location=path
        )


def read_items(file: HashingFile, path: Path) -> Iterator[Item]:
    """Objects of a file that is JSONL or one JSON list: told apart by its first character, `{` or `[`."""
    head = file.readline(MAX_LINE_BYTES + 1)
    refuse_foreign_bytes(head, path)
    head = head.removeprefix(b"\xef\xbb\xbf")
    blank: list[bytes] = []
    while head and not head.strip():
        blank.append(head)
        head = file.readline(MAX_LINE_BYTES + 1)
    if head.lstrip().startswith(b"["):
        for number, value, text in list_values(b"".join(blank) + head, file, path, MAX_LINE_BYTES):
            yield Item(number, value, raw=text.encode("utf-8", "surrogatepass"))
    else:
        yield from _line_items(file, head, len(blank) + 1)


def _line_items(file: HashingFile, line: bytes, number: int) -> Iterator[Item]:
    while line:
        if len(line) > MAX_LINE_BYTES:
            error = DataError(
                f"a line of more than {MAX_LINE_BYTES >> 20} MiB: no row is so long; keep long "
                "text in a .txt or .md file",
                reason="long_line",
            )
            yield Item(number, error=error, raw=line)
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE_BYTES)
        elif line.strip():
            yield _decoded(line, number)
        line = file.readline(MAX_LINE_BYTES + 1)
        number += 1


def _decoded(line: bytes, number: int) -> Item:
    try:
        return Item(number, decode(line.decode("utf-8").strip("\r\n")), raw=line)
    except UnicodeDecodeError as error:
        what = f"not UTF-8: byte 0x{line[error.start]:02x} at byte {error.start + 1} of the line"
        return Item(number, error=DataError(what, reason="invalid_utf8"), raw=line)
    except DataError as error:
        return Item(number, error=error, raw=line)


def decode_text(data: bytes, path: Path) -> str:
    """A whole file as text; a byte order mark goes."""
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
    """Columns are the same for all rows, so what a row has not is null in it; also inside messages."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value
