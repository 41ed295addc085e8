"""The whole command: suites, stored results, tables, the page."""

from __future__ import annotations

import json
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import torch
import typer
from eval_models import ROOT, make_model
from markupsafe import escape
from rich.console import Console
from typer.testing import CliRunner

from delib_fast.cli.evaluate import register
from delib_fast.config import ConfigError, SourceConfig
from delib_fast.data import Message, read_source, split_holdout
from delib_fast.data.read import source_cache
from delib_fast.digests import read_json_lines, write_json
from delib_fast.evals.intervals import Estimate, mean, wilson
from delib_fast.evals.metrics.openings import OPENING
from delib_fast.evals.results import SuiteResult, Table, result_from_json, to_json_data
from delib_fast.evals.run import evaluate
from delib_fast.evals.sampling import Reply
from delib_fast.evals.settings import SAMPLED, SUITES, load_eval_config
from delib_fast.evals.target import EvalTarget
from delib_fast.files import hash_file
from delib_fast.models import export_model
from delib_fast.reports.eval_page import WIDTH, cell_text, print_tables, rich_table, write_page

EXAMPLES = ROOT / "examples"
SOLUTIONS = [
    {
        "question": f"What is {k} + {k}?",
        "a": {"is_correct": True, "solution": f"<<{k}+{k}={2 * k}>>\nA: {2 * k}"},
        "b": {"is_correct": False, "solution": f"<<{k}+{k}={k}>>\nA: {k}"},
    }
    for k in range(1, 31)
]


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A folder with model/, base/ and labelled solutions."""
    path = tmp_path_factory.mktemp("target")
    export_model(make_model(tokenizer, 0), tokenizer, path / "model")
    export_model(make_model(tokenizer, 1), tokenizer, path / "base")
    (path / "solutions.jsonl").write_text("".join(json.dumps(s) + "\n" for s in SOLUTIONS))
    return path


def settings_for(folder, **changes):
    given = {
        "model": str(folder / "model"),
        "base": str(folder / "base"),
        "suites": "all",
        "limit": 4,
        "rows": {"held": str(EXAMPLES / "data/deliberation_heldout.jsonl")},
        "spec_words": True,
        "questions": str(EXAMPLES / "evals/questions.jsonl"),
        "solutions": str(folder / "solutions.jsonl"),
        "refusal_prompts": str(EXAMPLES / "evals/refusal_prompts.csv"),
        "refusal_labelled": str(EXAMPLES / "evals/refusal_labelled.jsonl"),
        "sampling": {"max_new_tokens": 6},
        "out": str(folder / "out"),
    }
    return load_eval_config(None, **(given | changes))


@pytest.fixture(scope="module")
def done(folder):
    settings = settings_for(folder, limit=None, suites="monitor")
    evaluate(EvalTarget(folder / "model", settings))
    settings = settings_for(folder)
    return evaluate(EvalTarget(folder / "model", settings))


def test_every_suite_but_dose_runs_on_a_model_folder(done):
    assert [r.suite for r in done.results] == [s for s in SUITES if s not in done.skipped]
    assert "give a run directory" in done.skipped["dose"]
    # 4 labelled questions are too few for the folds of the monitor
    assert set(done.skipped) <= {"dose", "monitor"}


def test_precision_auto_is_what_the_device_computes(folder):
    from delib_fast.config.dtypes import DTYPES
    from delib_fast.models.precision import native_precision

    target = EvalTarget(folder / "model", load_eval_config(None, device="cpu", precision="auto"))
    native = native_precision(torch.device("cpu"))
    assert target.precision == native
    assert {p.dtype for p in target.scorer.model.parameters()} == {DTYPES[native]}
    assert EvalTarget(folder / "model", load_eval_config(None, precision="fp16")).precision == "fp16"


def test_training_rows_of_a_large_source_are_not_kept_in_memory(folder, tmp_path, monkeypatch):
    """Held-out and training rows are split as in training; those of a large file are re-read."""
    path = EXAMPLES / "data/deliberation.jsonl"
    (tmp_path / "config.yaml").write_text(
        json.dumps(
            {
                "run_dir": str(tmp_path),
                "model": {"path": str(folder / "base")},
                "data": {"rows": {"path": str(path), "holdout": 0.2}},
                "stages": [{"kind": "aft", "train": ["rows"], "pack_capacity": 512, "tokens_per_step": 512}],
            }
        )
    )
    config = hash_file(tmp_path / "config.yaml")
    write_json(tmp_path / "ledger.json", {"format": 2, "config": config, "stages": [], "evaluations": []})
    (tmp_path / "model").symlink_to(folder / "model")
    rows = read_source("rows", SourceConfig(path=str(path)))
    for limit in (source_cache.MAX_BYTES_IN_MEMORY, 0):
        monkeypatch.setattr(source_cache, "MAX_BYTES_IN_MEMORY", limit)
        target = EvalTarget(tmp_path, load_eval_config(None))
        for _ in range(2):
            assert [list(target.trained_on), target.held_out] == list(split_holdout(rows, 0.2))
    assert next(target.trained_on) is not next(target.trained_on), "the last target re-reads its large source"


def test_results_are_reused_for_the_same_inputs(done, folder, monkeypatch):
    logged = []
    again = evaluate(EvalTarget(folder / "model", settings_for(folder)), logged.append)
    assert again.results == done.results
    begun = {f"{suite} …" for suite in done.skipped}
    assert all("reused" in line or "skipped" in line or line in begun for line in logged)
    # a different limit or base: only what depends on it is recomputed
    for changes, remade in (({"limit": 3}, "segments"), ({"base": str(folder / "model")}, "drift")):
        logged.clear()
        settings = settings_for(folder, suites=f"{remade},agentic", **changes)
        evaluate(EvalTarget(folder / "model", settings), logged.append)
        assert f"{remade} …" in logged
        assert "agentic: reused from an earlier evaluation" in logged
    evaluate(EvalTarget(folder / "model", settings_for(folder)))  # report.json shows the last command


def test_a_killed_evaluation_resumes(folder, tmp_path, monkeypatch):
    """The second suite is killed; the first one's result is stored, and is not recomputed."""
    settings = settings_for(folder, suites="segments,early", out=str(tmp_path))
    from delib_fast.evals import run

    def killed(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(run._TEACHER_FORCED, "early", killed)
        with pytest.raises(KeyboardInterrupt):
            evaluate(EvalTarget(folder / "model", settings))
    half = next(tmp_path.glob("segments-*.json"))
    logged = []
    evaluate(EvalTarget(folder / "model", settings), logged.append)
    assert logged[0] == "segments: reused from an earlier evaluation"
    assert logged[1] == "early …"
    half.write_text(half.read_text()[:100])  # a damaged result is recomputed
    logged.clear()
    evaluate(EvalTarget(folder / "model", settings), logged.append)
    assert logged[0].endswith("; its suite runs again")
    assert logged[1] == "segments …"


def test_the_hash_of_the_weights_is_that_of_the_ledger(finished, tmp_path):
    """report.json of an evaluation names the weights as ledger.json of the run does."""
    evaluation = evaluate(EvalTarget(finished, load_eval_config(None, suites="segments", limit=1, out=str(tmp_path))))
    ledger = json.loads((finished / "ledger.json").read_text())
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["subject"]["sha256"] == evaluation.target["sha256"] == ledger["stages"][-1]["model"]["sha256"]


def test_without_the_evals_extra_the_error_names_it():
    code = """
import sys
sys.modules.update(scipy=None, sklearn=None, statsmodels=None)  # as if they were not installed
from delib_fast.evals import wilson
try:
    wilson(1, 2)
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "evaluation needs scipy, which is not installed: pip install 'delib-fast[evals]'\n"


def test_the_report_is_strict_json_and_can_be_read_back(done):
    report = json.loads((done.folder / "report.json").read_text(), parse_constant=lambda c: pytest.fail(c))
    assert [s["suite"] for s in report["suites"]] == [r.suite for r in done.results]
    for tree, result in zip(report["suites"], done.results, strict=True):
        assert to_json_data(result_from_json(tree)) == to_json_data(result)
    assert report["subject"]["sha256"]


def test_tables_fit_80_columns(done):
    console = Console(width=WIDTH)
    for result in done.results:
        for table in result.tables:
            needed = console.measure(rich_table(table), options=console.options.update(width=500)).maximum
            assert needed <= WIDTH, (table.title, needed)
    with console.capture() as captured:
        print_tables(done, console)
    assert max(map(len, captured.get().splitlines())) <= WIDTH


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.open, self.outside = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.outside += [v for k, v in attrs if k in ("src", "href") and v and not v.startswith("#")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open[-1:] == [tag]
        self.open.pop()


def test_the_page_is_self_contained(done):
    page = write_page(done).read_text()
    parsed = _Page()
    parsed.feed(page)
    assert not parsed.outside
    assert not parsed.open
    assert parsed.tags.count("table") == sum(len(r.tables) for r in done.results)
    assert parsed.tags.count("svg") == 1


def test_sampled_suites_keep_prompts_replies_and_verdicts(done):
    """In the result, on the page and, for the replies, in the file from which an evaluation resumes."""
    by_suite = {r.suite: r for r in done.results}
    assert {name for name, r in by_suite.items() if r.samples} == set(SAMPLED) - set(done.skipped)
    refusals = by_suite["refusal"].samples
    assert len(refusals) == 4
    assert {s.replies[0].verdict for s in refusals} <= {"comply", "partial", "refuse", "empty reply"}
    assert all(s.label.split(",")[0] in ("safe", "unsafe") for s in refusals)
    natural = by_suite["samples"]
    opening, shares = natural.tables[0].rows[0][1], dict(natural.tables[1].rows)
    assert opening.value == pytest.approx(sum(s.replies[0].opening_log_p for s in natural.samples) / 4)
    segments = {t.columns[1]: t for t in by_suite["segments"].tables}
    assert segments[OPENING].rows[0][1].value == pytest.approx(opening.value, abs=1e-5), "the same prompts"
    closed = sum(s.replies[0].reply.tags == "closed" for s in natural.samples)
    assert (shares["closes it"].value, shares["closes it"].n) == (closed / 4, 4)
    assert len(by_suite["necessity"].samples) == 2 * len(by_suite["hints"].samples) // 3
    prompts = {sample.prompt for r in done.results for sample in r.samples}
    (file,) = done.folder.glob("replies-*.jsonl")
    stored, _ = read_json_lines(file)
    assert prompts <= {tuple(Message(m["role"], m["content"]) for m in record["prompt"]) for record in stored}
    page = write_page(done).read_text()
    assert f"verdict: {refusals[0].replies[0].verdict}" in page
    assert str(escape(refusals[0].prompt[-1].content)) in page


def test_results_of_earlier_versions_can_be_opened():
    """They have neither samples nor numbers by row; their replies have no prompt."""
    tree = {"suite": "s", "title": "S", "note": "", "tables": [], "curves": [], "details": {}}
    assert result_from_json(tree) == SuiteResult("s", "S", "", ())
    old = {"key": "k", "reply": {"cot": None, "response": "r", "tags": "none", "finished": True, "tokens": 1}}
    assert Reply(**old["reply"]).cot_tokens == 0


def test_what_a_model_wrote_is_escaped_on_the_page(done, tmp_path):
    from dataclasses import replace

    bad = SuiteResult("x", "<script>", "a & b", (Table("<i>", ("<b>",), (("<u>",),)),))
    page = write_page(replace(done, results=(bad,), folder=tmp_path)).read_text()
    assert not any(tag in page for tag in ("<script", "<i>", "<b><", "<u>"))


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (wilson(1, 2), "0.50 [0.09, 0.91]"),
        (Estimate(1413.2, 1290.1, 1539.8, 9, "x"), "1413 [1290, 1540]"),
        (Estimate(7.34812, 7.34301, 7.35299, 9, "x"), "7.348 [7.343, 7.353]"),
        (mean([2.0]), "2 [–]"),
        (mean([]), "–"),
        (12345, "12,345"),
        (None, "–"),
        (0.12345, "0.123"),
        (Estimate(0.0, 0.0, 0.0, 9, "x"), "0.000 [0.000, 0.000]"),
    ],
)
def test_cells_show_as_many_digits_as_the_interval_warrants(cell, text):
    assert cell_text(cell) == text


# --- the command line, and errors of the user --------------------------------------------------------


def command(*arguments):
    app = typer.Typer()
    app.callback()(lambda: None)
    register(app)
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def test_the_command_writes_results_and_prints_tables(folder, tmp_path):
    config = tmp_path / "eval.yaml"
    config.write_text(f"rows: {{held: {EXAMPLES / 'data/deliberation_heldout.jsonl'}}}\nlimit: 2\n")
    result = command(folder / "model", "--config", config, "--suite", "segments,early", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "Early answering" in result.output
    assert (tmp_path / "out" / "index.html").exists()


def test_invalid_rows_are_reported_with_their_location(folder, tmp_path):
    config = tmp_path / "eval.yaml"
    config.write_text("rows: {held: rows.jsonl}\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    result = command(folder / "model", "--config", config, "--suite", "segments")
    assert isinstance(result.exception, ConfigError)
    assert "rows.jsonl:1" in str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give a run directory, a model folder or a peft"),
        (("/nowhere",), "no such folder"),
        ((ROOT / "docs",), "not a model folder"),
        (("x", "--suite", "segment"), "'segment' is not a suite"),
    ],
)
def test_invalid_input_is_reported(arguments, message):
    result = command(*arguments)
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)


def test_an_explicitly_requested_suite_says_what_it_needs(folder):
    with pytest.raises(ConfigError, match="drift needs the base model"):
        evaluate(EvalTarget(folder / "model", settings_for(folder, base=None, suites="drift")))
    with pytest.raises(ConfigError, match="no held-out rows"):
        evaluate(EvalTarget(folder / "model", settings_for(folder, rows={}, suites="segments")))


def test_the_example_config_is_valid():
    settings = load_eval_config(EXAMPLES / "evals/quickstart.yaml", model="m")
    assert settings.requested_suites == list(SUITES)
    assert settings.questions.path.endswith("questions.jsonl")
