"""The commands `delib-fast inspect`, `plan` and `report`; `cli/main.py` registers them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from delib_fast.config import ConfigError
from delib_fast.config.load import load_config
from delib_fast.terminal import console, echo, report_error

WIDTH = 80  # of the tables, in columns
_SET = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="override a value (repeatable)")]


@contextlib.contextmanager
def _user_errors() -> Iterator[None]:
    """Print an error in the user's input without a traceback, and exit with code 2."""
    try:
        yield
    except ValueError as error:  # includes ConfigError and DataError
        report_error(error)
        raise typer.Exit(2) from None


@contextlib.contextmanager
def _keys_of_a_file(is_file: bool) -> Iterator[None]:
    """Add to errors about a FILE how its keys are set, since it has no configuration."""
    try:
        yield
    except ValueError as error:
        if not is_file:
            raise
        raise ConfigError(
            f"{error}\n(without a configuration, set keys by e.g. --set data.rows.think_tags='[<a>, </a>]' or --set "
            "stages.aft.over_long=drop)"
        ) from None


@_user_errors()
def inspect(
    path: Annotated[Path, typer.Argument(metavar="CONFIG|FILE", help="a run as YAML, or a file of rows or text")],
    row: Annotated[int, typer.Option(help="index of the first example to show, from 0")] = 0,
    count: Annotated[int, typer.Option(min=1, help="number of examples to show")] = 1,
    stage: Annotated[str | None, typer.Option(help="show only this stage")] = None,
    html: Annotated[Path | None, typer.Option(help="write an HTML page instead", metavar="PAGE")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="for a FILE: folder or hub name of the tokenizer")] = None,
    kind: Annotated[str, typer.Option(help="for a FILE: kind of the stage, aft or msm")] = "aft",
    capacity: Annotated[int, typer.Option(help="for a FILE: pack capacity in tokens", min=2)] = 32768,
    overrides: _SET = [],  # noqa: B006 (typer reads the default)
) -> None:
    """Show the exact tokens that the model will see, their segments, and their weights in the loss."""
    from delib_fast.preview.dry_run import SMALL_VOCABULARY, dry_run, preview_config
    from delib_fast.preview.tokens import describe_left_out, render_example, view_example
    from delib_fast.reports.inspect_page import inspect_page

    config = preview_config(path, overrides, tokenizer=tokenizer, kind=kind, capacity=capacity)
    stages = [s for s in config.stages if stage in (None, s.name)]
    if not stages:
        raise ConfigError(f"--stage {stage}: no such stage; the stages are {', '.join(s.name for s in config.stages)}")
    if config.run_dir == "-" and tokenizer is None:
        echo(
            f"--tokenizer is not given: using a tokenizer of {SMALL_VOCABULARY} tokens, one for each byte",
            err=True,
        )
    with _keys_of_a_file(config.run_dir == "-"), dry_run(config) as dataset:
        examples = []
        for s in stages:
            end = min(row + count, len(dataset.mixed(s)[0]))
            examples += [view_example(dataset, s, i) for i in range(row, max(end, row + 1))]
        left_out = describe_left_out(dataset, stages)
    if html is None:
        out = console()
        for example in examples:
            out.print(render_example(example))
        for line in left_out:
            out.print(line)
        return
    try:
        html.write_text(inspect_page(f"Tokens of {path.name}", examples, left_out), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--html {html}: cannot write the page: {error.strerror}") from None
    echo(html)


@_user_errors()
def plan(
    path: Annotated[Path, typer.Argument(metavar="CONFIG", help="the run, as YAML")],
    gpus: Annotated[int, typer.Option(min=1, help="number of ranks")] = 1,
    memory_gib: Annotated[float, typer.Option(min=0.1, help="memory of each rank's device in GiB")] = 80.0,
    precision: Annotated[
        str, typer.Option(help="what `engine.precision: auto` resolves to: bf16, fp16 or fp32")
    ] = "bf16",
    lengths: Annotated[
        list[str],
        typer.Option(
            metavar="[STAGE=]LENGTHS",
            help="instead of the data: a file with the number of tokens of one example per line, or a lognormal "
            "distribution, as in docs/data.md (repeatable)",
        ),
    ] = [],  # noqa: B006
    tflops: Annotated[
        float | None, typer.Option(min=0.001, help="TFLOP/s of a rank, to estimate the hours of training")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(help="GPU of each rank, such as h200 or a100, to estimate the time of a step by part")
    ] = None,
    overrides: _SET = [],  # noqa: B006
) -> None:
    """Plan a run without a GPU: rows, tokens, lengths, packs, steps, balance, and the memory that a rank needs."""
    from delib_fast.preview.plan import plan_run, render_plan
    from delib_fast.training.roofline import known_device

    config = load_config(path, overrides)
    chosen = precision if config.engine.precision == "auto" else config.engine.precision
    if chosen not in ("fp32", "bf16", "fp16"):
        raise ConfigError(f"--precision {precision}: must be fp32, bf16 or fp16")
    if gpu is not None and tflops is not None:
        raise ConfigError("--gpu and --tflops both give the rate of a rank; give one of them")
    if gpu is not None and chosen == "fp32":
        raise ConfigError(f"--gpu {gpu}: only the rates of bf16 and fp16 are known; give --tflops for fp32")
    device = None if gpu is None else known_device(gpu)
    shape, plans = plan_run(config, lengths, ranks=gpus, precision=chosen, card_gib=memory_gib, device=device)
    out = console(width=WIDTH)
    out.print(
        f"{shape.parameters:,} parameters ({shape.embedding_parameters:,} of them embeddings), "
        f"{shape.layers} layers of {shape.hidden}; {gpus} × {memory_gib:g} GiB, "
        f"ZeRO {config.engine.zero_stage}, {chosen}"
    )
    for stage_plan in plans:
        out.print(render_plan(stage_plan, memory_gib, tflops, device))


@_user_errors()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="one or several run directories")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FOLDER", help="folder of the report (default: RUN/report, or report for several runs)"
        ),
    ] = None,
) -> None:
    """Report on one or several runs: losses by segment, throughput, memory, ledger, chain of stages."""
    from delib_fast.reports.run_page import report_runs

    echo(f"page          {report_runs(runs, out)}")


def register(app: typer.Typer) -> None:
    """Add the three commands to an app."""
    app.command("inspect")(inspect)
    app.command("plan")(plan)
    app.command("report")(report)
