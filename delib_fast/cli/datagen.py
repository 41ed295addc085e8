"""The commands `delib-fast deliberate`, `document` and `data-report`; `cli/main.py` registers them."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar, get_type_hints

import typer

from delib_fast.config import ConfigError
from delib_fast.config.load import load
from delib_fast.datagen.backends import EndpointError, NoAnswer
from delib_fast.datagen.documents import generate_documents
from delib_fast.datagen.progress import money
from delib_fast.datagen.request_log import WriteError
from delib_fast.datagen.rows import generate_rows
from delib_fast.datagen.session import Session
from delib_fast.datagen.settings import SETTINGS_FILE, DeliberateSettings, DocumentSettings, RunSettings
from delib_fast.datagen.spec import Spec
from delib_fast.datagen.spec_leak import SpecLeakError
from delib_fast.datagen.stopping import BudgetSpent, Interrupted, LowYield
from delib_fast.files import read_text
from delib_fast.terminal import echo

_SHOWN_CHARS = 200
S = TypeVar("S", bound=RunSettings)


def register(app: typer.Typer) -> None:
    """Add the three commands to an app."""
    app.command("deliberate")(_with_run_options(deliberate))
    app.command("document")(_with_run_options(document))
    app.command("data-report")(data_report)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The options that `deliberate` and `document` have in common."""

    out: Annotated[
        Path,
        typer.Option("-o", "--out", metavar="OUT", help="folder of the run; the same command resumes it"),
    ]
    config: Annotated[Path | None, typer.Option("--config", metavar="FILE", help="settings as YAML")] = None
    model: Annotated[
        str | None, typer.Option(help="name of the generator at its endpoint, or the folder of its model")
    ] = None
    base_url: Annotated[
        str | None,
        typer.Option(
            help="OpenAI-compatible address, e.g. http://127.0.0.1:8000/v1; the key is read from $OPENAI_API_KEY"
        ),
    ] = None
    backend: Annotated[
        str | None, typer.Option(help="openai (an endpoint, default) or transformers (in this process)")
    ] = None
    judge_model: Annotated[str | None, typer.Option(help="name of the judge (default: the generator)")] = None
    judge_base_url: Annotated[str | None, typer.Option(help="address of the judge's endpoint")] = None
    concurrency: Annotated[int | None, typer.Option(help="maximum number of requests in flight (default: 16)")] = None
    prompt_files: Annotated[
        Path | None,
        typer.Option("--prompts", metavar="DIR", help="prompt files that replace the built-in ones of the same name"),
    ] = None
    model_name: Annotated[
        str | None, typer.Option(help="replaces {model_name} in the spec (default: the assistant)")
    ] = None
    provider_name: Annotated[
        str | None, typer.Option(help="replaces {provider_name} in the spec (default: its developer)")
    ] = None
    sets: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="any setting, e.g. generator.top_p=0.9 (repeatable)")
    ] = field(default_factory=list)

    def settings(self, kind: type[S], overrides: Mapping[str, Any]) -> S:
        """The settings: the file of `--config`, then the options, `overrides`, and `--set`."""
        options = {
            "generator.model": self.model,
            "generator.base_url": self.base_url,
            "generator.backend": self.backend,
            "generator.concurrency": self.concurrency,
            "judge.model": self.judge_model,
            "judge.base_url": self.judge_base_url,
            "prompts": None if self.prompt_files is None else str(self.prompt_files),
            "model_name": self.model_name,
            "provider_name": self.provider_name,
        }
        return load(kind, self.config, SETTINGS_FILE, self.sets, {**options, **overrides})


def _with_run_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of RunOptions to a command, which receives them as its argument `options`."""

    def run(**values: Any) -> None:
        options = RunOptions(**{option.name: values.pop(option.name) for option in fields(RunOptions)})
        command(options=options, **values)

    hints, own_hints = get_type_hints(RunOptions, include_extras=True), get_type_hints(command, include_extras=True)
    own = [
        parameter.replace(annotation=own_hints[parameter.name], kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in inspect.signature(command).parameters.values()
        if parameter.name != "options"
    ]
    shared = [
        inspect.Parameter(
            option.name, inspect.Parameter.KEYWORD_ONLY, default=_default_of(option), annotation=hints[option.name]
        )
        for option in fields(RunOptions)
    ]
    run.__doc__ = command.__doc__
    run.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in [*own, *shared]}
    return run


def _default_of(option: Any) -> Any:
    if option.default_factory is not MISSING:
        return option.default_factory()
    return inspect.Parameter.empty if option.default is MISSING else option.default


_SPEC = Annotated[Path, typer.Argument(metavar="SPEC", help="the spec, Markdown or text")]


def deliberate(
    spec: _SPEC,
    prompts: Annotated[
        Path | None, typer.Argument(metavar="PROMPTS", help="the prompts: .jsonl, .json or .txt")
    ] = None,
    *,
    options: RunOptions,
    style: Annotated[
        str | None, typer.Option(help="whether the CoT cites clauses of the spec: cite or internal (default)")
    ] = None,
    samples: Annotated[int | None, typer.Option("-n", "--samples", help="answers per prompt (default: 1)")] = None,
    judge_votes: Annotated[
        int | None, typer.Option("-k", "--judge-votes", help="ratings per row; the minimum counts (default: 3)")
    ] = None,
    threshold: Annotated[float | None, typer.Option(help="minimum score, 1 to 10 (default: 7)")] = None,
    best_of: Annotated[int | None, typer.Option(help="keep at most this many rows per prompt (default: all)")] = None,
    also_no_cot: Annotated[bool | None, typer.Option("--also-no-cot", help="also write rows_no_cot.jsonl")] = None,
    prompts_from_spec: Annotated[
        int | None, typer.Option(metavar="N", help="generate N prompts from the spec, in addition to PROMPTS")
    ] = None,
) -> None:
    """Generate rows of prompt, chain of thought and response from a spec and prompts; the spec is not in the rows."""
    settings = options.settings(
        DeliberateSettings,
        {
            "style": style,
            "samples": samples,
            "judge_votes": judge_votes,
            "threshold": threshold,
            "best_of": best_of,
            "also_no_cot": also_no_cot,
            "prompts_from_spec": prompts_from_spec,
        },
    )
    if prompts is None and settings.prompts_from_spec is None:
        raise ConfigError("give a file of prompts, or --prompts-from-spec N to generate them from the spec")
    summary = _run(spec, options.out, settings, lambda session: generate_rows(session, settings, prompts))
    _print_summary(
        options.out, summary, "rows", f"{summary['rows']} rows of {summary['prompts']} prompts", "rows.jsonl"
    )


def document(
    spec: _SPEC,
    *,
    options: RunOptions,
    tokens: Annotated[str | None, typer.Option(metavar="N", help="token budget, e.g. 500k (default: 1M)")] = None,
    emphasis: Annotated[
        str | None, typer.Option(help="what the documents emphasize: rules, values (default) or rules_and_values")
    ] = None,
    critique: Annotated[bool | None, typer.Option("--critique", help="critique and rewrite each document")] = None,
) -> None:
    """Generate midtraining documents about a spec, up to a token budget."""
    settings = options.settings(
        DocumentSettings,
        {"tokens": None if tokens is None else _tokens(tokens), "emphasis": emphasis, "critique": critique},
    )
    summary = _run(spec, options.out, settings, lambda session: generate_documents(session, settings))
    result = f"{summary['documents']} documents, {summary['tokens']:,} tokens"
    _print_summary(options.out, summary, "documents", result, "documents.jsonl")


def data_report(
    data: Annotated[
        list[Path],
        typer.Argument(
            metavar="DATA...",
            help="a folder that deliberate or document wrote, or a file of rows; several are compared as corpora",
        ),
    ],
    spec: Annotated[Path | None, typer.Option(help="the spec, to recognize the sections that are cited")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--out", metavar="DIR", help="folder of report.html and report.json (default: that of the data)"
        ),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="MODEL", help="for several DATA: a model folder or name, to count tokens")
    ] = None,
) -> None:
    """Report on the quality of generated data, as HTML and JSON. Several DATA are compared as matched corpora."""
    from delib_fast.data.corpus import monitoring_warning
    from delib_fast.reports.corpora import mismatch_text, write_comparison
    from delib_fast.reports.data_report import write_report

    if len(data) == 1:
        if tokenizer is not None:
            raise ConfigError("--tokenizer counts the tokens of several DATA; give more than one, or leave it out")
        for path in write_report(data[0], spec=spec, out=out):
            echo(path)
        return
    if spec is not None:
        raise ConfigError("--spec is for a single DATA; leave it out, or give one")
    page, file = write_comparison(data, tokenizer=tokenizer, out=out)
    figures = json.loads(file.read_text(encoding="utf-8"))
    echo(mismatch_text(figures["mismatches"]))
    for name, corpus in figures["corpora"].items():
        if warning := monitoring_warning(corpus):
            echo(f"{name}: {warning}")
    echo(page)
    echo(file)


# --- shared ---------------------------------------------------------------------------------------------------


def _tokens(text: str) -> int:
    """The number of tokens in a text such as 250000, 250k or 1.5M."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmMgG]?)\s*", text)
    if not match or float(match[1]) <= 0:
        raise ConfigError(f"--tokens {text}: write it as 250000, 250k or 1.5M")
    return round(float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}[match[2].lower()])


def _run(
    spec_file: Path, out: Path, settings: RunSettings, work: Callable[[Session], Awaitable[dict[str, Any]]]
) -> dict[str, Any]:
    """Open a session, do the work in it and return its summary; or exit with a message.

    Exit codes: 2 invalid input; 3 the endpoint or the disk failed, or too few answers are usable; 4 the budget
    does not cover another request; 130 interrupted. After 3, 4 and 130 the same command resumes the run.
    """
    spec = Spec.read(
        spec_file,
        model_name=settings.model_name,
        provider_name=settings.provider_name,
        cut_numbered_items=settings.cut_numbered_items,
    )

    async def main() -> dict[str, Any]:
        async with Session.open(out, spec, settings) as session:
            try:
                return await work(session)
            except BaseException as error:
                try:
                    session.write_summary({"unfinished": True})
                except WriteError as fault:  # it must not replace the error that ended the run
                    error.add_note(str(fault))
                raise

    with exit_with_message(out):
        return asyncio.run(main())


@contextlib.contextmanager
def exit_with_message(out: Path) -> Iterator[None]:
    """Exit with a message and the code that `_run` documents if the requests to a model end in an error.

    Args:
        out: the folder of the run, which keeps the answers.
    """
    kept = f"every answer is kept in {out}; the same command resumes from there"
    try:
        yield
    except (Interrupted, KeyboardInterrupt):
        _exit(f"stopped: {kept}", 130)
    except BudgetSpent as error:
        _exit(f"stopped: {error}; {kept} once the limit is raised", 4)
    except NoAnswer as error:
        _exit(f"error: {error.reason}: {error}\n{kept}", 3)
    except (EndpointError, LowYield) as error:
        _exit(f"error: {error}\n{kept}", 3)
    except WriteError as error:
        _exit(f"error: {error}", 3)
    except OSError as error:  # of a file that is not written through the session, e.g. one that is renamed
        _exit(f"error: {WriteError(Path(error.filename or out), error)}", 3)
    except SpecLeakError as error:
        _exit(f"error: {error}\nThis is a bug; no rows were written.", 3)


def _exit(message: str, code: int) -> NoReturn:
    """Print the message to stderr and exit with the code."""
    echo(message, err=True)
    raise typer.Exit(code)


def _print_dropped(path: Path) -> None:
    """Print the beginning of the first dropped sample of each reason, if there is such a file."""
    if not path.exists():
        return
    shown: dict[str, str] = {}
    for line in read_text(path).split("\n"):
        if line:
            sample = json.loads(line)
            text = sample["answer"] or "\n".join(filter(None, (sample["cot"], sample["response"])))
            shown.setdefault(sample["reason"], " ".join(text.split())[:_SHOWN_CHARS])
    for reason, text in shown.items():
        echo(f"  {reason}: {text!r}" if text else f"  {reason}")
    echo(f"all of them: {path}")


def _print_summary(out: Path, summary: Mapping[str, Any], made: str, result: str, file: str) -> None:
    """Print what a run generated, dropped and paid for; exit with 3 if it made nothing.

    Args:
        made: the key of the number of rows or documents in the summary.
        result: the numbers of what is in `file`, as text.
    """
    paid = summary["paid"]
    cost = f", cost {money(paid['cost'])}" if paid["cost"] is not None else ""
    echo(f"{result} → {out / file}")
    if summary["dropped"]:
        echo("dropped: " + ", ".join(f"{reason} {n}" for reason, n in summary["dropped"].items()))
        _print_dropped(out / "dropped.jsonl")
    echo(
        f"answers paid for: {paid['answers']} ({paid['prompt_tokens']:,} + {paid['completion_tokens']:,} tokens"
        f"{cost}), {summary['this_run']['answers']} in this run; retries "
        + (json.dumps(summary["this_run"]["retries"]) if summary["this_run"]["retries"] else "none")
    )
    if not summary[made]:
        _exit(
            f"error: nothing was made: {summary['first_drop'] or 'the model proposed nothing to make'}\n"
            f"every answer is kept in {out}; see {out / 'summary.json'}",
            3,
        )
    if unanswered := summary["dropped"].get("no_answer"):
        echo(f"{unanswered} requests got no answer; the same command sends them again")
