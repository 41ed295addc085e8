"""At most a number of rows of each source, spread evenly over it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from delib_fast.data import Row

T = TypeVar("T")


def spread(items: Sequence[T], limit: int | None) -> list[T]:
    """At most `limit` items, evenly spaced, so that every part of a sorted file is included; None for all."""
    if limit is None or len(items) <= limit:
        return list(items)
    return [items[k * len(items) // limit] for k in range(limit)]


def spread_by_source(rows: Sequence[Row], limit: int | None) -> list[Row]:
    """At most `limit` rows of each source, so that a large source does not displace the others; None for all."""
    sources: dict[str, list[Row]] = {}
    for row in rows:
        sources.setdefault(row.source, []).append(row)
    return [row for own in sources.values() for row in spread(own, limit)]
