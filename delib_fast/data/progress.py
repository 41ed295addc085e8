"""Progress lines for long-running work."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from delib_fast.terminal import echo

T = TypeVar("T")


def log_progress(items: Iterable[T], total: int, what: str, *, every_s: float = 5.0) -> Iterator[T]:
    """Yield the items unchanged, and print the progress on stderr every `every_s` seconds.

    A line reads "what: 5 of 10 rows, 3 s left".

    Args:
        items: one item per row.
        total: number of rows, for the estimate of the remaining time.
        what: the work in progress, e.g. "encoding rows".
    """
    started = printed = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - printed >= every_s:
            printed = now
            left_s = (now - started) / done * (total - done)
            echo(f"{what}: {done:,} of {total:,} rows, {left_s:.0f} s left", err=True)
        yield item
