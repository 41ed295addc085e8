"""`delib-fast study STUDY.yaml`: the command; cli.py of the package registers it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from delib_fast.config import ConfigError

WIDTH = 100


def study_command(
    path: Annotated[Path, typer.Argument(metavar="STUDY", help="the study, as YAML")],
    out: Annotated[str | None, typer.Option("--out", metavar="FOLDER", help="where it writes, not as it says")] = None,
    seeds: Annotated[str | None, typer.Option("--seeds", metavar="1,2,3", help="these seeds, if not its own")] = None,
    workers: Annotated[int | None, typer.Option("--workers", metavar="N", help="arms trained at once")] = None,
    dry_run: Annotated[bool, typer.Option("--plan", help="print the arms and stages, train nothing")] = False,
) -> None:
    """Train the arms of a study and set them side by side. The same command goes on where it stopped."""
    from delib_fast.data import DataError
    from delib_fast.reports.study_figures import need_matplotlib
    from delib_fast.study.pool import StudyError
    from delib_fast.study.run import describe_plan, run_study
    from delib_fast.study.settings import load_study

    study = load_study(path, out=out, workers=workers, seeds=None if seeds is None else _numbers(seeds))
    need_matplotlib()
    try:
        if dry_run:
            typer.echo(describe_plan(study))
            return
        result = run_study(study, say=lambda text: typer.echo(text, err=True))
    except DataError as error:
        raise ConfigError(str(error)) from None
    except StudyError as error:
        typer.echo(f"error: {error}\nThe rest is done; the same command tries these again.", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("stopped; the same command goes on from there", err=True)
        raise typer.Exit(130) from None
    print_arms(result.summary)
    typer.echo(f"results       {result.json}\npage          {result.page}")


def print_arms(summary: dict[str, Any]) -> None:
    """The table of arms, and the differences."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from delib_fast.reports.study_page import estimate_text

    console = Console(width=WIDTH, highlight=False)
    sized = any(arm["size"] for arm in summary["arms"])
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("arm", *(["rows"] if sized else []), *summary["metrics"]):
        table.add_column(name, justify="left" if name == "arm" else "right")
    for arm in summary["arms"]:
        size = [] if not sized else ["" if arm["size"] is None else f"{arm['size']:,}"]
        cells = [estimate_text(arm["figures"][name]["over seeds"]) for name in summary["metrics"]]
        table.add_row(arm["label"], *size, *cells)
    console.print(table)
    for contrast in summary["contrasts"]:
        console.print(f"{contrast['title']}: {contrast['metric']} {estimate_text(contrast['estimate'])}")


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--seeds {text}: write whole numbers with commas, e.g. --seeds 1,2,3") from None


def register(app: typer.Typer) -> None:
    """Add `study` to a command line."""
    app.command("study")(study_command)
