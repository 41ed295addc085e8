"""What the training loop keeps account of: when to stop, when to save, and what to tell of each step."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from delib_fast.config import StageConfig

if TYPE_CHECKING:
    from delib_fast.engine import Engine
    from delib_fast.train import Context


class Stopped(Exception):  # noqa: N818 (it is no error)
    """The run was asked to stop (Ctrl-C, SIGTERM) and has saved its state."""


class TrainingError(RuntimeError):
    """The run can't go on; says at which step and why."""


class StopRequest:
    """Remembers SIGINT and SIGTERM so that the loop can end between two steps; a second SIGINT ends at once."""

    def __init__(self) -> None:
        self.asked = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        try:
            before = {s: signal.signal(s, self._remember) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread, e.g. in a notebook's worker: nothing to listen to
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _remember(self, number: int, frame: Any) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True


class Saver:
    """Decides when a checkpoint is due and writes it. Rank 0's clock decides for all."""

    def __init__(self, context: Context, engine: Engine, stage: StageConfig) -> None:
        self._context, self._engine, self._stage = context, engine, stage
        self._saved_at, self._saved_step = time.monotonic(), engine.step

    def due(self) -> bool:
        rules, step = self._context.config.checkpoint, self._engine.step
        if step == self._saved_step or self._context.ranks.rank != 0:
            return False
        minutes = (time.monotonic() - self._saved_at) / 60
        return bool((rules.every_steps and step % rules.every_steps == 0)
                    or (rules.every_minutes and minutes >= rules.every_minutes))

    def save(self) -> None:
        root = self._context.run.checkpoints(self._stage.name)
        extra = {"stage": self._stage.name, "data": self._context.corpus.fingerprint(self._stage)}
        self._engine.save(root, extra, self._context.config.checkpoint.keep_last)
        self._saved_at, self._saved_step = time.monotonic(), self._engine.step


class StepLog:
    """Counts tokens and time on the host and writes a line of metrics where one is due."""

    def __init__(self, context: Context, stage: StageConfig, batches: Any, *, first_step: int) -> None:
        self._context, self._stage, self._batches = context, stage, batches
        self._first_step = first_step
        self._tokens = 0
        self._normalizer = 0.0
        self._all_tokens = self._all_supervised = 0
        self._seconds, self._since = 0.0, time.perf_counter()
        context.reporter.stage(stage.name, first_step, batches.num_steps)

    def count(self, micro_batches: Sequence[Any], normalizer: float) -> None:
        self._tokens += sum(batch.num_tokens for batch in micro_batches)
        self._normalizer += normalizer

    def write(self, engine: Engine, meter: Any, lr: float) -> None:
        from delib_fast.losses import segment_report, tokens_of, weighted_loss

        ranks = self._context.ranks
        sums = ranks.sum_tensor(meter.sums).cpu()
        (tokens,) = ranks.sum(self._tokens)
        report = segment_report(sums)
        loss, supervised = weighted_loss(sums, self._normalizer), tokens_of(report)
        if loss != loss or loss in (float("inf"), float("-inf")):
            raise TrainingError(f"stage {self._stage.name!r} step {engine.step}: the loss is {loss}; the last "
                                "checkpoint is from before. Lower the learning rate or look at the step's rows: "
                                f"{self._batches.step_example_ids(engine.step - 1)[:8]}")
        seconds = time.perf_counter() - self._since
        record = {
            "stage": self._stage.name, "step": engine.step, "loss": loss, "lr": lr,
            "gradient_norm": engine.gradient_norm, "skipped_steps": engine.skipped_steps, "segments": report,
            "tokens": int(tokens), "supervised_tokens": supervised, "seconds": seconds,
            "tokens_per_s": tokens / seconds, "supervised_tokens_per_s": supervised / seconds,
        }
        self._context.run.write_metrics(record)
        self._context.reporter.update(engine.step, record)
        self._all_tokens += int(tokens)
        self._all_supervised += supervised
        self._seconds += seconds
        meter.reset()
        self._tokens, self._normalizer, self._since = 0, 0.0, time.perf_counter()

    def totals(self) -> dict[str, Any]:
        self._context.reporter.end_stage()
        seconds = max(self._seconds, 1e-9)
        return {"train_s": self._seconds, "tokens_per_s": self._all_tokens / seconds,
                "supervised_tokens_per_s": self._all_supervised / seconds,
                "resumed_at_step": self._first_step or None}
