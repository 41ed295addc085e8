"""A progress line for work that takes long."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def log_progress(items: Iterable[T], total: int, what: str, *, every_s: float = 5.0) -> Iterator[T]:
    """Yield the items, one for each row, and print a line on stderr every few seconds.

    The line reads "what: 5 of 10 rows, 3 s left".
    """
    began = printed = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - printed >= every_s:
            printed = now
            left = (now - began) / done * (total - done)
            print(f"{what}: {done:,} of {total:,} rows, {left:.0f} s left", file=sys.stderr, flush=True)
        yield item
