"""Train: `deepspeed delib_fast/train.py --config run.yaml [--set a.b=c ...]`.

The same file runs under `deepspeed --module delib_fast.train`, `torchrun`, `srun` and plain
`python -m delib_fast.train`. The loop is `train_stage`; what is around it prepares a stage and hands its
weights on to the next.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__" and sys.path and os.path.basename(sys.path[0]) == "delib_fast":
    # Run as a script, Python puts this file's folder first on the path, where `data`, `models` or `stages`
    # would shadow other packages of those names.
    sys.path[0] = os.path.dirname(os.path.abspath(sys.path[0]))

# Threads of libgomp spin for milliseconds at the end of each parallel loop. On a machine that has other work they
# spin on the cores that the slowest thread waits for: 3 to 5 times fewer tokens/s were measured. It is read once,
# when torch loads the library.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import argparse
import contextlib
import errno
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delib_fast.bookkeeping import LostRankError, Saver, StepLog, Stopped, StopRequest, TrainingError
from delib_fast.config import Config, ConfigError, StageConfig
from delib_fast.config_file import load_config, without_secrets
from delib_fast.handover import build_stage_model, export, exported_by, start_of, together
from delib_fast.memory import Room, check_fits, decided
from delib_fast.slurm import adopt_slurm

if TYPE_CHECKING:
    from delib_fast.corpus import Corpus
    from delib_fast.engine import Engine, Ranks, Watchdog
    from delib_fast.progress import Reporter
    from delib_fast.run_directory import RunDirectory
    from delib_fast.trackers import Trackers

    Watch = Callable[["Context", Engine, StageConfig], None]


@dataclass(frozen=True)
class RunResult:
    """What a run made: its folder, its exported model, and the ledger as in ledger.json."""

    run_dir: Path
    model: Path
    ledger: dict[str, Any]


@dataclass(frozen=True)
class Context:
    """What every stage of a run shares."""

    config: Config
    ranks: Ranks
    run: RunDirectory
    reporter: Reporter
    corpus: Corpus
    stop: StopRequest
    trackers: Trackers
    watchdog: Watchdog
    watch: Watch | None = None
    """called between two updates: see `run`"""


# --- one stage ----------------------------------------------------------------------------------------------


def train_stage(
    context: Context, engine: Engine, stage: StageConfig, tallies: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], Saver]:
    """The training loop: from the engine's step to the stage's last. tallies: those of the checkpoint it goes on from.

    Returns what the ledger keeps of it, and the saver, for what comes after the last step.
    Raises:
        Stopped: after saving a checkpoint, when the run was asked to stop.
        TrainingError, CheckpointError: a step can't be made, a checkpoint can't be written.
    """
    from delib_fast.losses import Meter, loss_normalizer
    from delib_fast.throughput import Throughput

    ranks, batches = context.ranks, context.corpus.batches(stage)
    meter, speed = Meter(engine.device), Throughput.of(engine, stage)
    log = StepLog(context, stage, batches, meter, speed, first_step=engine.step, tallies=tallies)
    saver = Saver(context, engine, stage, log)
    for micro_batches in speed.waiting_for(batches.from_step(engine.step, pin=engine.device.type == "cuda")):
        place = f"{stage.name} step {engine.step + 1}"
        context.watchdog.at(f"{place}: hearing the other ranks")
        normalizer, *asked = ranks.sum(loss_normalizer(micro_batches), *saver.asks())
        saver.attend(*asked)
        assert normalizer > 0, "Corpus.batches refuses a step without a supervised token"
        lr = engine.begin_step()
        for number, micro_batch in enumerate(micro_batches, 1):
            context.watchdog.at(f"{place}: forward of micro-batch {number}")
            batch = micro_batch.to(engine.device)
            output = engine.forward(batch)
            context.watchdog.at(f"{place}: backward of micro-batch {number}")
            engine.backward(output.loss_sum, normalizer)
            meter.add(batch, output)
        context.watchdog.at(f"{place}: after the update")
        engine.end_step()
        log.count(micro_batches)
        if engine.step % context.config.log.every_steps == 0 or engine.step == batches.num_steps:
            log.write(engine, lr)
        if context.watch is not None:
            with context.watchdog.may_take_long("watching"):
                context.watch(context, engine, stage)
    saver.finish()
    return log.totals(), saver


def evaluate(context: Context, engine: Engine, moment: str, saver: Saver | None = None) -> None:
    """Held-out nll by segment over every evaluation set of the run, into the ledger under `moment`.

    Raises Stopped, after saving what the saver has not saved yet, when the run was asked to stop.
    """
    from delib_fast.losses import Meter, segment_report

    if context.run.evaluation(moment) is not None:
        return
    segments: dict[str, Any] = {}
    for prefix, batches in context.corpus.evaluation(context.ranks):
        meter = Meter(engine.device)
        for batch in batches:
            context.watchdog.at(f"evaluation, {moment}")
            if any(context.ranks.sum(context.stop.asked)):
                if saver is not None:
                    saver.stop()
                raise Stopped(f"stopped while evaluating ({moment})")
            on_device = batch.to(engine.device)
            meter.add(on_device, engine.evaluate(on_device))
        report = segment_report(context.ranks.sum_tensor(meter.sums).cpu())
        segments |= {prefix + name: part for name, part in report.items()}
    context.run.record_evaluation(moment, segments)


def run_stage(context: Context, index: int) -> None:
    """Prepare, train and export one stage, from the model the one before it exported."""
    from delib_fast.engine import Engine
    from delib_fast.models import TrainableLM, check_isolation, resolve_layers

    config, ranks, run = context.config, context.ranks, context.run
    stage = config.stages[index]
    start = start_of(context, index)
    config = decided(config, stage, context.corpus.shape, room_of(context))
    batches = context.corpus.batches(stage)
    context.reporter.say(f"{stage.name}: {context.corpus.describe(stage)}")
    with context.watchdog.may_take_long("loading the model"):
        model, exact_weights = build_stage_model(context, start, config)
    module = together(
        ranks,
        lambda: TrainableLM(
            model,
            attention_backend=config.model.attention,
            loss_backend=config.model.loss,
            sequence_group=ranks.sequence_group,
            layers=resolve_layers(config.model.layers, ranks.device, config.engine.zero_stage),
        ),
    )
    engine = Engine(module, config, stage, batches.num_steps, ranks)
    if engine.note is not None:
        context.reporter.say(f"{stage.name}: {engine.note}")
    engine.state.set_weights(exact_weights)
    # as it will train: in its precision, on its backend
    check_isolation(engine.wrapped, ranks.device, shares_prompts=batches.shares_prompts)
    root = run.checkpoints(stage.name)
    with context.watchdog.may_take_long("reading a checkpoint"):
        found = engine.resume(root, context.reporter.say)
    if found is not None:
        if found.trainer["data"] != context.corpus.fingerprint(stage):
            raise ConfigError(
                f"the data of stage {stage.name!r} changed since {found.folder} was written; put the "
                "old files back, or give another run_dir"
            )
        context.reporter.say(f"{stage.name}: going on from step {found.step} of {batches.num_steps}")
    run.rewind_metrics(stage.name, engine.step)
    if index == 0:
        evaluate(context, engine, "start")
    entry = {
        "name": stage.name,
        "kind": stage.kind,
        "status": "running",
        **start.describe(),
        **context.corpus.ledger(stage),
        "updates": batches.num_steps,
        "ranks": ranks.world_size,
        "sequence_parallel": ranks.sequence_parallel,
        "zero_stage": config.engine.zero_stage,
        "precision": config.engine.precision,
        "activation_checkpointing": config.model.activation_checkpointing,
        "trained_parameters": engine.trained_parameters,
        "versions": versions(),
    }
    run.record_stage(entry)
    before = [run.stage(other.name) or {} for other in config.stages[:index]]
    context.trackers.begin_stage(sum(other["updates"] for other in before), engine.step)
    began = time.perf_counter()
    figures, saver = train_stage(context, engine, stage, found.trainer["log"] if found is not None else None)
    entry |= {**figures, "wall_s": time.perf_counter() - began}
    evaluate(context, engine, f"after {stage.name}", saver)
    with context.watchdog.may_take_long("exporting the model"):
        made = export(context, engine, module, index, start)
    run.record_stage(entry | made | {"status": "finished"})
    engine.close()


def versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("delib-fast", "torch", "deepspeed", "transformers", "peft")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


# --- the run ------------------------------------------------------------------------------------------------


def run(config: Config, watch: Watch | None = None) -> RunResult:
    """Run every stage of a configuration that is not finished yet, and print the table of the whole.

    Args:
        watch: called after every update on every rank, with the run's context, its engine and the stage; it must leave
            weights and random numbers as they are (`delib_fast.evals.InLoop` does).
    Raises:
        ConfigError, DataError, LeakError: what the user gave can't be run; said before anything is trained.
        TrainingError, CheckpointError: the run can't go on. Stopped: it was asked to stop and has saved.
    """
    if config.engine.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported
    from delib_fast.corpus import Corpus
    from delib_fast.engine import Ranks, Watchdog
    from delib_fast.progress import Reporter
    from delib_fast.run_directory import RunDirectory
    from delib_fast.trackers import Trackers, refuse_missing_trackers

    refuse_missing_trackers(config)
    ranks = Ranks(config.engine.device, config.engine.sequence_parallel)
    config = with_precision(config, ranks)
    first = ranks.rank == 0
    directory, reporter = RunDirectory(config.run_dir, writes=first), Reporter(speaks=first)
    trackers = Trackers(config, directory.path, speaks=first, complain=reporter.say)
    try:
        for mine in (first, not first):  # the first rank makes what the others find
            together(ranks, partial(directory.open, config) if mine else lambda: None)
        stop = StopRequest()
        watchdog = Watchdog(directory.ranks, ranks.rank, ranks.world_size, config.guard.hang_timeout_s)
        corpus = Corpus(config, directory, ranks)
        context = Context(config, ranks, directory, reporter, corpus, stop, trackers, watchdog, watch)
        with stop.listening(), watchdog.watching(), naming_lost_ranks(watchdog):
            run_stages(context)
        model = directory.exported(config.stages[-1].name, last=True)
        reporter.table(directory.ledger, [("run directory", str(directory.path)), ("model", str(model))])
        return RunResult(directory.path, model, directory.ledger)
    finally:
        trackers.close()
        directory.close()


@contextlib.contextmanager
def naming_lost_ranks(watchdog: Watchdog) -> Iterator[None]:
    """A collective that broke because another rank ended says "connection closed": say which rank, and where."""
    try:
        yield
    except RuntimeError as error:
        if type(error).__module__.startswith("delib_fast"):
            raise
        lost, speaks = watchdog.lost()
        if not lost:
            raise
        raise LostRankError(
            f"{'; '.join(lost)}. Its own output says why; the same command goes on from the last checkpoint",
            speaks=speaks,
        ) from error


def run_stages(context: Context) -> None:
    """Every stage that is not finished yet. Raises Stopped where the run was asked to stop."""
    stages = context.config.stages
    finished = {entry["name"]: entry for entry in context.run.ledger["stages"] if entry["status"] == "finished"}
    with context.watchdog.may_take_long("reading the data"), context.stop.at_once("reading the data"):
        check_stages(context, [stage for stage in stages if stage.name not in finished])
    for index, stage in enumerate(stages):
        if stage.name not in finished:
            if any(context.ranks.sum(context.stop.asked)):
                raise Stopped(f"stopped before stage {stage.name!r}")
            run_stage(context, index)
        else:
            context.reporter.say(f"{stage.name}: finished already ({finished[stage.name]['updates']} updates)")
    if stages[-1].name in finished:
        exported_by(context, len(stages) - 1, "model")


def check_stages(context: Context, stages: Sequence[StageConfig]) -> None:
    """Read, encode and plan every stage before the first one trains: what is wrong with the last is said now."""
    from delib_fast.engine.deepspeed_json import deepspeed_json
    from delib_fast.engine.nvme import check_nvme

    together(context.ranks, partial(check_nvme, context.config.engine))
    room = room_of(context)
    for stage in stages:
        deepspeed_json(context.config, stage, context.ranks.world_size)
        context.corpus.batches(stage)
        check_fits(context.config, stage, context.corpus.shape, room)


def room_of(context: Context) -> Room:
    engine, ranks = context.config.engine, context.ranks
    limit = ranks.memory_gib if engine.memory_gib is None else engine.memory_gib or None
    return Room(ranks.world_size, engine.precision, limit)


def with_precision(config: Config, ranks: Ranks) -> Config:
    """The configuration with `engine.precision: auto` decided by the device."""
    from delib_fast.engine import native_precision

    if config.engine.precision == "fp16" and ranks.device.type == "cpu":
        raise ConfigError("engine.precision: fp16 needs a GPU; on a CPU set bf16 or fp32")
    if config.engine.precision != "auto":
        return config
    engine = config.engine.model_copy(update={"precision": native_precision(ranks.device)})
    return config.model_copy(update={"engine": engine})


def main(arguments: Sequence[str] | None = None, watch: Watch | None = None) -> int:
    """Command line. Exit codes: 0 done or stopped on request, 1 failed while training, 2 bad input, 130 interrupted
    twice."""
    parser = argparse.ArgumentParser(prog="delib_fast/train.py", description="Train a run's stages.")
    parser.add_argument("--config", required=True, metavar="FILE", help="the run, as YAML")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        nargs="+",
        help="override a value, e.g. --set stages.aft.epochs=2 (repeatable)",
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(options.local_rank))
    adopt_slurm()
    first = os.environ.get("RANK", "0") == "0"
    overrides = [item for group in options.overrides for item in group]
    try:
        run(load_config(options.config, overrides), watch)
    except Stopped as stopped:
        if first:
            print(f"{stopped}; the same command goes on from there", flush=True)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on from the last checkpoint", first, 130)
    except ConfigError as error:
        return _fail(str(error), first, 2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        return _fail(
            f"{error}. What was saved before is whole: make room or give the right to write, and the same "
            "command goes on from the last checkpoint",
            True,
            1,
        )
    except Exception as error:
        if not _is_told_plainly(error):
            raise
        speaks = error.speaks if isinstance(error, LostRankError) else first
        return _fail(str(error), speaks, 2 if isinstance(error, ValueError) else 1)
    return 0


def _is_told_plainly(error: Exception) -> bool:
    """Errors of ours: their message is written for the user and says all; a traceback would bury it."""
    from delib_fast.data import DataError
    from delib_fast.engine.checkpoint import CheckpointError
    from delib_fast.models import LeakError, UnsupportedModelError
    from delib_fast.ops import BackendUnavailable

    return isinstance(
        error, DataError | CheckpointError | LeakError | UnsupportedModelError | TrainingError | BackendUnavailable
    )


def _fail(message: str, speaks: bool, code: int) -> int:
    if speaks:
        print(f"error: {without_secrets(message)}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
