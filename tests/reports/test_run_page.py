"""`delib-fast report`: the page and the pictures of runs, finished or not."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from helpers.tiny_run import edited_ledger, metrics, replace_in_config

from delib_fast.cli.main import main
from delib_fast.data import Message
from delib_fast.evals.replies import Sample, SampledReply, SampleSet, write_samples
from delib_fast.evals.sampling import Reply
from delib_fast.reports.run_figures import smooth
from delib_fast.reports.run_page import changes_table
from delib_fast.reports.run_record import differences, read_run, read_runs
from delib_fast.training.held_out import append_rows, read_rows

pytest.importorskip("matplotlib")


def report(monkeypatch, *arguments: str | Path) -> int:
    monkeypatch.setattr("sys.argv", ["delib-fast", "report", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_series_continue_over_stages(finished):
    run, lines = read_run(finished), metrics(finished)
    nll = run.series(lambda line: line["segments"].get("cot", {}).get("nll"))
    aft = [line for line in lines if line["stage"] == "aft"]
    before = len(lines) - len(aft)
    assert nll.steps == [before + line["step"] for line in aft]
    assert nll.values == [line["segments"]["cot"]["nll"] for line in aft]
    assert nll.tokens[-1] == sum(line["tokens"] for line in lines)
    held = run.held_out("document")
    assert held.steps == [0, before, len(lines)]
    assert held.values == [e["segments"]["document"]["nll"] for e in run.ledger["evaluations"]]


def test_page_of_two_runs(finished, tmp_path, monkeypatch):
    """One of them is still running: its ledger has no totals yet, and its last line is incomplete."""
    other = tmp_path / "running"
    shutil.copytree(finished, other, ignore=shutil.ignore_patterns("model", "stages", "checkpoints"))
    with edited_ledger(other) as ledger:
        ledger["stages"][1] = {k: v for k, v in ledger["stages"][1].items() if k not in ("mfu", "model", "train_s")}
        ledger["stages"][1]["status"] = "running"
        ledger["evaluations"].pop()
    text = (other / "metrics.jsonl").read_text()
    (other / "metrics.jsonl").write_text(text[: text.rindex('"loss"')])
    replace_in_config(other, "seed: 0", "seed: 3")
    assert report(monkeypatch, finished, other, "--out", tmp_path / "out") == 0
    page = (tmp_path / "out" / "index.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page), "the page loads nothing"
    pictures = {p.stem for p in (tmp_path / "out").glob("*.png")}
    assert {f"nll-{s}-over-{x}" for s in ("document", "cot", "response") for x in ("steps", "tokens")} <= pictures
    assert {"tokens_per_s", "supervised_tokens_per_s", "mfu", "memory_peak_mib"} <= pictures
    assert page.count("data:image/png") == len(pictures)
    for stage in json.loads((finished / "ledger.json").read_text())["stages"]:
        assert stage["model"]["sha256"][:12] in page
    assert "<code>seed</code></td><td>0</td><td>3</td>" in page
    assert [key for key, _ in differences(read_runs([finished, other]))] == ["seed"]


def test_changes_are_paired_by_row_and_samples_are_shown(finished, tmp_path, monkeypatch, capsys):
    """A second run whose rows are all 0.25 nats per token better, with a sample that is hostile to the page."""
    better = tmp_path / "better"
    shutil.copytree(finished, better, ignore=shutil.ignore_patterns("model", "stages", "checkpoints", "held_out.jsonl"))
    for moment, sets in read_rows(finished)[0].items():
        for part in sets.values():
            part["segments"] = {
                name: [[nll - 0.25 * tokens, tokens] for nll, tokens in rows]
                for name, rows in part["segments"].items()
                if name != "opens_cot"
            }
        append_rows(better, moment, sets)
    table = changes_table(read_runs([finished, better]))
    rows = {(row[1], row[2]): row for row in table.rows if row[0] == "better"}
    between = rows[f"end − end of {finished.name}", "cot"]
    assert "[-0.250, -0.250]" in between[3], "each row differs by exactly that"
    chats = [tokens for _, tokens in read_rows(finished)[0]["start"][""]["segments"]["cot"] if tokens]
    assert between[4] == f"{len(chats)} of {len(chats)}"
    assert {change for change, _ in rows} == {"after msm − start", "after aft − start", f"end − end of {finished.name}"}
    names = {row[2] for row in table.rows if row[0] == finished.name}
    assert names == {"cot", "response", "document", "log p(opens CoT)"}
    reply = SampledReply("after aft", Reply("<b>x</b>", "y", "closed", True, 3), verdict="comply")
    write_samples(better / "samples", SampleSet("r", {}, (), (Sample((Message("user", "<u>"),), (reply,)),), {}))
    assert report(monkeypatch, better, "--out", tmp_path / "out") == 0
    page = (tmp_path / "out" / "index.html").read_text()
    assert "Samples of better" in page
    assert "&lt;b&gt;x&lt;/b&gt;" in page
    assert not any(tag in page for tag in ("<b>x", "<u>"))
    (better / "samples" / "samples.json").write_text("{")
    (better / "held_out.jsonl").unlink()
    assert report(monkeypatch, better, "--out", tmp_path / "out") == 0, "as a run of an earlier version"
    assert "samples.json is damaged" in capsys.readouterr().err
    assert "paired by row" not in (tmp_path / "out" / "index.html").read_text()


def test_rejects_a_folder_that_is_not_a_run(tmp_path, monkeypatch, capsys):
    assert report(monkeypatch, tmp_path) == 2
    assert f"is {tmp_path} a run directory?" in capsys.readouterr().err


def test_smoothing_keeps_straight_lines_and_constants():
    assert smooth([float(i) for i in range(120)])[2:-2] == pytest.approx([float(i) for i in range(2, 118)])
    assert smooth([5.0] * 70) == [5.0] * 70
