"""Every parser and regular expression that sees text from outside takes time linear in the text, whatever the text is.

A parser that is quadratic in 200,000 line breaks of an answer freezes a run, Ctrl-C included.
"""

from __future__ import annotations

import ast
import contextlib
import random
import re
from collections.abc import Callable
from decimal import Decimal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.hostile_text import assert_linear

from delib_fast import redaction

PACKAGE = Path(__file__).parents[1] / "delib_fast"
# Modules whose regular expressions see no text from outside, each with what they see instead.
NOT_FROM_OUTSIDE = {
    "checkpoint/format.py": "names of folders",
    "cli/datagen.py": "an option of the command line",
    "engine/slurm.py": "variables of Slurm",
    "training/throughput.py": "names of GPUs",
    "stages.py": "arguments of the Python API",
}


def literal(node: ast.expr) -> str | None:
    """The string of a literal; None for anything else."""
    try:
        value = ast.literal_eval(node)
    except ValueError:
        return None
    return value if isinstance(value, str) else None


def regular_expressions() -> dict[str, tuple[str, re.Pattern[str], str]]:
    """`file:line` → (file, pattern, how it is used: match, fullmatch or search) of every expression in the source."""
    found: dict[str, tuple[str, re.Pattern[str], str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        file, source = str(path.relative_to(PACKAGE)), path.read_text()
        tree = ast.parse(source)
        names = {
            id(node.value): ast.unparse(node.targets[0]) for node in ast.walk(tree) if isinstance(node, ast.Assign)
        }
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id == "re"
                and node.func.attr not in ("escape", "Pattern")
            ):
                flags = 0
                for argument in [*node.args[1:], *(k.value for k in node.keywords if k.arg == "flags")]:
                    for name in ast.walk(argument):
                        if isinstance(name, ast.Attribute) and name.attr.isupper():
                            flags |= getattr(re, name.attr)
                text = literal(node.args[0])
                methods = {node.func.attr}
                if node.func.attr == "compile":  # a constant; which of its methods are called
                    methods = set(re.findall(rf"\b{re.escape(names.get(id(node), '?'))}\.(\w+)", source))
                only = next((m for m in ("match", "fullmatch") if methods == {m}), "search")
                if text is not None:
                    found[f"{file}:{node.lineno}"] = (file, re.compile(text, flags), only)
    return found


EXPRESSIONS = regular_expressions()


def test_the_source_has_expressions():
    assert len(EXPRESSIONS) > 60
    assert {file for file, *_ in EXPRESSIONS.values()} > NOT_FROM_OUTSIDE.keys(), "a file without expressions is listed"


@pytest.mark.parametrize(
    "name", [name for name, (file, *_) in EXPRESSIONS.items() if file not in NOT_FROM_OUTSIDE], ids=str
)
def test_regular_expressions_are_linear(name, full):
    _, pattern, method = EXPRESSIONS[name]
    use: Callable[[str], object] = pattern.findall if method == "search" else getattr(pattern, method)
    assert assert_linear(use, name, full=full, seed=len(name)) > 50


def quiet(parse: Callable[[str], object], *errors: type[Exception]) -> Callable[[str], object]:
    """The parser without the errors with which it refuses a text."""

    def run(text: str) -> None:
        with contextlib.suppress(*errors):
            parse(text)

    return run


def parsers(folder: Path) -> dict[str, Callable[[str], object]]:
    """Every parser of text from outside: answers, rows, specs, configurations, prompt files, messages of endpoints."""
    from delib_fast.config import ConfigError
    from delib_fast.config.base import nearest
    from delib_fast.data import DataError
    from delib_fast.data.decontamination import find_ngram, ngram_hashes, words_of
    from delib_fast.data.read.cot_tags import split_cot
    from delib_fast.data.read.formats import FormatSettings, rows_of
    from delib_fast.data.read.json_list import list_values
    from delib_fast.data.read.jsonl import HashingFile, read_items
    from delib_fast.data.read.strict_json import decode
    from delib_fast.data.read.text_files import cut_at_headings
    from delib_fast.data.read.tools import read_call_text, read_tools
    from delib_fast.datagen import dialects
    from delib_fast.datagen.answers import Answer, clean_text
    from delib_fast.datagen.backends import Retry, describe
    from delib_fast.datagen.citations import cited, labels_of_names, labels_of_spec, mentions_spec, policy_sentences
    from delib_fast.datagen.dedup import NearDuplicates, text_key
    from delib_fast.datagen.dialects import AnthropicDialect, OpenAIDialect, error_of, retry_after
    from delib_fast.datagen.documents import _parse_faults
    from delib_fast.datagen.filters import format_fault
    from delib_fast.datagen.judge import _verdict_parser
    from delib_fast.datagen.parsing import (
        MalformedAnswer,
        json_values,
        parse_scores,
        parse_strings,
        split_answer,
        strip_thinking,
    )
    from delib_fast.datagen.prompt_files import PromptFiles, _read, quoted
    from delib_fast.datagen.refusals import classify_reply
    from delib_fast.datagen.session import _parse_summary
    from delib_fast.datagen.settings import DeliberateSettings, check_base_url
    from delib_fast.datagen.spec import Spec, first_sentence
    from delib_fast.datagen.spec_leak import SpecGuard
    from delib_fast.datagen.user_prompts import read_prompts
    from delib_fast.evals.agentic.conduct import acted, actions, conduct, plans_it
    from delib_fast.evals.agentic.prompts import SCENARIOS, Condition
    from delib_fast.evals.metrics.choices import _wrong_numbers, chosen_option, result_of
    from delib_fast.evals.metrics.cot_edits import corrupted, sentences, shuffled, truncated
    from delib_fast.evals.metrics.hints import HINTS
    from delib_fast.evals.metrics.legibility import compression, repeated_share, script_of, unknown_share
    from delib_fast.evals.metrics.monitors import Transcript, _features, step_holds
    from delib_fast.evals.sampling import parse_reply
    from delib_fast.preview.tokens import make_visible
    from delib_fast.redaction import has_entropy, is_secret_name, redact, redact_text, scrub
    from delib_fast.reports.text_statistics import diversity, near_duplicates
    from delib_fast.terminal import printable

    spec = Spec.of("# V1. Honesty\nIt says what it believes, and how sure it is of it.\n# - Care\nIt does.\n# A a a\nx")
    labels = [*labels_of_spec(spec), *labels_of_names(["Self-Harm / - Other", "rule-5"])]
    settings = {style: DeliberateSettings.model_validate({"style": style}) for style in ("cite", "internal")}
    guard = SpecGuard(spec)
    prompts = PromptFiles()
    condition = Condition(SCENARIOS[0], "none", "none")
    formats = FormatSettings("rows")

    def answer(text: str) -> Answer:
        return Answer(text, "stop")

    def fault(chosen: DeliberateSettings, text: str) -> str | None:
        whole = answer(f"<deliberation>{text}</deliberation><reply>{text}</reply>")
        return format_fault(answer(text), split_answer(whole, "tags"), chosen, labels, text)

    def write(name: str, text: str) -> Path:
        path = folder / name
        path.write_text(text, encoding="utf-8", errors="replace", newline="")
        return path

    def clean(text: str) -> str:
        return text.encode(errors="replace").decode()

    def spec_sections(text: str) -> None:
        with contextlib.suppress(ConfigError):
            found = Spec.of(clean(text))
            summaries = {s.id: first_sentence(s) for s in found.sections}
            assert [found.section(s.id) for s in found.sections] == list(found.sections)
            found.for_categories([s.id for s in found.sections[:3]], summaries)
            SpecGuard(found)

    def items(name: str) -> Callable[[str], object]:
        def read(text: str) -> None:
            with contextlib.closing(HashingFile(path := write(name, text))) as file, contextlib.suppress(DataError):
                for item in read_items(file, path):
                    with contextlib.suppress(DataError):
                        rows_of(item.value, formats, "file:1")

        return read

    def user_prompts(name: str) -> Callable[[str], object]:
        return quiet(lambda text: read_prompts(write(name, text), spec), ConfigError)

    return {
        # answers
        "strip_thinking": strip_thinking,
        "json_values of objects": lambda text: json_values(text, dict),
        "json_values of lists": lambda text: json_values(text, list),
        "parse_scores": quiet(parse_scores, MalformedAnswer),
        "parse_strings": quiet(parse_strings, MalformedAnswer),
        "parse_faults": quiet(lambda text: _parse_faults(answer(text)), MalformedAnswer),
        "parse_summary": quiet(lambda text: _parse_summary(answer(text)), MalformedAnswer),
        "parse_verdict": quiet(lambda text: _verdict_parser(["comply"])(answer(text)), MalformedAnswer),
        "split_answer at tags": lambda text: split_answer(answer(text), "tags"),
        "split_answer at reasoning": lambda text: split_answer(answer(text), "reasoning"),
        **{f"format_fault {style}": partial(fault, chosen) for style, chosen in settings.items()},
        "describe": describe,
        "clean_text": clean_text,
        "decode": quiet(lambda text: error_of(dialects.decode(clean(text).encode())), Retry),
        "parse of a dialect": quiet(
            lambda text: [
                dialect.parse(
                    {"choices": [{"message": {"content": text}}], "content": [{"type": "text", "text": text}]}
                )
                for dialect in (OpenAIDialect(), AnthropicDialect())
            ],
            Retry,
        ),
        "retry_after": lambda text: retry_after({"retry-after": text}),
        "check_base_url": quiet(lambda text: check_base_url(f"https://{text}"), ValueError),
        "cited": lambda text: cited(text, labels),
        "mentions_spec": lambda text: mentions_spec(text, labels, prompt=text),
        "policy_sentences": lambda text: policy_sentences(text, spec_words=True),
        "labels_of_names": lambda text: cited(text, labels_of_names([text])),
        "classify_reply": lambda text: classify_reply("", text),
        "text_key": text_key,
        "near_duplicates": lambda text: NearDuplicates(0.8).find_or_add("", text),
        "find_leak": guard.find_leak,
        # specs, prompt files, prompts
        "spec": spec_sections,
        "prompt file": quiet(lambda text: _read(write("judge.md", f"{text}\n## user\n{text}")), ConfigError),
        "prompt": lambda text: prompts.chat("summarize", title=text, section=text),
        "quoted": lambda text: quoted("reply", clean(text)),
        "prompts .txt": user_prompts("prompts.txt"),
        "prompts .json": user_prompts("prompts.json"),
        "prompts .jsonl": user_prompts("prompts.jsonl"),
        # rows
        "split_cot": quiet(split_cot, DataError),
        "decode of a row": quiet(decode, DataError),
        "list_values": quiet(lambda text: list(list_values(f"[{text}", Path("x"))), DataError),
        "rows .jsonl": items("rows.jsonl"),
        "cut_at_headings": lambda text: [s.text for s in cut_at_headings(text)],
        "read_tools": quiet(read_tools, DataError),
        "read_call_text": quiet(lambda text: read_call_text(text, "messages[0]"), DataError),
        "row pair": quiet(lambda text: rows_of({"question": text, "answer": text}, formats, "f:1"), DataError),
        "row keys": quiet(lambda text: rows_of({text: text}, formats, "f:1"), DataError),
        "row chat": quiet(
            lambda text: rows_of(
                {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]},
                formats,
                "f:1",
            ),
            DataError,
        ),
        "words_of": words_of,
        "ngrams": lambda text: find_ngram(text, ngram_hashes("a b c d"), 4),
        # configurations
        "nearest": lambda text: nearest(text, ["model", "stages", "data", "optimizer"]),
        # evaluations
        "parse_reply": lambda text: [parse_reply(text, opened=opened) for opened in (True, False, None)],
        "actions": actions,
        "acted": lambda text: [acted(s, text) for s in SCENARIOS],
        "plans_it": lambda text: [plans_it(s, text) for s in SCENARIOS],
        "conduct": lambda text: conduct(condition, text),
        "result_of": result_of,
        "wrong numbers": lambda text: _wrong_numbers(SimpleNamespace(cot=text), Decimal(7), 3, random.Random(0)),
        "chosen_option": lambda text: chosen_option(text, 8),
        "sentences": sentences,
        "shuffled": lambda text: shuffled(text, "seed"),
        "truncated": lambda text: truncated(text, 0.5),
        "corrupted": lambda text: corrupted(text, "seed"),
        "legibility": lambda text: (unknown_share(text, ()), repeated_share(text), script_of(text)),
        "compression": lambda text: compression(clean(text)),
        "hints": lambda text: [kind.mention.search(text) for kind in HINTS],
        "step_holds": lambda text: step_holds(text, "1"),
        "monitor": lambda text: _features([Transcript("a", clean(text), "", clean(text), True)], "response"),
        # reports, terminals and secrets
        "printable": printable,
        "scrub": scrub,
        "redact_text": redact_text,
        "redact": lambda text: redact({"url": f"https://{text}", "x": [text]}),
        "has_entropy": has_entropy,
        "is_secret_name": is_secret_name,
        "diversity": lambda text: diversity([text]),
        "near_duplicates of a report": lambda text: near_duplicates([text, text]),
        "make_visible": make_visible,
    }


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    """The parsers, with a secret to search for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(redaction, "_registered", {"9f86d081884c7d659a2feaa0c55ad015"})
        yield parsers(tmp_path_factory.mktemp("hostile"))


# Parsers with a larger constant: an object per line.
SLOWER = {"prompts .txt": 6, "prompts .jsonl": 6}


def test_parsers_are_linear(registry, full):
    """One test: with a test for each, collecting them would import every module that has a parser."""
    for name, parse in registry.items():
        assert assert_linear(parse, name, full=full, seed=len(name), slower=SLOWER.get(name, 1)) > 50, name
