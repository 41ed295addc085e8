"""Hooks of the training loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from delib_fast.config import StageConfig
    from delib_fast.data import PackedBatch
    from delib_fast.engine import Engine
    from delib_fast.ops import DivergenceOutput, LossOutput
    from delib_fast.training.context import RunContext


class Callback:
    """Hooks of the training loop. By default each does nothing; override those that are needed.

    Every hook is called on every rank, in the same order, so a hook may use collectives. A hook must not change weights
    or the state of random number generators.
    """

    def micro_batch(self, batch: PackedBatch, output: LossOutput | DivergenceOutput) -> None:
        """Called after the backward pass of a micro-batch. Both arguments are on the device; do not synchronize.

        The output of a batch with a teacher (`batch.teacher`) is a DivergenceOutput.
        """

    def step_end(self, run: RunContext, engine: Engine, stage: StageConfig) -> None:
        """Called after each step. `engine.step` is the number of steps made so far."""


class CallbackList:
    """Calls the step log and then the user's callbacks, in order, for one stage."""

    def __init__(
        self, run: RunContext, engine: Engine, stage: StageConfig, log: Callback, callbacks: Sequence[Callback]
    ) -> None:
        self._run, self._engine, self._stage, self._log, self._callbacks = run, engine, stage, log, callbacks

    def micro_batch(self, batch: PackedBatch, output: LossOutput | DivergenceOutput) -> None:
        for callback in (self._log, *self._callbacks):
            callback.micro_batch(batch, output)

    def step_end(self) -> None:
        self._log.step_end(self._run, self._engine, self._stage)
        for callback in self._callbacks:
            with self._run.watchdog.local_work(f"callback {type(callback).__name__}"):
                callback.step_end(self._run, self._engine, self._stage)
