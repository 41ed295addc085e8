"""Reading a source: a file of rows, or of text, as its configuration says."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from delib_fast.config import SourceConfig
from delib_fast.data.cot_tags import TAGS
from delib_fast.data.formats import Reading, document_row, rows_of
from delib_fast.data.hub import is_data_set, open_data_set, read_data_set_items
from delib_fast.data.jsonl import HashingFile, Item, decode_text, read_items, refuse_foreign_bytes
from delib_fast.data.rows import DataError, Row
from delib_fast.data.text_files import cut_at_headings

ROW_FILES = (".jsonl", ".ndjson", ".json", ".parquet")
TEXT_FILES = (".txt", ".md", ".markdown")


class SourceRows(list[Row]):
    """The rows of one source, with what was left out on the way."""

    def __init__(self, rows: Iterable[Row], *, name: str, path: Path, sha256: str,
                 bad_rows: Counter[str]) -> None:
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
    if is_data_set(config.path):
        return _read_data_set(name, config)
    path = Path(config.path)
    _refuse_path(name, path, config)
    try:
        file = HashingFile(path)
    except OSError as error:
        raise DataError(f"can't be read: {error.strerror} (source {name!r})", reason="no_file",
                        place=path) from None
    bad_rows: Counter[str] = Counter()
    try:
        if path.suffix.lower() in TEXT_FILES:
            rows = _text_rows(name, path, config, file)
        else:
            rows = _item_rows(name, path, config, _items(path, file), bad_rows)
        kept = list(itertools.islice(rows, config.limit))
        sha256 = file.hexdigest()
    finally:
        file.close()
    _refuse_nothing(kept, name, path, bad_rows)
    return SourceRows(kept, name=name, path=path, sha256=sha256, bad_rows=bad_rows)


def _read_data_set(name: str, config: SourceConfig) -> SourceRows:
    path, bad_rows = Path(config.path), Counter[str]()
    if config.cut != "none":
        raise DataError(f"cut: {config.cut} is for text files ({', '.join(TEXT_FILES)}); this is a data set "
                        f"(source {name!r})", reason="no_file", place=path)
    data_set, sha256 = open_data_set(config)
    rows = _item_rows(name, path, config, read_data_set_items(data_set), bad_rows)
    kept = list(itertools.islice(rows, config.limit))
    _refuse_nothing(kept, name, path, bad_rows)
    return SourceRows(kept, name=name, path=path, sha256=sha256, bad_rows=bad_rows)


def _refuse_nothing(kept: list[Row], name: str, path: Path, bad_rows: Counter[str]) -> None:
    if not kept:
        why = f"all its rows are bad ({_by_reason(bad_rows)})" if bad_rows else "it is empty"
        raise DataError(f"has no rows: {why} (source {name!r})", reason="no_rows", place=path)


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
        raise DataError(f"{what} (source {name!r})", reason="no_file", place=path)


def _text_rows(name: str, path: Path, config: SourceConfig, file: HashingFile) -> Iterator[Row]:
    data = file.read()
    refuse_foreign_bytes(data[:512], path)
    text = decode_text(data, path)
    if "\0" in text:
        line = 1 + text.count("\n", 0, text.index("\0"))
        raise DataError("holds a NUL character: the file is damaged, or is no text", reason="nul",
                        place=f"{path}:{line}")
    if config.cut == "none":
        pieces = [(1, text)]
    else:
        pieces = [(section.line, section.text) for section in cut_at_headings(text)]
    for line, piece in pieces:
        if piece.strip():
            yield document_row(piece, source=name, place=f"{path}:{line}")


def _items(path: Path, file: HashingFile) -> Iterator[Item]:
    if path.suffix.lower() != ".parquet":
        return read_items(file, path)
    from delib_fast.data.parquet import read_parquet_items  # pyarrow takes half a second to import

    return read_parquet_items(path)


def _item_rows(name: str, path: Path, config: SourceConfig, items: Iterator[Item],
               bad_rows: Counter[str]) -> Iterator[Row]:
    tags = TAGS if config.think_tags is None else (config.think_tags,)
    reading = Reading(name, turns=config.turns, tags=tags)
    for item in items:
        place = f"{path}:{item.line}"
        try:
            if item.error is not None:
                raise item.error
            rows = rows_of(item.value, reading, place)
        except DataError as error:
            bad_rows[error.reason] += 1
            _stop_if_bad(error, item, place, config, bad_rows)
        else:
            yield from rows


def _stop_if_bad(error: DataError, item: Item, place: str, config: SourceConfig,
                 bad_rows: Counter[str]) -> None:
    what = f"{error} (row {item.fingerprint})"
    total = bad_rows.total()
    if config.on_bad_row == "error":
        raise DataError(f"{what}. To leave such rows out and count them, set on_bad_row: skip",
                        reason=error.reason, place=place) from None
    if total > config.max_bad_rows:
        raise DataError(f"{what}. It is bad row number {total}, more than max_bad_rows "
                        f"({config.max_bad_rows}): {_by_reason(bad_rows)}", reason=error.reason,
                        place=place) from None


def _by_reason(bad_rows: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in bad_rows.most_common())
