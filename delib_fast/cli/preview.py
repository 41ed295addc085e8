"""`delib-fast inspect`, `delib-fast plan` and `delib-fast report`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from delib_fast.config import ConfigError
from delib_fast.config.load import load_config
from delib_fast.data import DataError
from delib_fast.preview.dry_run import SMALLEST_VOCABULARY, config_of, dry_run
from delib_fast.reports.run_page import report

_SET = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="override a value (repeatable)")]


def _told(command: Callable[..., None]) -> Callable[..., None]:
    """Faults of what the user gave end in one line and exit code 2."""

    @wraps(command)
    def told(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (ConfigError, DataError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(2) from None

    return told


@_told
def inspect(
    path: Annotated[Path, typer.Argument(metavar="CONFIG|FILE", help="a run as YAML, or a file of rows or text")],
    row: Annotated[int, typer.Option(help="the first example to show, from 0")] = 0,
    count: Annotated[int, typer.Option(min=1, help="how many")] = 1,
    stage: Annotated[str | None, typer.Option(help="of this stage only")] = None,
    html: Annotated[Path | None, typer.Option(help="write a page instead", metavar="PAGE")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="for a FILE: tokenizer folder or hub name")] = None,
    kind: Annotated[str, typer.Option(help="for a FILE: aft or msm")] = "aft",
    capacity: Annotated[int, typer.Option(help="for a FILE: pack capacity in tokens", min=2)] = 32768,
    overrides: _SET = [],  # noqa: B006 (typer reads the default)
) -> None:
    """Show the exact tokens that the model will see, their segments, and what each weighs in the loss."""
    from delib_fast.preview.page import page
    from delib_fast.preview.tokens import look_at, rendered

    config = config_of(path, overrides, tokenizer=tokenizer, kind=kind, capacity=capacity)
    stages = [s for s in config.stages if stage in (None, s.name)]
    if not stages:
        raise ConfigError(f"--stage {stage}: there are {', '.join(s.name for s in config.stages)}")
    if config.run_dir == "-" and tokenizer is None:
        print(
            f"no --tokenizer given: showing tokens of one of {SMALLEST_VOCABULARY} made from the file itself",
            file=sys.stderr,
        )
    with dry_run(config) as corpus:
        seen = []
        for s in stages:
            last = min(row + count, len(corpus.mixed(s)[0]))
            seen += [look_at(corpus, s, i) for i in range(row, max(last, row + 1))]
    if html is None:
        console = Console(highlight=False)
        for example in seen:
            console.print(rendered(example))
        return
    try:
        html.write_text(page(f"Tokens of {path.name}", seen), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--html {html} can't be written: {error.strerror}") from None
    print(html)


@_told
def plan(
    path: Annotated[Path, typer.Argument(metavar="CONFIG", help="the run, as YAML")],
    gpus: Annotated[int, typer.Option(min=1, help="ranks")] = 1,
    memory_gib: Annotated[float, typer.Option(min=0.1, help="memory of each rank's card")] = 80.0,
    precision: Annotated[str, typer.Option(help="what engine.precision auto comes to")] = "bf16",
    lengths: Annotated[
        list[str],
        typer.Option(
            metavar="[STAGE=]LENGTHS",
            help="in place of the data: a file with the tokens of an example a line, or "
            "lognormal:examples=N,median=TOKENS,sigma=S (repeatable)",
        ),
    ] = [],  # noqa: B006
    tflops: Annotated[float | None, typer.Option(min=0.001, help="TFLOP/s of a rank, to tell hours")] = None,
    overrides: _SET = [],  # noqa: B006
) -> None:
    """A dry run without a GPU: rows, tokens, lengths, packs, updates, balance, and the memory a rank needs."""
    from delib_fast.preview.plan import plan_stage, rendered

    config = load_config(path, overrides)
    chosen = precision if config.engine.precision == "auto" else config.engine.precision
    if chosen not in ("fp32", "bf16", "fp16"):
        raise ConfigError(f"--precision {precision}: it must be fp32, bf16 or fp16")
    console = Console(highlight=False, width=80)
    with dry_run(config, lengths) as corpus:
        shape = corpus.shape
        console.print(
            f"{shape.parameters:,} parameters ({shape.embedding_parameters:,} of them embeddings), "
            f"{shape.layers} layers of {shape.hidden}; {gpus} × {memory_gib:g} GiB, "
            f"ZeRO {config.engine.zero_stage}, {chosen}"
        )
        for stage in config.stages:
            made = plan_stage(corpus, config, stage, ranks=gpus, precision=chosen, card_gib=memory_gib)
            console.print(rendered(made, memory_gib, tflops))


def register(app: typer.Typer) -> None:
    app.command("inspect")(inspect)
    app.command("plan")(plan)
    app.command("report")(_told(report))
