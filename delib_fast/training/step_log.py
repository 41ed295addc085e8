"""The metrics of a stage: counts tokens and time on the host, and logs a record every few steps."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from delib_fast.config import AFTConfig
from delib_fast.training.bad_steps import BadSteps
from delib_fast.training.callbacks import Callback
from delib_fast.training.meter import Meter, count_tokens, segment_report, weighted_loss
from delib_fast.training.throughput import Throughput

if TYPE_CHECKING:
    from delib_fast.config import StageConfig
    from delib_fast.data import PackedBatch, PackedDataLoader
    from delib_fast.engine import Engine
    from delib_fast.ops import DivergenceOutput, LossOutput
    from delib_fast.training.context import RunContext


class StepLog(Callback):
    """Writes a metrics record to metrics.jsonl, the loggers and the console every `log.every_steps` steps of a stage.

    Args:
        batches: the stage's batches, for the number of steps and the locations of rows.
        state: what `state` returned, from the checkpoint that the stage resumes from; None if it starts.
    """

    def __init__(
        self,
        run: RunContext,
        engine: Engine,
        stage: StageConfig,
        batches: PackedDataLoader,
        state: Mapping[str, Any] | None,
    ) -> None:
        self._run, self._stage, self._num_steps = run, stage, batches.num_steps
        self._meter = Meter(engine.device, has_teacher=isinstance(stage, AFTConfig) and stage.teacher is not None)
        self._throughput = Throughput.of(engine, stage)
        self._bad_steps = BadSteps(run, stage, batches)
        self._micro_batches: Sequence[PackedBatch] = ()
        self._totals: dict[str, Any] = {
            "tokens": 0,
            "pending_s": 0.0,
            "all_tokens": 0,
            "all_supervised": 0,
            "seconds": 0.0,
            "resumed_at_steps": [],
        }
        if state is not None:
            self._restore(state, engine.step)
        self._tokens = self._totals["tokens"] if run.ranks.rank == 0 else 0
        self._since = time.perf_counter() - self._totals["pending_s"]
        run.console.begin_stage(stage.name, engine.step, batches.num_steps)

    def _restore(self, state: Mapping[str, Any], step: int) -> None:
        self._totals |= {name: state[name] for name in self._totals}
        self._totals["resumed_at_steps"] = [*state["resumed_at_steps"], step]
        self._bad_steps.restore(state["bad"])
        self._throughput.restore(state["throughput"])
        if self._run.ranks.rank == 0:  # the checkpoint has sums over all ranks, and only rank 0 may add them
            self._meter.restore(state["meter"])

    def timed(self, steps: Iterable[list[PackedBatch]]) -> Iterator[list[PackedBatch]]:
        """Yield the micro-batches of each step, and count the time spent waiting for them."""
        for micro_batches in self._throughput.timed(steps):
            self._micro_batches = micro_batches
            yield micro_batches

    def micro_batch(self, batch: PackedBatch, output: LossOutput | DivergenceOutput) -> None:
        self._meter.add(batch, output)

    def step_end(self, run: RunContext, engine: Engine, stage: StageConfig) -> None:
        self._tokens += sum(batch.num_tokens for batch in self._micro_batches)
        self._throughput.count(self._micro_batches)
        if engine.step % run.config.log.every_steps == 0 or engine.step == self._num_steps:
            self._log(engine)

    def _log(self, engine: Engine) -> None:
        run = self._run
        record = self._record(engine)
        run.directory.write_metrics(record)
        run.loggers.log(record)
        self._bad_steps.mark_logged()
        run.console.log(engine.step, record)
        self._bad_steps.refuse_too_many()
        self._totals["all_tokens"] += record["tokens"]
        self._totals["all_supervised"] += record["supervised_tokens"]
        self._totals["seconds"] += record["seconds"]
        self._meter.reset()
        self._tokens, self._since = 0, time.perf_counter()

    def _record(self, engine: Engine) -> dict[str, Any]:
        """The metrics of the steps since the last record. A collective, and the only host sync of a step."""
        ranks = self._run.ranks
        sums = ranks.sum_tensor(self._meter.sums).cpu()
        (tokens,) = ranks.sum(self._tokens)
        skipped = self._bad_steps.read(engine)
        report = segment_report(sums)
        supervised = count_tokens(report)
        seconds = time.perf_counter() - self._since
        return {
            "stage": self._stage.name,
            "step": engine.step,
            "loss": weighted_loss(sums),
            "lr": engine.lr,
            "gradient_norm": self._bad_steps.last_norm,
            "skipped_steps": self._bad_steps.count,
            "segments": report,
            "tokens": int(tokens),
            "supervised_tokens": supervised,
            "seconds": seconds,
            "tokens_per_s": tokens / seconds,
            "supervised_tokens_per_s": supervised / seconds,
            **self._throughput.read(tokens, seconds),
            **({} if engine.loss_scale is None else {"loss_scale": engine.loss_scale}),
            **({"left_out": skipped} if skipped else {}),
        }

    def state(self, engine: Engine) -> dict[str, Any]:
        """The state to save in a checkpoint, as JSON values. A collective.

        With it, a resumed run writes the same records and ledger as one that was not stopped.
        """
        ranks = self._run.ranks
        self._bad_steps.read(engine)
        self._bad_steps.refuse_too_many()
        (tokens,) = ranks.sum(self._tokens)
        return {
            **self._totals,
            "tokens": int(tokens),
            "pending_s": time.perf_counter() - self._since,
            "meter": ranks.sum_tensor(self._meter.sums).tolist(),
            "bad": self._bad_steps.state(),
            "throughput": self._throughput.state(),
        }

    def totals(self) -> dict[str, Any]:
        """The stage's figures for the ledger. Call it once, after the last step."""
        self._run.console.end_stage()
        totals, seconds = self._totals, max(self._totals["seconds"], 1e-9)
        return {
            "train_s": totals["seconds"],
            "tokens_per_s": totals["all_tokens"] / seconds,
            "supervised_tokens_per_s": totals["all_supervised"] / seconds,
            **self._throughput.totals(seconds),
            "resumed_at_steps": totals["resumed_at_steps"],
            "skipped_steps": self._bad_steps.count,
            "left_out_steps": self._bad_steps.recorded,
        }
