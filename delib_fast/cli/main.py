"""Prepare, inspect, evaluate and compare training runs. To train: deepspeed delib_fast/train.py --config run.yaml"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from delib_fast.config import ConfigError
from delib_fast.config.load import dump_config, json_schema, load_config
from delib_fast.terminal import console, echo, guard_process_output, print_document, report_error

# Commands in other modules, with their help texts. A module is imported when its command runs: importing all of them
# takes seconds.
_LAZY_COMMANDS = {
    "inspect": ("delib_fast.cli.preview", "Show the exact tokens the model will see, by segment and weight."),
    "plan": ("delib_fast.cli.preview", "Dry run: rows, tokens, packs, steps, balance, and the memory a rank needs."),
    "deliberate": ("delib_fast.cli.datagen", "Generate rows of prompt, chain of thought and response from a spec."),
    "document": ("delib_fast.cli.datagen", "Generate midtraining documents about a spec, up to a token budget."),
    "data-report": ("delib_fast.cli.datagen", "Report on the quality of generated data, as HTML and JSON."),
    "report": ("delib_fast.cli.preview", "Write a page about one or several runs: losses, throughput, memory, ledger."),
    "sample": ("delib_fast.cli.sample", "Show replies of the base model and of the model after each stage."),
    "eval": ("delib_fast.cli.evaluate", "Evaluate a model; writes JSON, tables and an HTML page."),
    "rounds": ("delib_fast.cli.rounds", "Sample, judge with the spec, train on what is kept; repeat."),
    "study": ("delib_fast.cli.study", "Train the arms of a study and compare them."),
}


_USAGE_ERROR: Any = typer.BadParameter.__base__  # of click, or of the copy of click in newer versions of typer


class _LazyGroup(TyperGroup):
    """A group of commands, of which those in `_LAZY_COMMANDS` are imported only when they run.

    The help of the group needs only their names and help texts, so it shows stubs.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *_LAZY_COMMANDS]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in _LAZY_COMMANDS:
            return super().get_command(ctx, cmd_name)
        stub = typer.Typer()
        stub.command(cmd_name, help=_LAZY_COMMANDS[cmd_name][1])(lambda: None)
        return typer.main.get_command(stub)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        if name in _LAZY_COMMANDS:
            found = typer.Typer()
            importlib.import_module(_LAZY_COMMANDS[name][0]).register(found)
            found.callback()(lambda: None)  # makes typer build a group, even from a single command
            group: Any = typer.main.get_command(found)
            command = group.commands[name]
        return name, command, rest


app = typer.Typer(
    cls=_LazyGroup, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__
)

_CONFIG = Annotated[Path, typer.Argument(metavar="CONFIG", help="the run, as YAML")]
_SET = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="override a value (repeatable)")]


@app.command()
def config(
    path: Annotated[Path | None, typer.Argument(metavar="CONFIG", help="the run to check, as YAML")] = None,
    overrides: _SET = [],  # noqa: B006 (typer reads the default)
    schema: Annotated[bool, typer.Option("--schema", help="print the JSON schema, for editors")] = False,
) -> None:
    """Check a configuration and print it with every default; or print the JSON schema."""
    if schema:
        print_document(json_schema())
    elif path is None:
        raise ConfigError("give a configuration file to check, or --schema")
    else:
        print_document(dump_config(load_config(path, overrides)).removesuffix("\n"))


@app.command()
def train(
    path: _CONFIG,
    overrides: _SET = [],  # noqa: B006
    watch: Annotated[
        str | None,
        typer.Option(
            "--watch",
            metavar="SUITES",
            help="evaluate during training: segments, early, reliance, drift (comma-separated; needs the extra evals)",
        ),
    ] = None,
    every: Annotated[
        int, typer.Option("--every", metavar="N", help="with --watch: steps between two evaluations")
    ] = 50,
) -> None:
    """Train in this process, like `python -m delib_fast.train`. For several ranks use `deepspeed`."""
    from delib_fast.train import main as train_main

    callbacks: list[Any] = []
    if watch is not None:
        from delib_fast.evals import EvalCallback

        callbacks = [EvalCallback([name.strip() for name in watch.split(",")], every_steps=every)]
    arguments = ["--config", str(path), *(arg for item in overrides for arg in ("--set", item))]
    raise typer.Exit(train_main(arguments, callbacks))


@app.command()
def ledger(run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="a run directory")]) -> None:
    """Print the held-out losses and the stages of a run, from its ledger."""
    from delib_fast.training.console import heldout_tables, stage_table
    from delib_fast.training.run_directory import read_ledger

    try:
        content = read_ledger(run_dir)
        finished = [stage for stage in content["stages"] if stage["status"] == "finished"]
        tables = [*heldout_tables(content["evaluations"]), stage_table(finished)]
    except ConfigError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, StopIteration, OverflowError) as error:
        raise ConfigError(
            f"{run_dir / 'ledger.json'} is damaged ({type(error).__name__}: {error}); restore it from a copy"
        ) from None
    out = console()
    for table in tables:
        out.print(table)


@app.command()
def env(brief: Annotated[bool, typer.Option("--brief", help="print one line")] = False) -> None:
    """Print versions, the device, and which backends of the fused ops can run."""
    from delib_fast.cli.env import describe, one_line

    echo(one_line() if brief else describe())


def main() -> None:
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()  # a full disk is an error of the command, not of the interpreter's end
    except ConfigError as error:
        report_error(error)
        sys.exit(2)
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.errno is None:
            raise
        report_error(f"{error.filename or 'the output'}: {error.strerror}")
        sys.exit(3)
    except _USAGE_ERROR as error:  # typer would print the arguments as they are
        if error.ctx is not None:
            echo(f"{error.ctx.get_usage()}\nTry '{error.ctx.command_path} --help' for help.\n", err=True)
        report_error(error.format_message())
        sys.exit(error.exit_code)
    except typer.Abort:
        sys.exit(130)
    finally:
        guard_process_output()  # typer prints tracebacks through a hook of its own
    sys.exit(code)


if __name__ == "__main__":
    main()
