"""Reading a source: a file of rows, or of text, as its configuration says."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from delib_fast.config import SourceConfig
from delib_fast.data.read.cot_tags import TAGS
from delib_fast.data.read.formats import Reading, document_row, rows_of
from delib_fast.data.read.hub import is_data_set, open_data_set, read_data_set_items
from delib_fast.data.read.jsonl import HashingFile, Item, decode_text, read_items, refuse_foreign_bytes
from delib_fast.data.read.text_files import cut_at_headings
from delib_fast.data.rows import DataError, Row

ROW_FILES = (".jsonl", ".ndjson", ".json", ".parquet")
TEXT_FILES = (".txt", ".md", ".markdown")


class SourceRows(list[Row]):
    """The rows of one source, with what was left out on the way."""

    def __init__(self, rows: Iterable[Row], *, name: str, path: Path, sha256: str, bad_rows: Counter[str]) -> None:
        super().__init__(rows)
        self.name = name
        self.path = path
        self.sha256 = sha256
        """of the file as read"""
        self.bad_rows = bad_rows
        """how many rows were left out, by reason"""


def read_source(name: str, config: SourceConfig) -> SourceRows:
    """All the rows of one source.

    Args:
        name: what the source is called under `data:`; each row carries it.
        config: path, how to cut text files, and what to do about a bad row.
    Returns:
        The rows in the order of the file, the file's sha256, and the bad rows counted by reason.
    Raises:
        DataError: with `file:line`, the reason and a fingerprint of the row, never its text. The file can't
            be read as what its ending says; a row is bad and `on_bad_row` is "error"; more than
            `max_bad_rows` are; or no row is left.
    """
    stream = SourceStream(name, config)
    rows = list(stream)
    return SourceRows(rows, name=name, path=stream.path, sha256=stream.sha256, bad_rows=stream.bad_rows)


class SourceStream:
    """The rows of one source, read anew in each pass and never held.

    `sha256` and `bad_rows` are known after a pass, and are those of the last one. Raises DataError as `read_source`
    does: about the path here, about rows in a pass; and in a pass where the file is not what it was in the one before.
    """

    def __init__(self, name: str, config: SourceConfig) -> None:
        self.name, self.config, self.path = name, config, Path(config.path)
        self.sha256 = ""
        self.bad_rows: Counter[str] = Counter()
        self._data_set: Any = None
        if is_data_set(config.path):
            if config.cut != "none":
                raise DataError(
                    f"cut: {config.cut} is for text files ({', '.join(TEXT_FILES)}); this is a data set "
                    f"(source {name!r})",
                    reason="no_file",
                    location=self.path,
                )
            self._data_set, self.sha256 = open_data_set(config)
            self.size_bytes = int(self._data_set.data.nbytes)
        else:
            _refuse_path(name, self.path, config)
            self.size_bytes = self.path.stat().st_size

    def __iter__(self) -> Iterator[Row]:
        bad_rows: Counter[str] = Counter()
        rows, file = 0, None if self._data_set is not None else self._open()
        try:
            for row in itertools.islice(self._rows(file, bad_rows), self.config.limit):
                rows += 1
                yield row
            if file is not None:
                self._know(file.hexdigest())
        except OSError as error:
            raise DataError(
                f"can't be read on: {error.strerror or error} (source {self.name!r})",
                reason="no_file",
                location=self.path,
            ) from None
        finally:
            if file is not None:
                file.close()
        self.bad_rows = bad_rows
        _refuse_nothing(rows, self.name, self.path, bad_rows)

    def hash(self) -> str:
        """The content's sha256; reads the file without looking at it, if no pass has told it."""
        if not self.sha256:
            file = self._open()
            try:
                self._know(file.hexdigest())
            finally:
                file.close()
        return self.sha256

    def _know(self, sha256: str) -> None:
        if self.sha256 not in ("", sha256):
            raise DataError(
                f"was changed while it was being read (source {self.name!r}): start again, and write such "
                "a file beside its place and rename it",
                reason="changed",
                location=self.path,
            )
        self.sha256 = sha256

    def _open(self) -> HashingFile:
        try:
            return HashingFile(self.path)
        except OSError as error:
            raise DataError(
                f"can't be read: {error.strerror} (source {self.name!r})", reason="no_file", location=self.path
            ) from None

    def _rows(self, file: HashingFile | None, bad_rows: Counter[str]) -> Iterator[Row]:
        if file is None:
            return _item_rows(self.name, self.path, self.config, read_data_set_items(self._data_set), bad_rows)
        if self.path.suffix.lower() in TEXT_FILES:
            return _text_rows(self.name, self.path, self.config, file)
        return _item_rows(self.name, self.path, self.config, _items(self.path, file), bad_rows)


def _refuse_nothing(rows: int, name: str, path: Path, bad_rows: Counter[str]) -> None:
    if not rows:
        why = f"all its rows are bad ({_by_reason(bad_rows)})" if bad_rows else "it is empty"
        raise DataError(f"has no rows: {why} (source {name!r})", reason="no_rows", location=path)


def _refuse_path(name: str, path: Path, config: SourceConfig) -> None:
    suffix = path.suffix.lower()
    what = ""
    if not path.exists():
        what = f"no such file (working directory: {Path.cwd()})"
    elif path.is_dir():
        what = "is a folder, and none that datasets saved; name a file"
    elif suffix not in (*ROW_FILES, *TEXT_FILES):
        known = ", ".join((*ROW_FILES, *TEXT_FILES))
        what = f"can't tell what it holds by its ending {path.suffix!r}; known are {known}"
    elif config.cut != "none" and suffix not in TEXT_FILES:
        what = f"cut: {config.cut} is for text files ({', '.join(TEXT_FILES)}); this one holds rows"
    if what:
        raise DataError(f"{what} (source {name!r})", reason="no_file", location=path)


def _text_rows(name: str, path: Path, config: SourceConfig, file: HashingFile) -> Iterator[Row]:
    data = file.read()
    refuse_foreign_bytes(data[:512], path)
    text = decode_text(data, path)
    if "\0" in text:
        line = 1 + text.count("\n", 0, text.index("\0"))
        raise DataError(
            "holds a NUL character: the file is damaged, or is no text", reason="nul", location=f"{path}:{line}"
        )
    if config.cut == "none":
        pieces = [(1, text)]
    else:
        pieces = [(section.line, section.text) for section in cut_at_headings(text)]
    for line, piece in pieces:
        if piece.strip():
            yield document_row(piece, source=name, location=f"{path}:{line}")


def _items(path: Path, file: HashingFile) -> Iterator[Item]:
    if path.suffix.lower() != ".parquet":
        return read_items(file, path)
    from delib_fast.data.read.parquet import read_parquet_items  # pyarrow takes half a second to import

    return read_parquet_items(path)


def _item_rows(
    name: str, path: Path, config: SourceConfig, items: Iterator[Item], bad_rows: Counter[str]
) -> Iterator[Row]:
    tags = TAGS if config.think_tags is None else (config.think_tags,)
    reading = Reading(name, turns=config.turns, tags=tags)
    for item in items:
        location = f"{path}:{item.line}"
        try:
            if item.error is not None:
                raise item.error
            rows = rows_of(item.value, reading, location)
        except DataError as error:
            bad_rows[error.reason] += 1
            _stop_if_bad(error, item, location, config, bad_rows)
        else:
            yield from rows


def _stop_if_bad(error: DataError, item: Item, location: str, config: SourceConfig, bad_rows: Counter[str]) -> None:
    what = f"{error} (row {item.fingerprint})"
    total = bad_rows.total()
    if config.on_bad_row == "error":
        raise DataError(
            f"{what}. To leave such rows out and count them, set on_bad_row: skip",
            reason=error.reason,
            location=location,
        ) from None
    if total > config.max_bad_rows:
        raise DataError(
            f"{what}. It is bad row number {total}, more than max_bad_rows "
            f"({config.max_bad_rows}): {_by_reason(bad_rows)}",
            reason=error.reason,
            location=location,
        ) from None


def _by_reason(bad_rows: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in bad_rows.most_common())
