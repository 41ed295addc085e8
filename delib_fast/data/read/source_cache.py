"""A source parted into what is trained on and what is held out; the rows of a large one are never all in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from delib_fast.config import SourceConfig
from delib_fast.data.encode.cache import fingerprint_of, remembered
from delib_fast.data.read.sources import SourceStream
from delib_fast.data.rows import Message, Row, is_held_out, refuse_empty_side

HELD_BYTES = 256 << 20
"""Of a file: above this its rows are read anew in each pass over them."""


class Rows(Protocol):
    """Rows that can be gone through again and again."""

    def __iter__(self) -> Iterator[Row]: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Source:
    train: Rows
    held_out: Sequence[Row]
    """always in memory"""
    sha256: str
    bad_rows: Counter[str]


def load_source(name: str, config: SourceConfig, cache_folder: Path) -> Source:
    """Read a source once; what that told of a large one is remembered in the cache folder, by its content's hash.

    Raises:
        DataError: as `read_source`.
        ValueError: the held-out share leaves one side empty.
    """
    stream = SourceStream(name, config)
    if stream.size_bytes <= HELD_BYTES:
        train: list[Row] = []
        held_out: list[Row] = []
        for row in stream:
            (held_out if is_held_out(row, config.holdout) else train).append(row)
        refuse_empty_side(name, config.holdout, len(train), len(held_out))
        return Source(train, held_out, stream.sha256, stream.bad_rows)
    told = remembered(
        cache_folder / "scans",
        fingerprint_of({"scan": name, "sha256": stream.hash(), "settings": config.model_dump(mode="json")}),
        lambda: _scan(stream, config),
    )
    rows = _Streamed(stream, config.holdout, told["train"])
    return Source(rows, [_row(item) for item in told["held_out"]], stream.sha256, Counter(told["bad_rows"]))


def _scan(stream: SourceStream, config: SourceConfig) -> dict[str, Any]:
    held_out: list[dict[str, Any]] = []
    train = 0
    for row in stream:
        if is_held_out(row, config.holdout):
            held_out.append(asdict(row))
        else:
            train += 1
    refuse_empty_side(stream.name, config.holdout, train, len(held_out))
    return {"train": train, "held_out": held_out, "bad_rows": dict(stream.bad_rows)}


def _row(item: dict[str, Any]) -> Row:
    return Row(**item | {"messages": tuple(Message(**message) for message in item["messages"])})


class _Streamed:
    """The training rows of a file, read anew in each pass."""

    def __init__(self, stream: SourceStream, holdout: float, count: int) -> None:
        self._stream, self._holdout, self._count = stream, holdout, count

    def __iter__(self) -> Iterator[Row]:
        return (row for row in self._stream if not is_held_out(row, self._holdout))

    def __len__(self) -> int:
        return self._count
