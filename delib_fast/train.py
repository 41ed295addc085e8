"""Train: `deepspeed delib_fast/train.py --config run.yaml [--set a.b=c ...]`.

The same file runs under `deepspeed --module delib_fast.train`, `torchrun`, `srun` and plain
`python -m delib_fast.train`. This file only parses arguments and maps errors to exit codes; `training/run.py` runs
the stages, and `training/loop.py` is the loop.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__" and sys.path and os.path.basename(sys.path[0]) == "delib_fast":
    # When this file runs as a script, Python puts its folder first on the path, where `data`, `models` or `config`
    # would shadow other packages of those names.
    sys.path[0] = os.path.dirname(os.path.abspath(sys.path[0]))

# At the end of each parallel loop, libgomp's threads spin for milliseconds. On a busy machine they occupy the cores
# that the slowest thread needs: 3 to 5 times fewer tokens/s were measured. libgomp reads the variable once, when torch
# loads it.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import argparse
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from delib_fast.config import ConfigError
from delib_fast.config.load import load_config
from delib_fast.engine.launch import on_every_rank, report_to_ranks
from delib_fast.engine.slurm import init_from_slurm
from delib_fast.terminal import ArgumentParser, echo, guard_process_output, report_error
from delib_fast.training.errors import RanksDifferError, Stopped, TrainingError, describe_system_error

if TYPE_CHECKING:
    from delib_fast.training.callbacks import Callback


def main(arguments: Sequence[str] | None = None, callbacks: Sequence[Callback] = ()) -> int:
    """Run the stages of a configuration file.

    Args:
        arguments: the command-line arguments; by default those of the process.
        callbacks: see `training.run.run`.
    Returns:
        The exit code: 0 finished, or stopped on request; 1 failed while training; 2 the configuration, the rows or
        the model cannot be used; 130 interrupted twice.
    """
    parser = ArgumentParser(prog="delib_fast/train.py", description="Train the stages of a run.")
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
    init_from_slurm()
    try:
        options = parser.parse_args(arguments)
    except SystemExit as left:
        if left.code:
            report_to_ranks("its command line is not valid")
        raise
    if options.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(options.local_rank))

    is_main = os.environ.get("RANK", "0") == "0"
    overrides = [item for group in options.overrides for item in group]
    try:
        config = on_every_rank(partial(load_config, options.config, overrides))
        from delib_fast.training.run import run

        run(config, callbacks)
    except Stopped as stopped:
        if is_main:
            echo(f"{stopped}; the same command resumes from there")
    except KeyboardInterrupt:
        return _fail("interrupted; the same command resumes from the last checkpoint", 130, prints=is_main)
    except ConfigError as error:
        return _fail(str(error), 2, prints=is_main or isinstance(error, RanksDifferError))
    except Exception as error:
        if message := describe_system_error(error):
            return _fail(message, 1, prints=True)  # it may concern only this rank's machine
        if not has_user_message(error):
            report_to_ranks(f"it failed: {type(error).__name__}: {error}")
            raise
        prints = getattr(error, "reports", is_main)
        return _fail(str(error), 2 if isinstance(error, ValueError) else 1, prints=prints)
    return 0


def has_user_message(error: Exception) -> bool:
    """Whether the error is one of ours, whose message is written for the user; a traceback would bury it."""
    from delib_fast.checkpoint.format import CheckpointError
    from delib_fast.data import DataError
    from delib_fast.engine.rendezvous import PeerError
    from delib_fast.models import LeakError, UnsupportedModelError
    from delib_fast.ops import BackendUnavailable

    user = DataError | CheckpointError | LeakError | UnsupportedModelError | TrainingError | BackendUnavailable
    return isinstance(error, user | PeerError)


def _fail(message: str, code: int, *, prints: bool) -> int:
    """Print the message, if this is the rank that prints it, and return the exit code."""
    if prints:
        report_error(message)
    return code


if __name__ == "__main__":
    guard_process_output()
    sys.exit(main())
