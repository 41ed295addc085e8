"""The command `delib-fast eval`; `cli/main.py` registers it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from delib_fast.config import ConfigError
from delib_fast.terminal import echo


def eval_command(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN|MODEL",
            help="a run directory, a model folder or a peft adapter folder (default: model of --config)",
        ),
    ] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(
            "--suite",
            metavar="NAME",
            help=(
                "a suite or a group, repeatable or comma-separated. Suites: segments, dose, drift, early, reliance, "
                "agentic, refusal_margin, samples, hints, necessity, legibility, policy, controllability, own_cot, "
                "refusal, monitor; groups: forced (default), sampled, cot, all"
            ),
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="YAML configuration of the evaluation")
    ] = None,
    base: Annotated[str | None, typer.Option("--base", metavar="MODEL", help="base model, for the suite drift")] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FOLDER", help="folder of the results (default: RUN/evals or MODEL-evals)"),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", help="maximum number of rows per source (default: 200)")
    ] = None,
) -> None:
    """Evaluate a model and write JSON, tables and an HTML page. The same command resumes an interrupted evaluation."""
    from delib_fast.data import DataError
    from delib_fast.datagen.judge import JudgeError
    from delib_fast.evals.run import evaluate
    from delib_fast.evals.settings import load_eval_config
    from delib_fast.evals.target import EvalTarget
    from delib_fast.models import UnsupportedModelError
    from delib_fast.reports.eval_page import print_tables, write_page

    suites = [part.strip() for item in suite or () for part in item.split(",")] or None
    settings = load_eval_config(
        config, model=model, suites=suites, base=base, out=None if out is None else str(out), limit=limit
    )
    if settings.model is None:
        raise ConfigError("give a run directory, a model folder or a peft adapter folder to evaluate")
    try:
        evaluation = evaluate(EvalTarget(Path(settings.model), settings), log=lambda text: echo(text, err=True))
    except (DataError, UnsupportedModelError, JudgeError) as error:
        raise ConfigError(str(error)) from None  # `main` prints it without a traceback
    print_tables(evaluation)
    page = write_page(evaluation)
    echo(f"results       {evaluation.folder / 'report.json'}\npage          {page}")


def register(app: typer.Typer) -> None:
    """Add `eval` to an app."""
    app.command("eval")(eval_command)
