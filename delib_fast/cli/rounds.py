"""The command `delib-fast rounds`; `cli/main.py` registers it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from delib_fast.terminal import console, echo, report_error

WIDTH = 80


def rounds_command(
    path: Annotated[Path, typer.Argument(metavar="CONFIG", help="the rounds, as YAML")],
    out: Annotated[
        str | None, typer.Option("-o", "--out", metavar="FOLDER", help="folder of the results (default: out of CONFIG)")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option("--rounds", metavar="N", help="maximum number of rounds (default: rounds of CONFIG)")
    ] = None,
    sets: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="override a value of CONFIG (repeatable)")
    ] = [],  # noqa: B006 (typer reads the default)
) -> None:
    """Sample from the current model, judge with the spec, and train on what is kept; the same command resumes it."""
    import delib_fast.train as launch_script  # first: it sets a variable that torch reads when it is loaded
    from delib_fast.cli.datagen import exit_with_message
    from delib_fast.data import DataError
    from delib_fast.rounds.cot_scan import CotLeakError
    from delib_fast.rounds.run import run_rounds
    from delib_fast.rounds.settings import load_rounds
    from delib_fast.training.errors import Stopped

    config = load_rounds(path, sets, out=out, rounds=rounds)
    try:
        with exit_with_message(Path(config.out)):
            result = run_rounds(config, log=lambda text: echo(text, err=True))
    except CotLeakError as error:
        report_error(error)
        raise typer.Exit(3) from None
    except Stopped as stopped:
        echo(f"{stopped}; the same command resumes from there", err=True)
        raise typer.Exit(130) from None
    except Exception as error:
        if not launch_script.has_user_message(error):
            raise
        report_error(error)
        raise typer.Exit(2 if isinstance(error, DataError | ValueError) else 1) from None
    print_rounds(result.summary)
    if result.model is not None:
        echo(f"model         {result.model / 'model'}")
    echo(f"results       {result.json}\npage          {result.page}")


def print_rounds(summary: dict[str, Any]) -> None:
    """Print the rounds, in a table of at most 80 columns."""
    from rich import box
    from rich.table import Table

    from delib_fast.reports.rounds_page import ROUND_COLUMNS, round_rows

    out = console(width=WIDTH)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ROUND_COLUMNS:
        table.add_column(name, justify="left" if name == "model" else "right")
    for row in round_rows(summary):
        table.add_row(*row)
    out.print(table)
    out.print(f"stopped: {summary['stopped']}; CoT under pressure: {summary['cot_under_pressure']}")


def register(app: typer.Typer) -> None:
    """Add `rounds` to an app."""
    app.command("rounds")(rounds_command)
