"""Making things before they are asked for, in a thread of their own."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
_END = object()


def prefetch(items: Iterable[T], depth: int = 1) -> Iterator[T]:
    """The same items in the same order, up to `depth` of them made in advance.

    An error of `items` is raised where its item would have come. Closing the iterator ends the thread once the item at
    hand is made.
    """
    iterator = iter(items)
    thread = ThreadPoolExecutor(1, thread_name_prefix="ahead")
    try:
        made: deque[Future[Any]] = deque(thread.submit(next, iterator, _END) for _ in range(depth))
        while (item := made.popleft().result()) is not _END:
            made.append(thread.submit(next, iterator, _END))
            yield item
    finally:
        thread.shutdown(cancel_futures=True)
