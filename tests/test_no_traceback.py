"""Properties: no text from outside ends in a traceback. A parser accepts it, or raises the project's own error.

`--full` runs 200 times as many examples.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from helpers.hostile_examples import ENCODABLE, KEYS, NUMBERS, ROWS, TEXT, TREES, as_json, check, write
from hypothesis import strategies as st

from delib_fast.config import Config, ConfigError, SourceConfig
from delib_fast.config.load import FileKind, dump_config, load, load_config, parse
from delib_fast.data import DataError, read_source
from delib_fast.data.read.cot_tags import split_cot
from delib_fast.data.read.formats import FormatSettings, rows_of
from delib_fast.data.read.json_list import list_values
from delib_fast.data.read.tools import read_call_text, read_calls, read_tools
from delib_fast.datagen.citations import cited, labels_of_names, labels_of_spec, mentions_spec, policy_sentences
from delib_fast.datagen.documents import _parse_faults
from delib_fast.datagen.filters import format_fault
from delib_fast.datagen.judge import _verdict_parser
from delib_fast.datagen.parsing import MalformedAnswer, json_values, parse_scores, parse_strings, split_answer
from delib_fast.datagen.prompt_files import BUILT_IN, PromptFiles
from delib_fast.datagen.refusals import classify_reply
from delib_fast.datagen.request_log import Answer
from delib_fast.datagen.settings import AXES, SETTINGS_FILE, DeliberateSettings, DocumentSettings
from delib_fast.datagen.spec import Spec, first_sentence
from delib_fast.datagen.spec_leak import SpecGuard
from delib_fast.datagen.user_prompts import read_prompts

# --- rows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".txt", ".md"])
def test_files_of_rows(tmp_path, full, suffix, on_bad_row):
    config = {"on_bad_row": on_bad_row, "cut": "headings"} if suffix in (".txt", ".md") else {"on_bad_row": on_bad_row}

    def body(data: bytes) -> None:
        path = write(tmp_path / f"rows{suffix}", data)
        with contextlib.suppress(DataError, ConfigError):
            for row in read_source("rows", SourceConfig.model_validate({"path": str(path), **config})):
                assert row.texts is not None

    data = st.one_of(
        st.binary(max_size=200),
        ENCODABLE.map(str.encode),
        st.lists(ROWS, max_size=3).map(lambda rows: b"\n".join(map(as_json, rows))),
        st.lists(ROWS, max_size=3).map(as_json),
    )
    check(body, data, full=full, factor=0.5)


def test_parquet_files(tmp_path, full):
    import pyarrow as pa
    import pyarrow.parquet as pq

    def body(rows: list[dict[str, str | None]], broken: bytes) -> None:
        path = tmp_path / "rows.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path)
        whole = path.read_bytes()
        at = len(broken) * 7 % max(1, len(whole))
        for data in (whole, whole[:at] + broken + whole[at + len(broken) :], broken):
            write(path, data)
            with contextlib.suppress(DataError, ConfigError):
                list(read_source("rows", SourceConfig.model_validate({"path": str(path)})))

    columns = st.dictionaries(st.sampled_from(["text", "prompt", "response", "messages", "a"]), ENCODABLE, max_size=3)
    check(body, st.lists(columns, max_size=3), st.binary(max_size=20), full=full, factor=0.3)


def test_objects_of_rows(full):
    def body(row: Any) -> None:
        for turns in ("last", "each"):
            with contextlib.suppress(DataError):
                assert rows_of(row, FormatSettings("rows", turns=turns), "f:1")

    check(body, ROWS, full=full, factor=3)


def test_parts_of_rows(full):
    def body(text: str, tree: Any) -> None:
        for parse_part, value in (
            (split_cot, text),
            (read_tools, tree),
            (read_tools, text),
            (lambda v: read_calls(v, "m"), tree),
            (lambda v: read_call_text(v, "m"), text),
            (lambda v: list(list_values(v, Path("x"))), text),
        ):
            with contextlib.suppress(DataError):
                parse_part(value)

    check(body, TEXT, TREES, full=full, factor=2)


# --- configurations ---------------------------------------------------------------------------------------------

YAML = st.one_of(
    TREES.map(lambda tree: yaml.safe_dump(tree)),
    st.lists(
        st.sampled_from(
            ["a: ", "- ", "? ", ": ", "[", "]", "{", "}", "&a ", "*a", "<<: *a", "!!python/object:os.system",
             "!!binary x", "!!bool x", "!!int ''", "!!int x", "!!float x", "!!timestamp x", "2001-99-99",
             "2001-02-30 25:61:61", "1:99:99", "0x", "0b2", ".inf", "1e5", "|\n", ">\n", "'", '"', "\n", "  ", "\t",
             "#", "%YAML 9.9\n", "---\n", "...\n", "data: ", "stages: ", "path: ", "kind: aft\n", "=", "~",
             "9" * 5000, "\0", "\ud800", "\x85"]
        ),
        max_size=12,
    ).map("".join),
    TEXT,
)  # fmt: skip


def kinds() -> list[tuple[type, FileKind]]:
    from delib_fast.config.load import RUN_FILE
    from delib_fast.evals.settings import EvalConfig

    return [
        (Config, RUN_FILE),
        (DeliberateSettings, SETTINGS_FILE),
        (DocumentSettings, SETTINGS_FILE),
        (EvalConfig, FileKind("an evaluation")),
    ]


def test_yaml_files(tmp_path, full):
    def body(text: str, override: str) -> None:
        path = write(tmp_path / "x.yaml", text.encode(errors="surrogatepass"))
        for kind, file_kind in kinds():
            with contextlib.suppress(ConfigError):
                load(kind, path, file_kind)
            with contextlib.suppress(ConfigError):
                load(kind, None, file_kind, [override])

    check(body, YAML, st.builds("{}={}".format, st.one_of(KEYS, TEXT), YAML), full=full)


def test_studies(tmp_path, full):
    from delib_fast.study.settings import load_study

    def body(text: str) -> None:
        with contextlib.suppress(ConfigError):
            load_study(write(tmp_path / "study.yaml", text.encode(errors="surrogatepass")))

    check(body, YAML, full=full)


def places(tree: Any) -> list[tuple[Any, Any]]:
    """(mapping or list, key or index) of every value of a tree."""
    found = []
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        found += [(tree, key), *places(tree[key])]
    return found


def test_configurations_with_one_other_value(full):
    text = (Path(__file__).parents[1] / "examples" / "quickstart_tiny.yaml").read_text()
    count = len(places(yaml.safe_load(text)))

    def body(at: int, value: Any) -> None:
        tree = yaml.safe_load(text)
        holder, key = places(tree)[at % count]
        holder[key] = value
        with contextlib.suppress(ConfigError):
            dump_config(parse(Config, tree, where="x"))

    check(body, st.integers(0, count), TREES, full=full, factor=2)


# --- specs and prompts ------------------------------------------------------------------------------------------


def test_specs(full):
    def body(text: str, name: str) -> None:
        try:
            spec = Spec.of(text)
        except ConfigError:
            return
        assert len({s.id for s in spec.sections}) == len(spec.sections)
        assert all(spec.section(s.id) is s for s in spec.sections)
        spec.section(name)
        spec.for_categories([s.id for s in spec.sections], {s.id: first_sentence(s) for s in spec.sections})
        labels = labels_of_spec(spec)
        cited(name, labels)
        mentions_spec(name, labels, prompt=text)
        SpecGuard(spec).find_leak(name)

    check(body, ENCODABLE, ENCODABLE, full=full, factor=2)


@pytest.mark.parametrize("suffix", [".txt", ".json", ".jsonl"])
def test_files_of_prompts(tmp_path, full, suffix):
    spec = Spec.of("# A\nBe kind.\n# B\nBe plain.")

    def body(data: bytes) -> None:
        with contextlib.suppress(ConfigError):
            prompts = read_prompts(write(tmp_path / f"prompts{suffix}", data), spec)
            assert all(prompt.text and prompt.id and prompt.conversation is not None for prompt in prompts)

    data = st.one_of(st.binary(max_size=100), ENCODABLE.map(str.encode), ROWS.map(as_json), st.lists(ROWS).map(as_json))
    check(body, data, full=full)


def test_prompt_files(tmp_path, full):
    def body(data: bytes) -> None:
        write(tmp_path / "judge.md", data)
        with contextlib.suppress(ConfigError):
            PromptFiles(tmp_path)

    whole = (BUILT_IN / "judge.md").read_bytes()
    changed = st.builds(
        lambda at, new: whole[:at] + new + whole[at:], st.integers(0, len(whole)), st.binary(max_size=9)
    )
    check(body, st.one_of(st.binary(max_size=100), ENCODABLE.map(str.encode), changed), full=full, factor=0.5)


# --- answers ----------------------------------------------------------------------------------------------------


def around(tree: Any) -> str:
    return f"Here:\n```json\n{json.dumps(tree)}\n```"


ANSWERS = st.one_of(
    TEXT,
    TREES.map(around),
    st.fixed_dictionaries({axis: st.one_of(NUMBERS, TREES) for axis in AXES}, optional={"why": TREES}).map(around),
    st.fixed_dictionaries({"faults": st.one_of(st.lists(TEXT), TREES)}).map(around),
    st.lists(TEXT, max_size=4).map(around),
)


def test_answers(full):
    labels = labels_of_names(["Self-Harm / Other", "rule-5", "-", ""])
    styles = [DeliberateSettings.model_validate({"style": style}) for style in ("cite", "internal")]

    def body(text: str) -> None:
        answer = Answer(text, "stop")
        for kind in (dict, list):
            assert all(isinstance(value, kind) for value in json_values(text, kind))
        for parse_answer in (
            lambda: parse_scores(text),
            lambda: parse_strings(text),
            lambda: _parse_faults(answer),
            lambda: _verdict_parser(["comply", "refuse"])(answer),
        ):
            with contextlib.suppress(MalformedAnswer):
                json.dumps(parse_answer(), ensure_ascii=False).encode()  # what is kept can be written
        for cot_from in ("tags", "reasoning"):
            parts = split_answer(answer, cot_from)
            for style in styles:
                format_fault(answer, parts, style, labels, text)
        classify_reply(text, text)
        policy_sentences(text, spec_words=True)

    check(body, ANSWERS, full=full, factor=3)


def test_replies_of_an_evaluated_model(full):
    from delib_fast.evals.agentic.conduct import conduct
    from delib_fast.evals.agentic.prompts import SCENARIOS, Condition
    from delib_fast.evals.metrics.choices import _format, _wrong_numbers, chosen_option, result_of
    from delib_fast.evals.metrics.cot_edits import corrupted, shuffled, truncated
    from delib_fast.evals.metrics.legibility import repeated_share, script_of, unknown_share
    from delib_fast.evals.metrics.monitors import Transcript, _features, step_holds
    from delib_fast.evals.sampling import parse_reply

    conditions = [Condition(scenario, "none", "none") for scenario in SCENARIOS]

    def body(text: str) -> None:
        for opened in (True, False, None):
            parse_reply(text, opened=opened)
        for condition in conditions:
            conduct(condition, text)
        result = result_of(text)
        for number in (result, *_wrong_numbers(SimpleNamespace(cot=text), result or Decimal(1), 3, random.Random(0))):
            assert number is None or _format(number)
        chosen_option(text, 4)
        assert corrupted(text, "seed").text != text
        shuffled(text, "seed")
        truncated(text, 0.5)
        unknown_share(text, ())
        repeated_share(text)
        script_of(text)
        step_holds(text, text)
        _features([Transcript("a", text, text, text, True)], "cot+response")

    check(body, ENCODABLE, full=full, factor=2)


# --- terminals and secrets --------------------------------------------------------------------------------------


def test_messages(full, monkeypatch):
    from delib_fast.redaction import redact, redact_text, register_secrets
    from delib_fast.terminal import PlainConsole, printable

    monkeypatch.setattr("delib_fast.redaction._registered", set())

    def body(text: str, tree: Any) -> None:
        assert printable(printable(text)) == printable(text)
        assert redact_text(redact_text(text)) == redact_text(text)
        redact(tree)
        register_secrets(tree)
        PlainConsole(file=io.StringIO()).print(text)

    check(body, TEXT, TREES, full=full)


def test_load_config_takes_a_path_that_is_not_a_file(tmp_path):
    for path in (tmp_path, tmp_path / "a" / "b", tmp_path / ("x" * 300), Path("\0"), Path("\udc80")):
        with pytest.raises(ConfigError):
            load_config(path)


# --- what endpoints send ----------------------------------------------------------------------------------------


def test_bodies_of_endpoints(full):
    from delib_fast.datagen.backends import EndpointError, RequestRejected, Retry, describe
    from delib_fast.datagen.dialects import decode, error_of, retry_after
    from delib_fast.datagen.endpoints import EndpointBackend
    from delib_fast.datagen.settings import EndpointSettings
    from delib_fast.datagen.transport import Reply

    choice = st.fixed_dictionaries({}, optional={"message": TREES, "finish_reason": TREES, "index": TREES})
    body = st.one_of(
        TREES,
        st.fixed_dictionaries(
            {"choices": st.one_of(TREES, st.lists(choice, max_size=2))},
            optional={"usage": TREES, "model": TREES, "error": TREES},
        ),
        st.fixed_dictionaries({"content": TREES}, optional={"stop_reason": TREES, "usage": TREES, "error": TREES}),
        st.fixed_dictionaries({"error": st.one_of(TREES, st.dictionaries(KEYS, TREES, max_size=3))}),
    ).map(as_json)
    connections = [
        EndpointBackend(EndpointSettings.model_validate({"model": "m", "base_url": "http://127.0.0.1:1", "api": api}))
        for api in ("openai", "anthropic")
    ]

    def check_body(data: bytes, status: int, header: str) -> None:
        for backend in connections:
            connection, text = backend._connection, ""
            try:
                found = decode(data)
                error_of(found)
                answer = connection.parse(found, "chat")
                json.dumps([answer.text, answer.reasoning, answer.finish, answer.served_by]).encode()
            except (Retry, RequestRejected, EndpointError) as refusal:
                text = describe(str(refusal))
            assert text.isprintable()
            error = connection.status_error(Reply(status, {"retry-after": header}, data), "chat")
            assert str(error).isprintable()
        seconds = retry_after({"retry-after": header})
        assert seconds is None or seconds >= 0

    data = st.one_of(st.binary(max_size=60), ENCODABLE.map(str.encode), body)
    headers = st.one_of(TEXT, st.sampled_from(["Wed, 21 Oct 2015 07:28:00 GMT", "nan", "-1", "1e999", "31 Feb 99999"]))
    check(check_body, data, st.sampled_from([400, 401, 404, 429, 500]), headers, full=full, factor=2)
