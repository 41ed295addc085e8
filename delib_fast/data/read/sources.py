"""Read a source: a file of rows, a text file, or a dataset."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from delib_fast.config import SourceConfig
from delib_fast.data.read.cot_tags import TAGS
from delib_fast.data.read.formats import FormatSettings, document_row, rows_of
from delib_fast.data.read.hub import is_dataset, open_dataset, read_dataset_items
from delib_fast.data.read.jsonl import HashingFile, Item, decode_text, read_items, refuse_foreign_bytes
from delib_fast.data.read.text_files import cut_at_headings
from delib_fast.data.rows import DataError, Row

ROW_FILES = (".jsonl", ".ndjson", ".json", ".parquet")
TEXT_FILES = (".txt", ".md", ".markdown")


def read_source(name: str, config: SourceConfig) -> list[Row]:
    """Read all rows of one source, in the order of the file.

    Args:
        name: the name of the source under `data:`; each row carries it.
        config: the path, how to split text files, and how to handle a bad row.
    Raises:
        DataError: the content does not match the file's extension; a row is bad and `on_bad_row` is "error"; there are
            more than `max_bad_rows` bad rows; or no row is left. The message has `file:line`, the reason and a
            fingerprint of the row, never its text.
    """
    return list(SourceReader(name, config))


class SourceReader:
    """The rows of one source. Each iteration reads the file again, so no rows are kept in memory.

    Raises DataError as `read_source` does: on construction for the path, and during iteration for the rows. Iterating
    also raises it if the file has changed since the previous iteration.
    """

    def __init__(self, name: str, config: SourceConfig) -> None:
        self.name, self.config, self.path = name, config, Path(config.path)
        self.sha256 = ""
        """Hash of the whole file, or of the rows of a dataset; "" until `hash` is called or an iteration ends."""
        self.bad_rows: Counter[str] = Counter()
        """Number of bad rows that the last complete iteration skipped, by reason."""
        self.first_bad_rows: dict[str, str] = {}
        """The message about the first of them, by reason, with its location."""
        self.ignored_fields: Counter[str] = Counter()
        """Number of objects with each field that the last complete iteration ignored (`unread.py`)."""
        self._dataset: Any = None
        if is_dataset(config.path):
            if config.cut != "none":
                raise DataError(
                    f"cut: {config.cut} is for text files ({', '.join(TEXT_FILES)}); this is a dataset "
                    f"(source {name!r})",
                    reason="no_file",
                    location=self.path,
                )
            self._dataset, self.sha256 = open_dataset(config)
            self.size_bytes = int(self._dataset.data.nbytes)
        else:
            _refuse_path(name, self.path, config)
            self.size_bytes = self.path.stat().st_size

    def __iter__(self) -> Iterator[Row]:
        bad_rows: Counter[str] = Counter()
        first: dict[str, str] = {}
        ignored: Counter[str] = Counter()
        num_rows = 0
        file = self._open() if self._dataset is None else None
        try:
            for row in itertools.islice(self._rows(file, bad_rows, first, ignored), self.config.limit):
                num_rows += 1
                yield row
            if file is not None:
                self._check_unchanged(file.hexdigest())
        except OSError as error:
            raise DataError(
                f"cannot be read to its end: {error.strerror or error} (source {self.name!r})",
                reason="no_file",
                location=self.path,
            ) from None
        finally:
            if file is not None:
                file.close()
        self.bad_rows, self.first_bad_rows, self.ignored_fields = bad_rows, first, ignored
        if not num_rows:
            why = f"all its rows are bad ({_counts_by_reason(bad_rows)})" if bad_rows else "it is empty"
            why += "".join(f"; {message}" for message in first.values())
            raise DataError(f"has no rows: {why} (source {self.name!r})", reason="no_rows", location=self.path)

    def hash(self) -> str:
        """Return the sha256 of the content. Unless an iteration has hashed the file, this reads it without decoding."""
        if not self.sha256:
            file = self._open()
            try:
                self._check_unchanged(file.hexdigest())
            finally:
                file.close()
        return self.sha256

    def _check_unchanged(self, sha256: str) -> None:
        if self.sha256 not in ("", sha256):
            raise DataError(
                f"changed while it was being read (source {self.name!r}): start again; to replace a file that is in "
                "use, write the new one under another name and rename it",
                reason="changed",
                location=self.path,
            )
        self.sha256 = sha256

    def _open(self) -> HashingFile:
        try:
            return HashingFile(self.path)
        except OSError as error:
            raise DataError(
                f"cannot be read: {error.strerror} (source {self.name!r})", reason="no_file", location=self.path
            ) from None

    def _rows(
        self, file: HashingFile | None, bad_rows: Counter[str], first: dict[str, str], ignored: Counter[str]
    ) -> Iterator[Row]:
        if file is not None and self.path.suffix.lower() in TEXT_FILES:
            return _text_rows(self.name, self.path, self.config, file)
        items = read_dataset_items(self._dataset) if file is None else _items(self.path, file)
        return _item_rows(self.name, self.path, self.config, items, bad_rows, first, ignored)


def _refuse_path(name: str, path: Path, config: SourceConfig) -> None:
    suffix = path.suffix.lower()
    what = ""
    if not path.exists():
        what = f"no such file (working directory: {Path.cwd()})"
    elif path.is_dir():
        what = "is a folder, but was not written by datasets' save_to_disk; give a file"
    elif not path.is_file():
        what = "is not a regular file, but a pipe or a device, which may never end; copy it into a file"
    elif suffix not in (*ROW_FILES, *TEXT_FILES):
        known = ", ".join((*ROW_FILES, *TEXT_FILES))
        what = f"has the unknown extension {suffix!r}; known are {known}"
    elif config.cut != "none" and suffix not in TEXT_FILES:
        what = f"cut: {config.cut} is for text files ({', '.join(TEXT_FILES)}); this file contains rows"
    if what:
        raise DataError(f"{what} (source {name!r})", reason="no_file", location=path)


def _text_rows(name: str, path: Path, config: SourceConfig, file: HashingFile) -> Iterator[Row]:
    data = file.read()
    refuse_foreign_bytes(data[:512], path)
    text = decode_text(data, path)
    if "\0" in text:
        line = 1 + text.count("\n", 0, text.index("\0"))
        raise DataError(
            "contains a NUL character: the file is damaged, or is not text", reason="nul", location=f"{path}:{line}"
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
    from delib_fast.data.read.parquet import read_parquet_items  # importing pyarrow takes half a second

    return read_parquet_items(path)


def _item_rows(
    name: str,
    path: Path,
    config: SourceConfig,
    items: Iterator[Item],
    bad_rows: Counter[str],
    first: dict[str, str],
    ignored: Counter[str],
) -> Iterator[Row]:
    tags = TAGS if config.think_tags is None else (config.think_tags,)
    settings = FormatSettings(name, turns=config.turns, tags=tags)
    for item in items:
        location = f"{path}:{item.line}"
        settings.ignored.clear()
        try:
            if item.error is not None:
                raise item.error
            rows = rows_of(item.value, settings, location)
        except DataError as error:
            bad_rows[error.reason] += 1
            first.setdefault(error.reason, f"{location}: {error} (row {item.fingerprint})")
            _refuse_or_skip(error, item, location, config, bad_rows)
        else:
            ignored.update(settings.ignored.keys())
            yield from rows


def _refuse_or_skip(error: DataError, item: Item, location: str, config: SourceConfig, bad_rows: Counter[str]) -> None:
    what = f"{error} (row {item.fingerprint})"
    if config.on_bad_row == "error":
        raise DataError(
            f"{what}. To skip and count such rows, set on_bad_row: skip", reason=error.reason, location=location
        ) from None
    if bad_rows.total() > config.max_bad_rows:
        raise DataError(
            f"{what}. This is bad row number {bad_rows.total()}, more than max_bad_rows "
            f"({config.max_bad_rows}): {_counts_by_reason(bad_rows)}",
            reason=error.reason,
            location=location,
        ) from None


def _counts_by_reason(bad_rows: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in bad_rows.most_common())
