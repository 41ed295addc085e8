"""The whole command: suites, results that are kept, the table, the page."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest
import typer
from eval_models import ROOT, make_model
from rich.console import Console
from typer.testing import CliRunner

from delib_fast.cli.evaluate import register
from delib_fast.config import ConfigError, SourceConfig
from delib_fast.data import read_source, split_holdout
from delib_fast.data.read import source_cache
from delib_fast.evals.intervals import Estimate, mean, wilson
from delib_fast.evals.results import SuiteResult, Table, plain, result_from_json
from delib_fast.evals.run import evaluate
from delib_fast.evals.settings import SUITES, load_eval_config
from delib_fast.evals.target import EvalTarget
from delib_fast.models import export_model
from delib_fast.reports.eval_page import WIDTH, _rich, cell_text, print_tables, write_page

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
    """model/ and base/, and labelled solutions."""
    path = tmp_path_factory.mktemp("subject")
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
    assert [r.suite for r in done.results] == [s for s in SUITES if s not in done.left_out]
    assert "give a run directory" in done.left_out["dose"]
    # 4 questions with labels make too few folds: told, not guessed
    assert set(done.left_out) <= {"dose", "monitor"}


def test_a_large_runs_training_rows_are_not_held(folder, tmp_path, monkeypatch):
    """Held out and trained on are the rows that training parted, read anew where the file is large."""
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
    (tmp_path / "model").symlink_to(folder / "model")
    rows = read_source("rows", SourceConfig(path=str(path)))
    for limit in (source_cache.MAX_BYTES_IN_MEMORY, 0):
        monkeypatch.setattr(source_cache, "MAX_BYTES_IN_MEMORY", limit)
        subject = EvalTarget(tmp_path, load_eval_config(None))
        for _ in range(2):
            assert [list(subject.trained_on), subject.held_out] == list(split_holdout(rows, 0.2))


def test_results_are_kept_by_content(done, folder, monkeypatch):
    said = []
    again = evaluate(EvalTarget(folder / "model", settings_for(folder)), said.append)
    assert again.results == done.results
    assert all("kept" in line or "left out" in line or line == "dose …" or line == "monitor …" for line in said)
    # another limit, another base, other rows: made again; nothing else is
    for changes, remade in (({"limit": 3}, "segments"), ({"base": str(folder / "model")}, "drift")):
        said.clear()
        evaluate(EvalTarget(folder / "model", settings_for(folder, suites=f"{remade},agentic", **changes)), said.append)
        assert f"{remade} …" in said
        assert "agentic: kept from an earlier run" in said
    evaluate(EvalTarget(folder / "model", settings_for(folder)))  # the report is of the last command


def test_a_killed_evaluation_goes_on(folder, tmp_path, monkeypatch):
    """The second suite dies; the first one's result is there, and is not made again."""
    settings = settings_for(folder, suites="segments,early", out=str(tmp_path))
    from delib_fast.evals import run

    def killed(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(run._FORCED, "early", killed)
        with pytest.raises(KeyboardInterrupt):
            evaluate(EvalTarget(folder / "model", settings))
    half = next(tmp_path.glob("segments-*.json"))
    said = []
    evaluate(EvalTarget(folder / "model", settings), said.append)
    assert said[0] == "segments: kept from an earlier run"
    assert said[1] == "early …"
    half.write_text(half.read_text()[:100])  # a damaged result is made again
    said.clear()
    evaluate(EvalTarget(folder / "model", settings), said.append)
    assert said[0] == "segments …"


def test_the_report_is_strict_json_and_comes_back(done):
    report = json.loads((done.folder / "report.json").read_text(), parse_constant=lambda c: pytest.fail(c))
    assert [s["suite"] for s in report["suites"]] == [r.suite for r in done.results]
    for tree, result in zip(report["suites"], done.results, strict=True):
        assert plain(result_from_json(tree)) == plain(result)
    assert report["subject"]["sha256"]


def test_tables_fit_80_columns(done):
    console = Console(width=WIDTH)
    for result in done.results:
        for table in result.tables:
            needed = console.measure(_rich(table), options=console.options.update(width=500)).maximum
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


def test_the_page_stands_alone(done):
    page = write_page(done).read_text()
    parsed = _Page()
    parsed.feed(page)
    assert not parsed.outside
    assert not parsed.open
    assert parsed.tags.count("table") == sum(len(r.tables) for r in done.results)
    assert parsed.tags.count("svg") == 1


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
def test_cells(cell, text):
    assert cell_text(cell) == text


# --- the command line, and what a user may get wrong --------------------------------------------------------


def command(*arguments):
    app = typer.Typer()
    app.callback()(lambda: None)
    register(app)
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def test_the_command(folder, tmp_path):
    config = tmp_path / "eval.yaml"
    config.write_text(f"rows: {{held: {EXAMPLES / 'data/deliberation_heldout.jsonl'}}}\nlimit: 2\n")
    result = command(folder / "model", "--config", config, "--suite", "segments,early", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "Early answering" in result.output
    assert (tmp_path / "out" / "index.html").exists()


def test_bad_rows_are_said_plainly(folder, tmp_path):
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
        ((ROOT / "docs",), "holds no model"),
        (("x", "--suite", "segment"), "'segment' is no suite"),
    ],
)
def test_bad_input_is_said_plainly(arguments, message):
    result = command(*arguments)
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)


def test_a_suite_asked_for_by_name_says_what_it_lacks(folder):
    with pytest.raises(ConfigError, match="drift needs the base model"):
        evaluate(EvalTarget(folder / "model", settings_for(folder, base=None, suites="drift")))
    with pytest.raises(ConfigError, match="no held-out rows"):
        evaluate(EvalTarget(folder / "model", settings_for(folder, rows={}, suites="segments")))


def test_the_example_config_is_read():
    settings = load_eval_config(EXAMPLES / "evals/quickstart.yaml", model="m")
    assert settings.chosen == list(SUITES)
    assert settings.questions.path.endswith("questions.jsonl")
