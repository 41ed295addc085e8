"""Stopping a run: the flag that is checked before every request, and the causes for setting it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class RequestsStopped(Exception):  # noqa: N818 (a requested stop is not an error)
    """No more requests are sent, because the run was interrupted, reached its budget, or lost its endpoint."""


class Interrupted(Exception):  # noqa: N818
    """The cause of a stop: Ctrl-C or SIGTERM."""


class BudgetSpent(Exception):  # noqa: N818
    """The cause of a stop: the budget does not cover another request."""


class LowYield(Exception):  # noqa: N818
    """The cause of a stop: too few of the answers that were paid for are usable."""


class StopFlag:
    """Set once, with a cause, when no more requests are to be sent."""

    def __init__(self) -> None:
        self.cause: BaseException | None = None
        self._event = asyncio.Event()

    def set(self, cause: BaseException) -> None:
        """Set the flag, unless it is set already."""
        if self.cause is None:
            self.cause = cause
            self._event.set()

    def check(self) -> None:
        """Raise RequestsStopped if the flag is set."""
        if self.cause is not None:
            raise RequestsStopped

    async def sleep(self, seconds: float) -> None:
        """Sleep. If the flag is set in the meantime, wake up and raise RequestsStopped."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._event.wait(), seconds)
        self.check()

    async def wait_for(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for the result of `work`. If the flag is set first, cancel it and raise RequestsStopped."""
        task, stopped = asyncio.ensure_future(work), asyncio.ensure_future(self._event.wait())
        try:
            await asyncio.wait((task, stopped), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise RequestsStopped
            return task.result()
        finally:
            stopped.cancel()
            if not task.done():
                task.cancel()
                await asyncio.wait((task,))
