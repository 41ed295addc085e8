"""`delib-fast deliberate`, `document` and `data-report`: made here, wired in by delib_fast/cli.py."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from delib_fast.config import ConfigError
from delib_fast.datagen.backends import EndpointError
from delib_fast.datagen.client import BudgetSpent, Interrupted, NoAnswer
from delib_fast.datagen.documents import make_documents
from delib_fast.datagen.progress import money
from delib_fast.datagen.request_log import LedgerError
from delib_fast.datagen.rows import deliberate as make_rows
from delib_fast.datagen.session import Session
from delib_fast.datagen.settings import DeliberateSettings, DocumentSettings, RunSettings, load_settings
from delib_fast.datagen.spec import Spec
from delib_fast.datagen.spec_leak import SpecLeakError

_SPEC = Annotated[Path, typer.Argument(metavar="SPEC", help="the spec, Markdown or text")]
_OUT = Annotated[
    Path,
    typer.Option("-o", "--out", metavar="OUT", help="folder of the run; the same command goes on with what is there"),
]
_CONFIG = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="settings as YAML")]
_SET = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="any setting, e.g. generator.top_p=0.9")]
_MODEL = Annotated[str | None, typer.Option(help="the generator's name at its endpoint, or its folder")]
_URL = Annotated[
    str | None,
    typer.Option(
        "--base-url",
        help="OpenAI-compatible address, e.g. http://127.0.0.1:8000/v1; the key comes from $OPENAI_API_KEY",
    ),
]
_BACKEND = Annotated[str | None, typer.Option(help="openai (an endpoint) or transformers (in this process)")]
_JUDGE = Annotated[str | None, typer.Option("--judge-model", help="the judge's name; by default the generator judges")]
_JUDGE_URL = Annotated[str | None, typer.Option("--judge-base-url", help="the judge's address")]
_CONCURRENCY = Annotated[int | None, typer.Option(help="requests in flight at a time")]
_PROMPTS = Annotated[
    Path | None,
    typer.Option("--prompts", metavar="DIR", help="prompt files in the place of the built-in ones of that name"),
]
_NAME = Annotated[str | None, typer.Option("--model-name", help="fills {model_name} of the spec")]
_PROVIDER = Annotated[str | None, typer.Option("--provider-name", help="fills {provider_name} of the spec")]


def register(app: typer.Typer) -> None:
    """Add the three commands to an app."""
    app.command("deliberate")(deliberate)
    app.command("document")(document)
    app.command("data-report")(data_report)


def deliberate(
    spec: _SPEC,
    prompts: Annotated[Path | None, typer.Argument(metavar="[PROMPTS]", help="prompts: .jsonl, .json or .txt")] = None,
    *,
    out: _OUT,
    config: _CONFIG = None,
    model: _MODEL = None,
    base_url: _URL = None,
    backend: _BACKEND = None,
    judge_model: _JUDGE = None,
    judge_base_url: _JUDGE_URL = None,
    concurrency: _CONCURRENCY = None,
    style: Annotated[str | None, typer.Option(help="cite or internal")] = None,
    samples: Annotated[int | None, typer.Option("-n", "--samples", help="answers a prompt")] = None,
    judge_votes: Annotated[
        int | None, typer.Option("-k", "--judge-votes", help="ratings a row; the minimum counts")
    ] = None,
    threshold: Annotated[float | None, typer.Option(help="least score, 1 to 10")] = None,
    best_of: Annotated[int | None, typer.Option(help="keep at most this many rows a prompt")] = None,
    also_no_cot: Annotated[bool | None, typer.Option("--also-no-cot", help="write rows_no_cot.jsonl too")] = None,
    prompts_from_spec: Annotated[int | None, typer.Option(metavar="N", help="make N prompts from the spec")] = None,
    prompt_files: _PROMPTS = None,
    model_name: _NAME = None,
    provider_name: _PROVIDER = None,
    sets: _SET = [],  # noqa: B006 (typer reads the default)
) -> None:
    """Make rows of prompt, chain of thought and response from a spec and prompts; the spec is not in them."""
    settings = load_settings(
        DeliberateSettings,
        config,
        {
            **_shared(
                model,
                base_url,
                backend,
                judge_model,
                judge_base_url,
                concurrency,
                prompt_files,
                model_name,
                provider_name,
            ),
            "style": style,
            "samples": samples,
            "judge_votes": judge_votes,
            "threshold": threshold,
            "best_of": best_of,
            "also_no_cot": also_no_cot,
            "prompts_from_spec": prompts_from_spec,
        },
        sets,
    )
    if prompts is None and settings.prompts_from_spec is None:
        raise ConfigError("give a file of prompts, or --prompts-from-spec N to make them from the spec")
    summary = _run(spec, out, settings, lambda shop: make_rows(shop, settings, prompts))
    _tell(out, summary, f"{summary['rows']} rows of {summary['prompts']} prompts", "rows.jsonl")


def document(
    spec: _SPEC,
    *,
    out: _OUT,
    tokens: Annotated[str | None, typer.Option(metavar="N", help="budget, e.g. 500k or 1M")] = None,
    config: _CONFIG = None,
    model: _MODEL = None,
    base_url: _URL = None,
    backend: _BACKEND = None,
    judge_model: _JUDGE = None,
    judge_base_url: _JUDGE_URL = None,
    concurrency: _CONCURRENCY = None,
    emphasis: Annotated[str | None, typer.Option(help="rules, values or rules_and_values")] = None,
    critique: Annotated[bool | None, typer.Option("--critique", help="critique and rewrite each document")] = None,
    prompt_files: _PROMPTS = None,
    model_name: _NAME = None,
    provider_name: _PROVIDER = None,
    sets: _SET = [],  # noqa: B006
) -> None:
    """Make midtraining documents about a spec, to a budget of tokens."""
    settings = load_settings(
        DocumentSettings,
        config,
        {
            **_shared(
                model,
                base_url,
                backend,
                judge_model,
                judge_base_url,
                concurrency,
                prompt_files,
                model_name,
                provider_name,
            ),
            "tokens": None if tokens is None else _tokens(tokens),
            "emphasis": emphasis,
            "critique": critique,
        },
        sets,
    )
    summary = _run(spec, out, settings, lambda shop: make_documents(shop, settings))
    _tell(out, summary, f"{summary['documents']} documents, {summary['tokens']:,} tokens", "documents.jsonl")


def data_report(
    data: Annotated[Path, typer.Argument(metavar="OUT", help="a folder of deliberate or document, or a file of rows")],
    spec: Annotated[Path | None, typer.Option(help="the spec, to see which sections are cited")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--out", metavar="DIR", help="where report.html and report.json go; by default beside the data"
        ),
    ] = None,
) -> None:
    """Report on the quality of made data, as HTML and JSON."""
    from delib_fast.reports.data_report import write_report

    for path in write_report(data, spec=spec, out=out):
        typer.echo(path)


# --- shared ---------------------------------------------------------------------------------------------------


def _shared(
    model: str | None,
    base_url: str | None,
    backend: str | None,
    judge_model: str | None,
    judge_base_url: str | None,
    concurrency: int | None,
    prompt_files: Path | None,
    model_name: str | None,
    provider_name: str | None,
) -> dict[str, Any]:
    return {
        "generator.model": model,
        "generator.base_url": base_url,
        "generator.backend": backend,
        "generator.concurrency": concurrency,
        "judge.model": judge_model,
        "judge.base_url": judge_base_url,
        "prompts": None if prompt_files is None else str(prompt_files),
        "model_name": model_name,
        "provider_name": provider_name,
    }


def _tokens(text: str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmMgG]?)\s*", text)
    if not match or float(match[1]) <= 0:
        raise ConfigError(f"--tokens {text}: write it as 250000, 250k or 1.5M")
    return round(float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}[match[2].lower()])


def _run(
    spec_file: Path, out: Path, settings: RunSettings, work: Callable[[Session], Awaitable[dict[str, Any]]]
) -> dict[str, Any]:
    """Do the work, and end with the right words and exit status: 0 done, 2 a user's mistake, 3 the endpoint or the
    disk failed, 4 max_cost reached, 130 interrupted. After 3, 4 and 130 the same command goes on."""
    spec = Spec.read(
        spec_file,
        model_name=settings.model_name,
        provider_name=settings.provider_name,
        cut_numbered_items=settings.cut_numbered_items,
    )

    async def main() -> dict[str, Any]:
        async with Session.open(out, spec, settings) as shop:
            try:
                return await work(shop)
            except BaseException:
                shop.write_summary({"unfinished": True})
                raise

    kept = f"every answer is kept in {out}; the same command goes on from there"
    try:
        return asyncio.run(main())
    except (Interrupted, KeyboardInterrupt):
        _end(f"stopped: {kept}", 130)
    except BudgetSpent:
        _end(f"stopped: max_cost ({settings.max_cost:g}) is reached; {kept} once it is raised", 4)
    except (EndpointError, LedgerError, NoAnswer) as error:
        _end(f"error: {error}\n{kept}", 3)
    except SpecLeakError as error:
        _end(f"error: {error}\nThis must not happen: nothing was handed over as rows.", 3)


def _end(text: str, status: int) -> NoReturn:
    print(text, file=sys.stderr)
    raise typer.Exit(status)


def _tell(out: Path, summary: Mapping[str, Any], made: str, file: str) -> None:
    paid = summary["paid"]
    cost = f", cost {money(paid['cost'])}" if paid["cost"] is not None else ""
    typer.echo(f"{made} → {out / file}")
    if summary["dropped"]:
        typer.echo("dropped: " + ", ".join(f"{reason} {n}" for reason, n in summary["dropped"].items()))
    typer.echo(
        f"answers paid for: {paid['answers']} ({paid['prompt_tokens']:,} + {paid['completion_tokens']:,} tokens"
        f"{cost}), {summary['this_run']['answers']} in this run; retries "
        + (json.dumps(summary["this_run"]["retries"]) if summary["this_run"]["retries"] else "none")
    )
    if again := summary["dropped"].get("no_answer"):
        typer.echo(f"{again} requests got no answer: the same command asks for them again")
