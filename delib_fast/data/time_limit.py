"""A time limit for Python code that others wrote, such as a chat template that loops forever."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class _TimedOut(BaseException):
    """Raised inside a call that takes too long. It is a BaseException, so that the called code does not catch it."""


_lock = threading.Lock()
_deadlines: dict[int, float] = {}
"""The deadline of the call that each thread makes, by thread id."""
_monitor: threading.Thread | None = None


def call_within(seconds: float, call: Callable[[], T]) -> T:
    """Call a function, and raise TimeoutError in it if it takes longer.

    It works in any thread, and costs less than a microsecond: one thread of the process looks at all deadlines a few
    times a second. A function in C, such as a power of large integers, is interrupted only when it returns.

    Args:
        seconds: the limit.
    Raises:
        TimeoutError: the call was interrupted.
    """
    thread = threading.get_ident()
    try:
        with _lock:
            _start_monitor()
            _deadlines[thread] = time.monotonic() + seconds
        try:
            return call()
        finally:
            with _lock:
                _deadlines.pop(thread, None)
    except _TimedOut:
        raise TimeoutError(f"it did not finish within {seconds:g} s") from None


def _start_monitor() -> None:
    global _monitor
    if _monitor is None:
        _monitor = threading.Thread(target=_watch, name="time limit", daemon=True)
        _monitor.start()


def _watch() -> None:
    while True:
        time.sleep(0.2)
        with _lock:
            for thread, deadline in list(_deadlines.items()):
                if time.monotonic() > deadline:
                    del _deadlines[thread]
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_TimedOut))


def _after_fork() -> None:
    """The threads of the parent process do not exist in the child."""
    global _lock, _monitor
    _lock, _monitor = threading.Lock(), None
    _deadlines.clear()


os.register_at_fork(after_in_child=_after_fork)
