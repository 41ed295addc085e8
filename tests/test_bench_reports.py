"""The stored bench results, the history records, the plots, and when the regression gate fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import plots
import recording
import regression_gate
import report


def entry(contender: str, share: float, case: str = "T=8", **more) -> dict:
    info = {
        "device": "cpu-x",
        "commit": "c1",
        "versions": {"torch": "2"},
        "case": case,
        "contender": contender,
        "share_of_roof": share,
        "times_the_roof": 1 / share,
        "dtype": "float32",
        "flops": 8e9,
        "least_bytes": 1e7,
        "roof_ms": 50.0,
        "bandwidth_gb_per_s": 20.0,
        "error_grad_hidden": 1e-6,
        "error_grad_weight": 2e-6,
        "peak_extra_mib": 3.0,
        **more,
    }
    return {"suite": "linear_cross_entropy", "name": f"bench[{case}-{contender}]", "median_ms": 1.0, "extra_info": info}


@pytest.fixture
def results(tmp_path, monkeypatch):
    for module in (recording, report):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    return tmp_path


def test_record_replaces_results_and_appends_to_the_history(results) -> None:
    recording.record([entry("ours-cpu", 0.8), entry("eager", 0.4), entry("ours-cpu", 0.5, case="T=9")])
    recording.record([entry("ours-cpu", 0.9), entry("eager", 0.3)])
    kept = {e["name"]: e["extra_info"]["share_of_roof"] for e in recording.stored("cpu-x", "linear_cross_entropy")}
    assert kept == {"bench[T=9-ours-cpu]": 0.5, "bench[T=8-ours-cpu]": 0.9, "bench[T=8-eager]": 0.3}
    lines = [json.loads(line) for line in (results / "cpu-x" / "history.jsonl").read_text().splitlines()]
    assert [(x["case"], x["share_of_roof"], x["peers"]) for x in lines] == [
        ("T=8", 0.8, {"eager": 2.0}),
        ("T=9", 0.5, {}),
        ("T=8", 0.9, {"eager": 3.0}),
    ]
    table = report.peer_table(report.cases_of("linear_cross_entropy"), "cpu-x")
    assert "| T=8 | **1.11×** | 3.33× |" in table


@pytest.mark.parametrize(
    ("cells", "best", "bold"),
    [
        (["1.10×", "1.09×", "", "1.09×"], min, ["1.10×", "**1.09×**", "", "**1.09×**"]),
        (["4,632", "2,805", "1,520"], max, ["**4,632**", "2,805", "1,520"]),
        (["1.1e-02", "1.1e-02"], min, ["1.1e-02", "1.1e-02"]),
        (["331", "", ""], min, ["331", "", ""]),
    ],
)
def test_the_best_of_a_row_is_bold_even_if_it_is_a_peer(cells, best, bold) -> None:
    assert report.with_best_in_bold(cells, best) == bold


def test_quick_results_are_stored_separately(results) -> None:
    recording.record([entry("ours-cpu", 0.8, quick=True)])
    assert recording.stored("cpu-x", "linear_cross_entropy") == []
    assert regression_gate.shares(recording.stored("cpu-x", "quick")) == {"bench[T=8-ours-cpu]": 0.8}


def test_gate_reports_shares_below_four_fifths_of_the_stored_ones() -> None:
    committed = {"a": 0.5, "b": 0.5, "removed": 0.5}
    assert list(regression_gate.dropped({"a": 0.401, "b": 0.399}, committed)) == ["b"]


@pytest.mark.parametrize(("later", "code"), [([0.7], 0), ([0.5, 0.66], 0), ([0.5, 0.6], 1)])
def test_gate_measures_dropped_shares_again(later, code, results, monkeypatch) -> None:
    """Only the tests whose share dropped run again, at most twice, and the best share counts."""
    here = {"device": recording.device_name(), "processor": recording.processor()}
    recording.record([entry("ours-cpu", 0.8, **here, quick=True)])
    monkeypatch.setattr(regression_gate, "RETRY_PAUSES_S", (0, 0))
    requested, shares = [], iter([0.5, *later])
    monkeypatch.setattr(
        regression_gate, "run", lambda tests: requested.append(tests) or [entry("ours-cpu", next(shares))]
    )
    monkeypatch.setattr(sys, "argv", ["regression_gate.py"])
    assert regression_gate.main() == code
    assert len(requested[0]) == 3
    assert len(requested) == 1 + len(later)
    assert [test.rpartition("/")[2] for test in requested[1]] == ["bench_linear_cross_entropy.py::bench[T=8-ours-cpu]"]


def test_gate_compares_nothing_on_another_processor(results, monkeypatch, capsys) -> None:
    recording.record([entry("ours-cpu", 0.8, device=recording.device_name(), processor="another", quick=True)])
    monkeypatch.setattr(regression_gate, "run", lambda tests: [entry("ours-cpu", 0.1)])
    monkeypatch.setattr(sys, "argv", ["regression_gate.py"])
    assert regression_gate.main() == 0
    assert "nothing was compared" in capsys.readouterr().out


def test_roofline_and_history_mark_every_contender(results) -> None:
    recording.record([entry("ours-cpu", 0.8), entry("compile-compact", 0.4)])
    report.draw_rooflines()
    assert "<!-- torch.compile -->" in (results / "cpu-x" / "roofline.svg").read_text()
    plots.history(
        [json.loads(x) for x in (results / "cpu-x" / "history.jsonl").read_text().splitlines()],
        "cpu-x",
        results / "history.svg",
    )
    assert "<!-- T=8 (ours-cpu) -->" in (results / "history.svg").read_text()


@pytest.mark.parametrize("path", [report.README, report.BENCHMARKS], ids=["README.md", "docs/benchmarks.md"])
def test_generated_pages_match_the_stored_results(path) -> None:
    assert report.generated_pages()[path] == path.read_text(), "run: python bench/report.py"
