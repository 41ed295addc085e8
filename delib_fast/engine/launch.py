"""Report a failure of one rank before a run begins to the other ranks, which would otherwise wait for it.

Without a launcher, torch is not loaded.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import TypeVar

from delib_fast.config import ConfigError
from delib_fast.engine.slurm import has_launcher

T = TypeVar("T")


def on_every_rank(load: Callable[[], T]) -> T:
    """Call `load`. If it fails on one rank, it fails on all of them: see `Rendezvous.raise_together`."""
    if not has_launcher(os.environ):
        return load()
    from delib_fast.engine.rendezvous import Rendezvous

    return Rendezvous.current().raise_together(load)


def report_to_ranks(message: str) -> None:
    """End the other ranks with an error that names this one, if their run has not begun."""
    if has_launcher(os.environ):
        from delib_fast.engine.rendezvous import Rendezvous

        with contextlib.suppress(ConfigError, RuntimeError):
            Rendezvous.current().abort(message)
