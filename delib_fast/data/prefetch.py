"""Prefetching: a thread computes the next items of an iterator while the current one is used."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
_END = object()


def prefetch(items: Iterable[T], depth: int = 1) -> Iterator[T]:
    """Yield the same items in the same order, and compute up to `depth` of them in advance.

    An error is raised when the item that caused it would have been yielded. Closing the iterator stops the thread after
    the item that it is computing.
    """
    iterator = iter(items)
    thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    try:
        pending: deque[Future[Any]] = deque(thread.submit(next, iterator, _END) for _ in range(depth))
        while (item := pending.popleft().result()) is not _END:
            pending.append(thread.submit(next, iterator, _END))
            yield item
    finally:
        thread.shutdown(cancel_futures=True)
