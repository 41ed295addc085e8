"""Load a source, split into training and held-out rows. Only a small file is kept in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from delib_fast.config import SourceConfig
from delib_fast.data.disk_cache import cache_key, cached_json
from delib_fast.data.holdout import check_holdout, is_held_out
from delib_fast.data.read.sources import SourceReader
from delib_fast.data.rows import Message, Row

MAX_BYTES_IN_MEMORY = 256 << 20
"""The training rows of a larger file are read again in each pass."""


@dataclass(frozen=True)
class Source:
    """The training and held-out rows of one source, and the number of bad rows that were skipped."""

    train_rows: Callable[[], Iterator[Row]]
    """Starts a new pass over the training rows."""
    num_train: int
    held_out: list[Row]
    sha256: str
    """Hash of the file, or of the rows of a dataset."""
    bad_rows: Counter[str]
    """Number of skipped rows, by reason."""
    first_bad_rows: dict[str, str]
    """The message about the first skipped row of each reason, with its location."""
    ignored_fields: Counter[str]
    """Number of objects with each ignored field."""


def load_source(name: str, config: SourceConfig, cache_folder: Path) -> Source:
    """Read a source once, and split it.

    For a large file, the held-out rows and the counts are cached, so that the next start only hashes the file.

    Raises:
        DataError: as in `read_source`.
        ValueError: the held-out share leaves no row for training or for evaluation.
    """
    reader = SourceReader(name, config)
    if reader.size_bytes <= MAX_BYTES_IN_MEMORY:
        train: list[Row] = []
        held_out: list[Row] = []
        for row in reader:
            (held_out if is_held_out(row, config.holdout) else train).append(row)
        check_holdout(name, config.holdout, len(train), len(held_out))
        return Source(
            lambda: iter(train),
            len(train),
            held_out,
            reader.sha256,
            reader.bad_rows,
            reader.first_bad_rows,
            reader.ignored_fields,
        )
    key = cache_key({"scan": name, "sha256": reader.hash(), "settings": config.identity()})
    scan = cached_json(cache_folder / "scans", key, lambda: _scan(reader, config.holdout))
    return Source(
        lambda: (row for row in reader if not is_held_out(row, config.holdout)),
        scan["train"],
        [_row_from_json(item) for item in scan["held_out"]],
        reader.sha256,
        Counter(scan["bad_rows"]),
        scan["first_bad_rows"],
        Counter(scan["ignored_fields"]),
    )


def _scan(reader: SourceReader, holdout: float) -> dict[str, Any]:
    held_out: list[dict[str, Any]] = []
    num_train = 0
    for row in reader:
        if is_held_out(row, holdout):
            held_out.append(asdict(row))
        else:
            num_train += 1
    check_holdout(reader.name, holdout, num_train, len(held_out))
    return {
        "train": num_train,
        "held_out": held_out,
        "bad_rows": dict(reader.bad_rows),
        "first_bad_rows": reader.first_bad_rows,
        "ignored_fields": dict(reader.ignored_fields),
    }


def _row_from_json(item: dict[str, Any]) -> Row:
    return Row(**item | {"messages": tuple(Message(**message) for message in item["messages"])})
