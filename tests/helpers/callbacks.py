"""Callbacks of the training loop for tests."""

from __future__ import annotations

from delib_fast.training.callbacks import Callback


class StopAfter(Callback):
    """Request a stop after a step of any stage, as Ctrl-C does."""

    def __init__(self, step: int) -> None:
        self._step = step

    def step_end(self, run, engine, stage) -> None:
        run.stop.requested |= engine.step == self._step
