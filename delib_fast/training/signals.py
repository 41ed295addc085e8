"""SIGINT and SIGTERM: the run saves its state and ends between two steps."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

from delib_fast.training.errors import Stopped


class StopRequest:
    """Records SIGINT and SIGTERM, so that the run can save its state and end between two steps.

    A second signal, if it is SIGINT, raises KeyboardInterrupt. Inside `raise_immediately`, where nothing has to be
    saved, the first signal raises Stopped.
    """

    def __init__(self) -> None:
        self.requested = False
        self._immediate: str | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle both signals while the block runs, and then restore the previous handlers."""
        try:
            before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread, for example in a notebook: signals cannot be handled here
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def raise_immediately(self, activity: str) -> Iterator[None]:
        """While the block runs, a signal raises Stopped at whatever line is executing.

        Args:
            activity: what the block does, for the message "stopped while {activity}".
        """
        self._immediate = activity
        try:
            if self.requested:
                raise Stopped(f"stopped while {activity}")
            yield
        finally:
            self._immediate = None

    def _handle(self, number: int, frame: Any) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        if self._immediate is not None:
            raise Stopped(f"stopped while {self._immediate}")
