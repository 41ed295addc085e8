"""The command `delib-fast study`; `cli/main.py` registers it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from delib_fast.config import ConfigError
from delib_fast.terminal import console, echo, report_error

WIDTH = 80
_METRICS_PER_TABLE = 2


def study_command(
    path: Annotated[Path, typer.Argument(metavar="STUDY", help="the study, as YAML")],
    out: Annotated[
        str | None, typer.Option("--out", metavar="FOLDER", help="folder of the results (default: out of STUDY)")
    ] = None,
    seeds: Annotated[
        str | None, typer.Option("--seeds", metavar="1,2,3", help="seeds, comma-separated (default: seeds of STUDY)")
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", metavar="N", help="worker processes; each trains one stage at a time")
    ] = None,
    sets: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="override a value of STUDY (repeatable)")
    ] = [],  # noqa: B006 (typer reads the default)
    dry_run: Annotated[bool, typer.Option("--plan", help="list the arms and stages; train nothing")] = False,
    freeze: Annotated[
        bool, typer.Option("--freeze", help="preregister: write the plan to STUDY.frozen.json; train nothing")
    ] = False,
) -> None:
    """Train and compare the arms of a study. The same command resumes it."""
    from delib_fast.data import DataError
    from delib_fast.reports.study_figures import require_matplotlib
    from delib_fast.study.pool import StudyError
    from delib_fast.study.run import describe_plan, freeze_study, run_study
    from delib_fast.study.settings import load_study

    study = load_study(path, sets, out=out, workers=workers, seeds=None if seeds is None else _numbers(seeds))
    require_matplotlib()
    try:
        if freeze:
            echo(freeze_study(study))
            return
        if dry_run:
            echo(describe_plan(study))
            return
        result = run_study(study, log=lambda text: echo(text, err=True))
    except DataError as error:
        raise ConfigError(str(error)) from None
    except StudyError as error:
        report_error(f"{error}\nAll other tasks are done; the same command retries the failed ones.")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        echo("interrupted; the same command resumes the study", err=True)
        raise typer.Exit(130) from None
    print_arms(result.summary)
    echo(f"results       {result.json}\npage          {result.page}")


def print_arms(summary: dict[str, Any]) -> None:
    """Print the arms, in tables of two metrics and at most 80 columns each; and the contrasts."""
    from rich import box
    from rich.table import Table

    from delib_fast.reports.study_page import registration_lines
    from delib_fast.reports.study_tables import cell_words, estimate_text, floor_text, verdict_text

    out = console(width=WIDTH)
    sized = any(arm["size"] for arm in summary["arms"])
    names = list(summary["metrics"])
    for metrics in [names[i : i + _METRICS_PER_TABLE] for i in range(0, max(1, len(names)), _METRICS_PER_TABLE)]:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name in ("arm", *(["rows"] if sized else []), *metrics):
            table.add_column(name, justify="left" if name == "arm" else "right", no_wrap=name in metrics)
        for arm in summary["arms"]:
            size = [] if not sized else ["" if arm["size"] is None else f"{arm['size']:,}"]
            table.add_row(arm["label"], *size, *(cell_words(arm["figures"][m]) for m in metrics))
        out.print(table)
    for contrast in summary["contrasts"]:
        note = " (exploratory)" if contrast["exploratory"] and summary["preregistration"] else ""
        value = "" if contrast["void"] else f"{estimate_text(contrast['estimate'])}; "
        out.print(
            f"{contrast['title']}: {contrast['metric']} {value}{verdict_text(contrast)}; "
            f"floor {floor_text(contrast)}; placebo {_placebo(contrast)}{note}"
        )
    for paired in summary.get("paired") or ():
        out.print(
            f"{paired['title']}, paired by row: {paired['metric']} {estimate_text(paired['estimate'])}, "
            f"{paired['agreeing']} of {paired['rows']} rows have this sign"
        )
    for line in registration_lines(summary["preregistration"]):
        out.print(line)


def _placebo(contrast: dict[str, Any]) -> str:
    from delib_fast.reports.study_tables import estimate_text

    return "none" if contrast["placebo"] is None else estimate_text(contrast["placebo"]["estimate"])


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--seeds {text}: write integers separated by commas, e.g. --seeds 1,2,3") from None


def register(app: typer.Typer) -> None:
    """Add `study` to an app."""
    app.command("study")(study_command)
