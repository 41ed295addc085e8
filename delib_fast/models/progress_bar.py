"""transformers' progress bars, off for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as hf_logging


@contextmanager
def without_progress_bar() -> Iterator[None]:
    """transformers draws a bar over the shards it reads and writes, in the middle of a run's log."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()
