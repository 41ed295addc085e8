"""When a checkpoint is due, what it contains, and how a run stops between two steps."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from delib_fast.checkpoint.format import Checkpoint, CheckpointError
from delib_fast.checkpoint.writer import CheckpointWriter
from delib_fast.config import ConfigError
from delib_fast.config.load import plain_config
from delib_fast.training.errors import Stopped
from delib_fast.training.run_directory import config_differences

if TYPE_CHECKING:
    from delib_fast.config import StageConfig
    from delib_fast.engine import Engine
    from delib_fast.training.artifacts import StageInputs
    from delib_fast.training.context import RunContext
    from delib_fast.training.step_log import StepLog


def refuse_foreign_checkpoint(run: RunContext, stage: StageConfig, inputs: StageInputs, checkpoint: Checkpoint) -> None:
    """Raise ConfigError unless this run wrote the checkpoint: this stage, configuration, data and parent weights."""
    folder, saved = checkpoint.folder, checkpoint.trainer
    if missing := [name for name in ("stage", "config", "inputs", "data", "log", "metrics") if name not in saved]:
        raise CheckpointError(f"{folder}: trainer.json has no {missing[0]!r}, so it is not a checkpoint of a run")
    if saved["stage"] != stage.name:
        raise ConfigError(
            f"{folder} is a checkpoint of stage {saved['stage']!r}, not of {stage.name!r}; move it to where it belongs"
        )
    if lines := config_differences(saved["config"], run.config):
        raise ConfigError(
            "\n".join(
                [
                    f"{folder} was written by a run with another configuration; restore the configuration, or give "
                    "another run_dir:",
                    *lines,
                ]
            )
        )
    if saved["data"] != run.dataset.fingerprint(stage):
        raise ConfigError(
            f"the data of stage {stage.name!r} changed since {folder} was written; put the "
            "old files back, or give another run_dir"
        )
    for name, now in inputs.describe().items():
        before = saved["inputs"].get(name)
        if before is None or before["sha256"] != now["sha256"]:
            raise ConfigError(
                f"{now['path']} is no longer the {'model' if name == 'parent' else 'base model'} from which stage "
                f"{stage.name!r} began: its weights changed since {folder} was written; restore them, or give another "
                "run_dir"
            )


@dataclass(frozen=True)
class StepPoll:
    """What the ranks agree on before a step. Each number is a sum over the ranks, and the same on all of them."""

    normalizer: float
    """Σ loss weights of the step, by which its loss is divided."""
    stop_requested: float
    """How many ranks received a signal to stop."""
    save_due: float
    """1 if a checkpoint is due (only rank 0 decides), else 0."""
    writer_busy: float
    """How many ranks are still writing their shard of the last checkpoint."""
    writer_failed: float
    """How many ranks failed to write their shard."""


class Checkpointer:
    """Decides when a checkpoint is due and starts writing it. The clock of rank 0 decides for all ranks."""

    def __init__(self, run: RunContext, engine: Engine, stage: StageConfig, log: StepLog) -> None:
        self._run, self._engine, self._stage, self._log = run, engine, stage, log
        self._saved_at, self._saved_step = time.monotonic(), engine.step
        settings = run.config.checkpoint
        self._writer = CheckpointWriter(
            run.directory.checkpoints(stage.name),
            run.ranks,
            keep_last=settings.keep_last,
            keep_every=settings.keep_every_steps,
        )

    def poll(self, normalizer: float) -> StepPoll:
        """Sum the loss normalizer and the requests of this rank over all ranks. A collective.

        Args:
            normalizer: Σ loss weights of this rank's micro-batches.
        """
        run, writer = self._run, self._writer
        run.ranks.heartbeat(f"{self._stage.name} step {self._engine.step + 1}: waiting for the other ranks")
        poll = StepPoll(*run.ranks.sum(normalizer, run.stop.requested, self._due(), writer.busy, writer.failed))
        assert poll.normalizer > 0, "RunDataset.batches refuses a step without a supervised token"
        return poll

    def apply(self, poll: StepPoll) -> None:
        """Publish a checkpoint whose shards are all written, begin one that is due, or stop. A collective.

        Raises:
            Stopped: a stop was requested on any rank; a checkpoint has been saved.
            CheckpointError: a rank failed to write its shard.
        """
        if poll.writer_failed:
            self._writer.raise_failure()
        if not poll.writer_busy:
            self._writer.advance()
        if poll.stop_requested:
            self.stop()
        if poll.save_due:
            self.save()

    def save(self) -> None:
        """Begin to write a checkpoint of the engine's step. A collective."""
        entry = self._run.directory.stage(self._stage.name) or {}
        extra = {
            "stage": self._stage.name,
            "config": plain_config(self._run.config),
            "inputs": {name: entry[name] for name in ("parent", "base", "teacher_model") if name in entry},
            "data": self._run.dataset.fingerprint(self._stage),
            "log": self._log.state(self._engine),
            "metrics": self._run.directory.sync_metrics(),  # before the checkpoint, which promises these records
        }
        self.finish()
        self._engine.save(self._writer, extra)
        self._saved_at, self._saved_step = time.monotonic(), self._engine.step

    def stop(self) -> NoReturn:
        """Save a checkpoint, unless the current step is already saved, and raise Stopped. A collective."""
        if self._engine.step != self._saved_step:
            self.save()
        self.finish()
        raise Stopped(f"stopped after step {self._engine.step} of stage {self._stage.name!r}")

    def finish(self) -> None:
        """Wait until the checkpoint that is being written is on disk. A collective."""
        self._writer.wait()

    def _due(self) -> bool:
        """Whether rank 0 wants a checkpoint of the current step; False on other ranks."""
        settings, step = self._run.config.checkpoint, self._engine.step
        if step == self._saved_step or self._run.ranks.rank != 0:
            return False
        minutes = (time.monotonic() - self._saved_at) / 60
        return bool(
            any(every and step % every == 0 for every in (settings.every_steps, settings.keep_every_steps))
            or (settings.every_minutes and minutes >= settings.every_minutes)
        )
