"""The training loop of a stage, and the evaluation on held-out rows before and after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from delib_fast.data import loss_normalizer
from delib_fast.training.callbacks import Callback, CallbackList
from delib_fast.training.checkpointing import Checkpointer
from delib_fast.training.errors import Stopped
from delib_fast.training.held_out import RowMeter, append_rows, describe_rows, opening_of, segments_of
from delib_fast.training.step_log import StepLog

if TYPE_CHECKING:
    from delib_fast.config import StageConfig
    from delib_fast.engine import Engine
    from delib_fast.training.context import RunContext


def train_stage(
    run: RunContext,
    engine: Engine,
    stage: StageConfig,
    callbacks: Sequence[Callback] = (),
    log_state: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], Checkpointer]:
    """Train from the engine's step to the last step of the stage.

    Args:
        callbacks: the user's callbacks, which are called after the step log.
        log_state: what `StepLog.state` returned, from the checkpoint that the stage resumes from; None if it starts.
    Returns:
        The stage's figures for the ledger; and the checkpointer, with which `evaluate` can stop after the last step.
    Raises:
        Stopped: a stop was requested; a checkpoint has been saved.
        TrainingError, CheckpointError: a step cannot be made, or a checkpoint cannot be written.
    """
    batches = run.dataset.batches(stage)
    log = StepLog(run, engine, stage, batches, log_state)
    checkpointer = Checkpointer(run, engine, stage, log)
    hooks = CallbackList(run, engine, stage, log, callbacks)
    for micro_batches in log.timed(batches.from_step(engine.step, pin=engine.device.type == "cuda")):
        poll = checkpointer.poll(loss_normalizer(micro_batches))  # the step's only collective over host numbers
        checkpointer.apply(poll)  # publishes, saves, or raises Stopped
        engine.train_step(micro_batches, poll.normalizer, hooks.micro_batch)
        hooks.step_end()
    checkpointer.finish()
    return log.totals(), checkpointer


def evaluate(run: RunContext, engine: Engine, moment: str, checkpointer: Checkpointer | None = None) -> None:
    """Record the held-out losses of every evaluation set, unless `moment` is already recorded.

    The ledger gets the nll by segment, and log p of the opening of the think block; held_out.jsonl gets them by row.

    Args:
        moment: the key in the ledger, e.g. "start" or "after msm".
        checkpointer: saves the last step if a stop is requested; None before the first step.
    Raises:
        Stopped: a stop was requested.
    """
    if run.directory.evaluation(moment) is not None:
        return
    segments: dict[str, Any] = {}
    by_row: dict[str, Any] = {}
    opening: dict[str, float] | None = None
    with run.watchdog.local_work("encoding held-out rows"):
        sets = list(run.dataset.evaluation())
    for evaluated in sets:
        meter = RowMeter(engine.device, evaluated)
        for batch in evaluated.batches:
            run.ranks.heartbeat(f"evaluation, {moment}")
            if any(run.ranks.sum(run.stop.requested)):
                if checkpointer is not None:
                    checkpointer.stop()
                raise Stopped(f"stopped while evaluating ({moment})")
            on_device = batch.to(engine.device)
            meter.add(on_device, engine.evaluate(on_device))
        sums = run.ranks.sum_tensor(meter.sums).cpu()
        segments |= {evaluated.prefix + name: part for name, part in segments_of(sums).items()}
        opening = opening or opening_of(sums)
        by_row[evaluated.prefix] = {"key": evaluated.key, "segments": describe_rows(sums)}
    if by_row and run.ranks.rank == 0:
        append_rows(run.directory.path, moment, by_row)
    run.directory.record_evaluation(moment, segments, opening)
