"""The command `delib-fast sample`; `cli/main.py` registers it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from delib_fast.config import ConfigError
from delib_fast.terminal import console, echo


def sample_command(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN|MODEL", help="a run directory, a model folder or a peft adapter folder"),
    ],
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help="prompts, as .jsonl, .json, .csv or .txt with one per line (default: held-out chats of the run)",
        ),
    ] = None,
    count: Annotated[int, typer.Option("--n", min=1, metavar="N", help="number of prompts, spread over the file")] = 3,
    show: Annotated[
        int | None,
        typer.Option("--show", min=1, metavar="N", help="number of prompts to print (default: all); figures count all"),
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", min=1, metavar="N", help="replies per prompt; above 1 needs a temperature")
    ] = 1,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, metavar="T", help="0 decodes greedily")] = 0.0,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, metavar="N", help="maximum length of a reply in tokens")
    ] = 256,
    seed: Annotated[int, typer.Option("--seed", min=0, help="seed of the draws, with a temperature above 0")] = 0,
    base: Annotated[
        str | None, typer.Option("--base", metavar="MODEL", help="base model (default: the one that was trained)")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FOLDER", help="folder of the results (default: RUN/samples or MODEL-samples)"),
    ] = None,
    html: Annotated[bool, typer.Option("--html", help="also write an HTML page")] = False,
) -> None:
    """Show replies of a run's base model and of the model after each stage, side by side."""
    if samples > 1 and temperature == 0:
        raise ConfigError(
            f"--samples {samples}: greedy decoding gives the same reply every time; add --temperature 0.8"
        )
    from delib_fast.data import DataError
    from delib_fast.evals.moments import find_moments
    from delib_fast.evals.replies import samples_folder, write_samples
    from delib_fast.evals.samples import sample_moments, sample_prompts
    from delib_fast.models import UnsupportedModelError
    from delib_fast.models.generate import Sampling
    from delib_fast.reports.samples import WIDTH, print_samples, write_page

    try:
        moments = find_moments(run, base)
        chats, locations, available = sample_prompts(moments, prompts, count)
        if available > len(chats):
            echo(f"{len(chats)} of {available} prompts; --n {available} takes all of them", err=True)
        folder = samples_folder(run) if out is None else out
        found = sample_moments(
            moments,
            chats,
            locations,
            Sampling(max_new_tokens=max_tokens, temperature=temperature, seed=seed),
            samples=samples,
            cache=folder / "replies.jsonl",
            log=lambda text: echo(text, err=True),
        )
        path = write_samples(folder, found)
    except (DataError, UnsupportedModelError) as error:
        raise ConfigError(str(error)) from None  # `main` prints it without a traceback
    except KeyboardInterrupt:
        echo("interrupted; the same command continues with the replies that it has not drawn yet", err=True)
        raise typer.Exit(130) from None
    screen = console()
    shown = replace(found, samples=found.samples[:show])
    print_samples(shown, screen if screen.is_terminal else console(width=WIDTH))
    echo(f"samples       {path}")
    if html:
        echo(f"page          {write_page(found, folder)}")


def register(app: typer.Typer) -> None:
    """Add `sample` to an app."""
    app.command("sample")(sample_command)
