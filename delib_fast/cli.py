"""`delib-fast`: what is not training itself. Training is `deepspeed delib_fast/train.py --config run.yaml`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from delib_fast.config import ConfigError
from delib_fast.config_file import dump_config, json_schema, load_config

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

_CONFIG = Annotated[Path, typer.Argument(metavar="CONFIG", help="the run, as YAML")]
_SET = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="override a value (repeatable)")]


@app.command()
def config(
    path: Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="a run to check and resolve")] = None,
    overrides: _SET = [],  # noqa: B006 (typer reads the default)
    schema: Annotated[bool, typer.Option("--schema", help="print the JSON schema, for editors")] = False,
) -> None:
    """Check a configuration and print it resolved, every default written out; or print the schema."""
    if schema:
        typer.echo(json_schema())
    elif path is None:
        raise ConfigError("give a configuration to check, or --schema")
    else:
        typer.echo(dump_config(load_config(path, overrides)), nl=False)


@app.command()
def train(path: _CONFIG, overrides: _SET = []) -> None:  # noqa: B006
    """Train in this one process; the same as `python -m delib_fast.train`. For several ranks use `deepspeed`."""
    from delib_fast.train import main as train_main

    raise typer.Exit(train_main(["--config", str(path), *(arg for item in overrides for arg in ("--set", item))]))


@app.command()
def ledger(run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="a run directory")]) -> None:
    """Print the tables of a run from its ledger."""
    from rich.console import Console

    from delib_fast.progress import heldout_table, stage_table

    file = run_dir / "ledger.json"
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file; is {run_dir} a run directory?") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file}:{error.lineno}: not a ledger: {error.msg}") from None
    console = Console(highlight=False)
    console.print(heldout_table(content["evaluations"]))
    console.print(stage_table([stage for stage in content["stages"] if stage["status"] == "finished"]))


@app.command()
def env(brief: Annotated[bool, typer.Option("--brief", help="one line")] = False) -> None:
    """What is installed here, and which backends of the fused ops can run."""
    from delib_fast.environment import describe, one_line

    typer.echo(one_line() if brief else describe())


def main() -> None:
    try:
        app()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
