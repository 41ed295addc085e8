"""What the training loop keeps account of: when to stop, when to save, and what to tell of each step."""

from __future__ import annotations

import bisect
import contextlib
import json
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from delib_fast.config import StageConfig

if TYPE_CHECKING:
    from delib_fast.data import PackedBatch, PackedBatches
    from delib_fast.engine import Engine, StepVerdict
    from delib_fast.losses import Meter
    from delib_fast.throughput import Throughput
    from delib_fast.train import Context


class Stopped(Exception):  # noqa: N818 (it is no error)
    """The run was asked to stop (Ctrl-C, SIGTERM) and has saved its state."""


class TrainingError(RuntimeError):
    """The run can't go on; says at which step and why."""


class LostRankError(TrainingError):
    """Another rank has ended, and this one can't go on. speaks: whether this rank is the one to say it."""

    def __init__(self, message: str, *, speaks: bool) -> None:
        super().__init__(message)
        self.speaks = speaks


class StopRequest:
    """Remembers SIGINT and SIGTERM, so that the run can save and end between two steps; a second SIGINT ends at once.

    Where there is nothing to save (`at_once`: data is read, no weights are trained) the first one ends it.
    """

    def __init__(self) -> None:
        self.asked = False
        self._doing: str | None = None

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

    @contextlib.contextmanager
    def at_once(self, doing: str) -> Iterator[None]:
        """Within this, a signal raises Stopped where it finds the program."""
        self._doing = doing
        try:
            self.check(doing)
            yield
        finally:
            self._doing = None

    def check(self, doing: str) -> None:
        if self.asked:
            raise Stopped(f"stopped while {doing}")

    def _remember(self, number: int, frame: Any) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        if self._doing is not None:
            raise Stopped(f"stopped while {self._doing}")


class Saver:
    """Decides when a checkpoint is due and has it written. Rank 0's clock decides for all."""

    def __init__(self, context: Context, engine: Engine, stage: StageConfig, log: StepLog) -> None:
        from delib_fast.engine import CheckpointWriter

        rules = context.config.checkpoint
        self._context, self._engine, self._stage, self._log = context, engine, stage, log
        self._saved_at, self._saved_step = time.monotonic(), engine.step
        self._writer = CheckpointWriter(
            context.run.checkpoints(stage.name),
            context.ranks,
            keep_last=rules.keep_last,
            keep_every=rules.keep_every_steps,
        )

    def asks(self) -> tuple[float, float, float, float]:
        """What this rank has to say between two steps, to be summed over the ranks and handed to `attend`."""
        return self._context.stop.asked, self._due(), self._writer.busy, self._writer.failed

    def attend(self, stop: float, due: float, busy: float, failed: float) -> None:
        """Between two steps: publish what is written, begin what is due. Raises Stopped after saving if a rank was
        asked to stop, CheckpointError if one could not write. A collective."""
        if failed:
            self._writer.raise_failure()
        if not busy:
            self._writer.advance()
        if stop:
            self.stop()
        if due:
            self.save()

    def save(self) -> None:
        extra = {
            "stage": self._stage.name,
            "data": self._context.corpus.fingerprint(self._stage),
            "log": self._log.state(self._engine),
        }
        self._context.run.sync_metrics()  # first: the checkpoint promises the lines before it
        self.finish()
        self._engine.save(self._writer, extra, self._context.watchdog.at)
        self._saved_at, self._saved_step = time.monotonic(), self._engine.step

    def stop(self) -> NoReturn:
        """Save what is not saved yet, and end the run."""
        if self._engine.step != self._saved_step:
            self.save()
        self.finish()
        raise Stopped(f"stopped after step {self._engine.step} of stage {self._stage.name!r}")

    def finish(self) -> None:
        """Wait until what was begun is on the disk. A collective."""
        with self._context.watchdog.may_take_long("waiting for a checkpoint to be on the disk"):
            self._writer.wait()

    def _due(self) -> bool:
        rules, step = self._context.config.checkpoint, self._engine.step
        if step == self._saved_step or self._context.ranks.rank != 0:
            return False
        minutes = (time.monotonic() - self._saved_at) / 60
        return bool(
            any(every and step % every == 0 for every in (rules.every_steps, rules.keep_every_steps))
            or (rules.every_minutes and minutes >= rules.every_minutes)
        )


class StepLog:
    """Counts tokens and time on the host, and writes a line of metrics where one is due.

    Args:
        tallies: what `state` gave when the checkpoint was written that the stage goes on from; None at its start.
    """

    def __init__(
        self,
        context: Context,
        stage: StageConfig,
        batches: PackedBatches,
        meter: Meter,
        speed: Throughput,
        *,
        first_step: int,
        tallies: Mapping[str, Any] | None,
    ) -> None:
        self._context, self._stage, self._meter, self._speed = context, stage, meter, speed
        self._tallies: dict[str, Any] = {
            "tokens": 0,
            "pending_s": 0.0,
            "all_tokens": 0,
            "all_supervised": 0,
            "seconds": 0.0,
            "resumed_at_steps": [],
        }
        self._bad = BadSteps(context, stage, batches)
        if tallies is not None:
            self._tallies |= {name: tallies[name] for name in self._tallies}
            self._tallies["resumed_at_steps"] = [*tallies["resumed_at_steps"], first_step]
            self._bad.restore(tallies["bad"])
            speed.restore(tallies["throughput"])
            if context.ranks.rank == 0:  # the sums over the ranks, of updates that no line has told yet
                meter.restore(tallies["meter"])
        self._tokens = self._tallies["tokens"] if context.ranks.rank == 0 else 0
        self._since = time.perf_counter() - self._tallies["pending_s"]
        context.reporter.stage(stage.name, first_step, batches.num_steps)

    def count(self, micro_batches: Sequence[Any]) -> None:
        self._tokens += sum(batch.num_tokens for batch in micro_batches)
        self._speed.count(micro_batches)

    def write(self, engine: Engine, lr: float) -> None:
        from delib_fast.losses import segment_report, tokens_of, weighted_loss

        ranks = self._context.ranks
        sums = ranks.sum_tensor(self._meter.sums).cpu()
        (tokens,) = ranks.sum(self._tokens)
        left_out = self._bad.read(engine)
        report = segment_report(sums)
        supervised = tokens_of(report)
        seconds = time.perf_counter() - self._since
        record = {
            "stage": self._stage.name,
            "step": engine.step,
            "loss": weighted_loss(sums),
            "lr": lr,
            "gradient_norm": self._bad.last_norm,
            "skipped_steps": self._bad.count,
            "segments": report,
            "tokens": int(tokens),
            "supervised_tokens": supervised,
            "seconds": seconds,
            "tokens_per_s": tokens / seconds,
            "supervised_tokens_per_s": supervised / seconds,
            **self._speed.read(tokens, seconds),
            **({} if engine.loss_scale is None else {"loss_scale": engine.loss_scale}),
            **({"left_out": left_out} if left_out else {}),
        }
        self._context.run.write_metrics(record)
        self._context.trackers.log(record)
        self._bad.written()
        self._context.reporter.update(engine.step, record)
        self._bad.refuse_too_many()
        self._tallies["all_tokens"] += int(tokens)
        self._tallies["all_supervised"] += supervised
        self._tallies["seconds"] += seconds
        self._meter.reset()
        self._tokens, self._since = 0, time.perf_counter()

    def state(self, engine: Engine) -> dict[str, Any]:
        """For a checkpoint: all that the lines of metrics and the ledger will need of the updates so far. A
        collective."""
        ranks = self._context.ranks
        self._bad.read(engine)
        self._bad.refuse_too_many()
        (tokens,) = ranks.sum(self._tokens)
        return {
            **self._tallies,
            "tokens": int(tokens),
            "pending_s": time.perf_counter() - self._since,
            "meter": ranks.sum_tensor(self._meter.sums).tolist(),
            "bad": self._bad.state(),
            "throughput": self._speed.state(),
        }

    def totals(self) -> dict[str, Any]:
        self._context.reporter.end_stage()
        tallies, seconds = self._tallies, max(self._tallies["seconds"], 1e-9)
        return {
            "train_s": tallies["seconds"],
            "tokens_per_s": tallies["all_tokens"] / seconds,
            "supervised_tokens_per_s": tallies["all_supervised"] / seconds,
            **self._speed.totals(seconds),
            "resumed_at_steps": tallies["resumed_at_steps"],
            "skipped_steps": self._bad.count,
            "left_out_steps": self._bad.told,
        }


class BadSteps:
    """Tells which updates the guard left out, with the rows to look at, and ends a run that has too many in a row."""

    _TOLD = 100  # so many are kept for the ledger; all are counted, and said

    def __init__(self, context: Context, stage: StageConfig, batches: PackedBatches) -> None:
        self._context, self._stage, self._batches = context, stage, batches
        self.count = self._in_a_row = 0
        self.told: list[dict[str, Any]] = []
        self.last_norm: float | None = None
        self._unwritten: list[dict[str, Any]] = []

    def state(self) -> dict[str, Any]:
        return {"count": self.count, "in_a_row": self._in_a_row, "told": self.told, "unwritten": self._unwritten}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.count, self._in_a_row = state["count"], state["in_a_row"]
        self.told, self._unwritten = list(state["told"]), list(state["unwritten"])

    def read(self, engine: Engine) -> list[dict[str, Any]]:
        """Fetch the guard's verdicts. Returns what the next line of metrics tells of updates that were left out. A
        collective."""
        verdicts, packs = engine.guard.read()
        for verdict in verdicts:
            self.last_norm = verdict.norm
            self.count += verdict.skipped
            bad = self._judge(verdict, packs.get(verdict.step, [])) if verdict.skipped else None
            self._in_a_row = self._in_a_row + 1 if bad else 0
            if bad:
                self._context.reporter.say(
                    f"{self._stage.name} step {bad['step']}: the update is left out: "
                    f"{bad['why']} (rows {_some(bad['rows'])})"
                )
                self._unwritten.append(bad)
                self.told = [*self.told, bad][: self._TOLD]
        return self._unwritten

    def written(self) -> None:
        """A line of metrics has told of them."""
        self._unwritten = []

    def refuse_too_many(self) -> None:
        limit = self._context.config.guard.max_bad_steps
        if self._in_a_row >= limit:
            raise TrainingError(
                f"stage {self._stage.name!r}: the last {self._in_a_row} updates were bad and left out (guard."
                f"max_bad_steps is {limit}); the last: {self.told[-1]['why']}. The weights are as before them, and so "
                f"is the last checkpoint. Look at rows {_some(self.told[-1]['rows'])}, or lower the learning rate"
            )

    def _judge(self, verdict: StepVerdict, packs: Sequence[tuple[int, int]]) -> dict[str, Any] | None:
        """Why an update was left out and which rows to look at; None if fp16 only lowered its loss scale."""
        batches = self._batches
        mine = [_example_at(batches.step(verdict.step)[pack], token) for pack, token in packs]
        ids = [int(i) for text in self._context.ranks.gather_texts(json.dumps(mine)) for i in json.loads(text)]
        if ids:
            why = "the loss is not finite"
        elif verdict.norm is not None:
            why = f"its gradient norm, {verdict.norm:.3g}, is a spike (the running mean is {verdict.mean_norm:.3g})"
        elif verdict.excused:
            return None
        else:
            why = "its gradient norm is not finite"
        rows = [batches.examples.places[i] for i in ids or batches.step_example_ids(verdict.step)]
        return {"step": verdict.step + 1, "why": why, "rows": rows[:64]}


def _example_at(batch: PackedBatch, token: int) -> int:
    """The example that a token of a pack belongs to (of a shared prompt, the first that continues it)."""
    if batch.part is not None:  # the token is counted from the start of this rank's part
        token += batch.part.rank * batch.input_ids.numel()
    run = bisect.bisect_right(batch.cu_seqlens_host, token) - 1
    return next(i for i in batch.example_ids[run:] if i >= 0)


def _some(places: Sequence[str], most: int = 8) -> str:
    more = f" and {len(places) - most} more" if len(places) > most else ""
    return ", ".join(places[:most]) + more
