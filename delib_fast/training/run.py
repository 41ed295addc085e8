"""A run: every stage of a configuration, one after another.

Modules that import torch, transformers or DeepSpeed are imported inside functions, because `run` sets a variable that
DeepSpeed reads on import, and because `delib_fast.stages` needs this module only to describe a run.
"""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delib_fast.config import Config, ConfigError, StageConfig
from delib_fast.training.artifacts import (
    StageInputs,
    build_stage_model,
    check_inputs,
    export,
    exported_by,
    stage_inputs,
)
from delib_fast.training.checkpointing import refuse_foreign_checkpoint
from delib_fast.training.console import ConsoleLogger
from delib_fast.training.context import RunContext
from delib_fast.training.distillation import describe_teacher
from delib_fast.training.errors import LostRankError, Stopped
from delib_fast.training.loggers import Loggers, refuse_missing_loggers
from delib_fast.training.memory import (
    MemoryBudget,
    check_fits,
    describe_checkpointing,
    resolve_activation_checkpointing,
)
from delib_fast.training.metrics_file import NO_LINES
from delib_fast.training.run_directory import RunDirectory
from delib_fast.training.signals import StopRequest
from delib_fast.training.teacher_model import build_teacher, teacher_model
from delib_fast.training.watchdog import Watchdog

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from delib_fast.checkpoint.format import Checkpoint
    from delib_fast.engine import Engine, Ranks
    from delib_fast.engine.rendezvous import Rendezvous
    from delib_fast.models import TrainableLM
    from delib_fast.training.agreement import Facts
    from delib_fast.training.callbacks import Callback


@dataclass(frozen=True)
class RunResult:
    """The result of a run: its folder, the exported model, and the content of ledger.json."""

    run_dir: Path
    model: Path
    ledger: dict[str, Any]
    stop_requested: bool = False
    """Whether a stop was requested after the last step, when the run finished instead."""


def run(config: Config, callbacks: Sequence[Callback] = ()) -> RunResult:
    """Run every stage of a configuration that is not finished yet, and print the tables of the whole run.

    Args:
        callbacks: called on every rank after each micro-batch and each step; see `training.callbacks.Callback`.
    Raises:
        ConfigError, DataError, LeakError: the configuration, the rows or the model cannot be used; raised before
            anything is trained.
        RanksDifferError: the ranks have another configuration, other files, packages or another environment.
        PeerError: another rank failed or ended before the first step.
        TrainingError, CheckpointError: the run cannot continue.
        Stopped: a stop was requested, and the state has been saved.
    """
    if config.engine.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported
    from delib_fast.engine import Ranks
    from delib_fast.engine.ranks import choose_device
    from delib_fast.engine.rendezvous import Rendezvous
    from delib_fast.training.agreement import compare_directories, refuse_differences, start_facts
    from delib_fast.training.dataset import RunDataset

    meeting = Rendezvous.current()
    device = meeting.raise_together(partial(_check_machine, config, choose_device))
    if meeting.world_size > 1:
        refuse_differences(meeting, start_facts(config, device))
    is_main = meeting.rank == 0
    directory, console = RunDirectory(config.run_dir, writes=is_main), ConsoleLogger(enabled=is_main)
    loggers: Loggers | None = None
    try:
        for opens_now in (is_main, not is_main):  # rank 0 creates the files that the other ranks read
            meeting.raise_together(partial(directory.open, config) if opens_now else lambda: None)
        if meeting.world_size > 1:
            compare_directories(meeting, directory, config)
        loggers = Loggers(config, directory.path, enabled=is_main, warn=console.print)
        watchdog = Watchdog(directory.heartbeats, meeting.rank, meeting.processes, config.guard.hang_timeout_s)
        with watchdog.running(), raise_lost_ranks(watchdog, meeting):
            meeting.watch(watchdog.waiting)
            watchdog.at("connecting to the other ranks")
            ranks = Ranks(config.engine.device, config.engine.sequence_parallel)
            ranks.heartbeat, ranks.local_work = watchdog.at, watchdog.local_work
            config = resolve_precision(config, ranks)
            dataset, stop = RunDataset(config, directory.tokenizer, ranks), StopRequest()
            context = RunContext(config, ranks, directory, console, dataset, stop, loggers, watchdog)
            with stop.listening():
                run_stages(context, callbacks)
        model = directory.exported(config.stages[-1].name, last=True)
        console.print_tables(directory.ledger, [("run directory", str(directory.path)), ("model", str(model))])
        return RunResult(directory.path, model, directory.ledger, stop.requested)
    finally:
        if loggers is not None:
            loggers.close()
        directory.close()


def _check_machine(config: Config, choose_device: Callable[[str], torch.device]) -> torch.device:
    """The device of this rank. Raises ConfigError if it, or a library that the configuration needs, does not exist."""
    refuse_missing_loggers(config)
    return choose_device(config.engine.device)


@contextlib.contextmanager
def raise_lost_ranks(watchdog: Watchdog, meeting: Rendezvous) -> Iterator[None]:
    """Raise LostRankError, with the lost rank and its position, if a collective fails because a rank has ended."""
    try:
        yield
    except RuntimeError as error:
        if type(error).__module__.startswith("delib_fast") or error is meeting.own_error:
            raise
        lost, reports = watchdog.lost_ranks()
        if not lost:
            raise
        raise LostRankError(
            f"{'; '.join(lost)}. The output of that rank has the reason; the same command resumes from the last "
            "checkpoint",
            reports=reports,
        ) from error


def run_stages(run: RunContext, callbacks: Sequence[Callback] = ()) -> None:
    """Run every stage that is not finished yet. Raises Stopped if a stop is requested."""
    stages = run.config.stages
    finished = {entry["name"]: entry for entry in run.directory.ledger["stages"] if entry["status"] == "finished"}
    with run.stop.raise_immediately("reading the data"):
        check_inputs(run)
        for stage in stages:
            teacher_model(run, stage)
        prepare(run, [stage for stage in stages if stage.name not in finished])
    for index, stage in enumerate(stages):
        if stage.name in finished:
            run.console.print(f"{stage.name}: already finished ({finished[stage.name]['steps']} steps)")
            continue
        if any(run.ranks.sum(run.stop.requested)):
            raise Stopped(f"stopped before stage {stage.name!r}")
        run_stage(run, index, callbacks)
    if stages[-1].name in finished:
        exported_by(run, len(stages) - 1, "model")


def prepare(run: RunContext, stages: Sequence[StageConfig]) -> None:
    """Read, encode and pack every stage before the first one trains, so that errors in later stages are found now.

    A collective through the rendezvous: an error on one rank is raised on all of them, and ranks that have read other
    data, or would make another number of steps, are refused.
    """
    from delib_fast.engine.deepspeed_json import deepspeed_json
    from delib_fast.training.agreement import refuse_differences, source_facts

    meeting, dataset = run.ranks.rendezvous, run.dataset

    def together(activity: str, work: Callable[[], None]) -> None:
        def local() -> None:
            with run.watchdog.local_work(activity):
                work()

        meeting.raise_together(local, kinds=(Stopped,))

    def read_sources() -> None:
        for stage in stages:
            deepspeed_json(run.config, stage, run.ranks.world_size)
        for name in dataset.source_names if stages else ():
            dataset.source(name)

    together("reading the data", read_sources)
    if meeting.world_size > 1 and stages:
        refuse_differences(meeting, source_facts(run, dataset.source_names))
    if stages:
        together("training the tokenizer", dataset.train_tokenizer if run.ranks.rank == 0 else lambda: None)
    together("encoding the data", partial(check_stages, run, stages))
    if meeting.world_size > 1:
        compare_stages(run, stages)


def check_stages(run: RunContext, stages: Sequence[StageConfig]) -> None:
    """Encode and pack the data of stages, check their documents, and estimate their memory."""
    for stage in stages:
        run.dataset.batches(stage)
        run.dataset.corpus(stage)
        check_fits(run.config, stage, run.dataset.stage_shape(stage), memory_budget(run))


def compare_stages(run: RunContext, stages: Sequence[StageConfig]) -> None:
    """Refuse ranks that would train stages differently. A collective. Raises RanksDifferError."""
    from delib_fast.training.agreement import refuse_differences, stage_facts

    def collect() -> Facts:
        with run.watchdog.local_work("comparing the ranks"):
            settings: dict[str, str] = {"engine.precision (resolved)": run.config.engine.precision}
            for stage in stages:
                found = resolve_activation_checkpointing(
                    run.config, stage, run.dataset.stage_shape(stage), memory_budget(run)
                )
                settings[f"stages.{stage.name}: activation checkpointing"] = describe_checkpointing(found)
            return stage_facts(run, stages, settings)

    meeting = run.ranks.rendezvous
    refuse_differences(meeting, meeting.raise_together(collect, kinds=(Stopped,)))


def run_stage(run: RunContext, index: int, callbacks: Sequence[Callback] = ()) -> None:
    """Prepare, train and export one stage, starting from the model that the previous stage exported."""
    from delib_fast.data.corpus import monitoring_warning
    from delib_fast.training.loop import evaluate, train_stage

    stage = run.config.stages[index]
    inputs = replace(stage_inputs(run, index), teacher=teacher_model(run, stage))
    config = resolve_activation_checkpointing(run.config, stage, run.dataset.stage_shape(stage), memory_budget(run))
    run.console.print(f"{stage.name}: {run.dataset.describe(stage)}")
    if warning := monitoring_warning(run.dataset.corpus(stage)):
        run.console.print(f"{stage.name}: {warning}")
    engine = build_engine(run, config, stage, inputs)
    checkpoint = resume(run, engine, index, inputs)
    if index == 0:
        evaluate(run, engine, "start")
    entry = stage_entry(run, config, stage, inputs, engine)
    run.directory.record_stage(entry)
    before = [run.directory.stage(other.name) or {} for other in config.stages[:index]]
    run.loggers.begin_stage(sum(other["steps"] for other in before), engine.step)
    began = time.perf_counter()
    figures, checkpointer = train_stage(
        run, engine, stage, callbacks, checkpoint.trainer["log"] if checkpoint else None
    )
    entry |= {**figures, "wall_s": time.perf_counter() - began}
    evaluate(run, engine, f"after {stage.name}", checkpointer)
    exported = export(run, engine, index, inputs)
    metrics = run.directory.sync_metrics()
    run.directory.record_stage(entry | exported | {"status": "finished", "metrics": metrics})
    engine.close()


_ZERO_3 = (
    "ZeRO 3 gathers weights whenever a layer runs, so every rank must run each layer the same number of times: set "
    "engine.zero_stage to 2"
)


def build_engine(run: RunContext, config: Config, stage: StageConfig, inputs: StageInputs) -> Engine:
    """The stage's model under DeepSpeed, checked for leaks between packed documents in the precision of the run."""
    from delib_fast.engine import Engine
    from delib_fast.models import TrainableLM, check_isolation, check_layers

    ranks, batches = run.ranks, run.dataset.batches(stage)

    def build() -> tuple[TrainableLM, dict[str, Tensor]]:
        with run.watchdog.local_work("loading the model"):
            model, exact_weights = build_stage_model(run, inputs, config)
            check_layers(config.model.layers, ranks.device)
            options: dict[str, Any] = {
                "attention_backend": config.model.attention,
                "loss_backend": config.model.loss,
                "sequence_group": ranks.sequence_group,
                "layers": config.model.layers,
                "device": ranks.device,
            }
            in_one_pass = _ZERO_3 if config.engine.zero_stage == 3 else None
            teacher = build_teacher(run, config, stage, **options)
            module = TrainableLM(model, **options, in_one_pass=in_one_pass, teacher=teacher)
            module.head.chunk_tokens = memory_budget(run).chunk_tokens
            return module, exact_weights

    module, exact_weights = ranks.raise_together(build)
    if module.separation.note is not None:
        run.console.print(f"{stage.name}: {module.separation.note}")
    if config.model.layers == "auto" and ranks.device.type == "cuda":
        run.console.print(f"{stage.name}: layers run {module.layers}: {module.layers_reason}")
    engine = Engine(module, config, stage, batches.num_steps, ranks)
    engine.state.set_weights(exact_weights)
    other = module.teacher.model if module.teacher is not None else None
    shares_prompts = batches.shares_prompts or (isinstance(other, str) and batches.teacher_shares)
    check_isolation(engine.wrapped, ranks.device, shares_prompts=shares_prompts)
    if isinstance(other, TrainableLM):
        check_isolation(other, ranks.device, shares_prompts=batches.teacher_shares)
    return engine


def resume(run: RunContext, engine: Engine, index: int, inputs: StageInputs) -> Checkpoint | None:
    """Load the stage's newest checkpoint, if there is one, and delete the metrics records of later steps.

    Raises:
        ConfigError: another configuration, other data or other parent weights wrote the checkpoint.
        CheckpointError: there are checkpoints, but none is intact; or another model wrote it.
    """
    stage, warn = run.config.stages[index], run.console.print
    checkpoint = engine.resume(
        run.directory.checkpoints(stage.name), warn, partial(refuse_foreign_checkpoint, run, stage, inputs)
    )
    before = run.directory.stage(run.config.stages[index - 1].name) if index else None
    promise = checkpoint.trainer["metrics"] if checkpoint else before["metrics"] if before else NO_LINES
    if checkpoint is not None:
        steps = run.dataset.batches(stage).num_steps
        run.console.print(f"{stage.name}: resuming from step {checkpoint.step} of {steps}")
    run.directory.rewind_metrics(promise, stage.name, engine.step, warn)
    return checkpoint


def stage_entry(
    run: RunContext, config: Config, stage: StageConfig, inputs: StageInputs, engine: Engine
) -> dict[str, Any]:
    """The stage's ledger entry as it is when training begins."""
    return {
        "name": stage.name,
        "kind": stage.kind,
        "status": "running",
        **inputs.describe(),
        **run.dataset.ledger(stage),
        **describe_teacher(stage),
        "steps": run.dataset.batches(stage).num_steps,
        "ranks": run.ranks.world_size,
        "sequence_parallel": run.ranks.sequence_parallel,
        "zero_stage": config.engine.zero_stage,
        "precision": config.engine.precision,
        "activation_checkpointing": describe_checkpointing(config),
        "trained_parameters": engine.trained_parameters,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that affect a run's numbers."""
    names = ("delib-fast", "torch", "deepspeed", "transformers", "peft")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def memory_budget(run: RunContext) -> MemoryBudget:
    """The memory budget of a rank: `engine.memory_gib`, else the memory of its GPU."""
    engine, ranks = run.config.engine, run.ranks
    limit = ranks.memory_gib if engine.memory_gib is None else engine.memory_gib or None
    return MemoryBudget(ranks.world_size, engine.precision, limit, gpu=ranks.device.type == "cuda")


def resolve_precision(config: Config, ranks: Ranks) -> Config:
    """The configuration with `engine.precision: auto` replaced by what the device computes natively."""
    from delib_fast.models.precision import native_precision

    if config.engine.precision == "fp16" and ranks.device.type == "cpu":
        raise ConfigError("engine.precision: fp16 needs a GPU; on a CPU set bf16 or fp32")
    if config.engine.precision != "auto":
        return config
    engine = config.engine.model_copy(update={"precision": native_precision(ranks.device)})
    return config.model_copy(update={"engine": engine})
