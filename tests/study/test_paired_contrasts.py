"""The contrasts of a study paired by row, and its samples by arm. Nothing is trained."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from delib_fast.data import Message
from delib_fast.evals.intervals import Estimate, ratio
from delib_fast.evals.paired import RowValues
from delib_fast.evals.replies import Sample, SampledReply
from delib_fast.evals.sampling import Reply
from delib_fast.reports.study_page import markdown, write_page
from delib_fast.study.paired import paired_contrasts
from delib_fast.study.plan import Arm
from delib_fast.study.settings import StudyConfig
from delib_fast.study.shown import shown_samples
from delib_fast.study.summary import summarize

BASE, COT = Arm(), Arm(aft="CoT", cot_weight=1.0)
TOKENS = [10, 40, 25, 5]
COST = {
    "wall_s": 1.0,
    "sittings": 1,
    "workers": 1,
    "cpu_s": 1.0,
    "train_cpu_s": 1.0,
    "cores": 1,
    "stages": 1,
    "stages_without_sharing": 1,
}


def study(seeds) -> StudyConfig:
    metric = {"kind": "suite", "suite": "segments", "row": "all, cot", "column": "nll"}
    rate = {"kind": "suite", "suite": "refusal", "row": "over-refusal (safe, full)", "column": "share"}
    contrasts = [
        {"title": f"{name} of training", "a": "AFT (CoT)", "b": "base", "metric": name} for name in ("nll", "refusals")
    ]
    return StudyConfig.model_validate(
        {
            "title": "t",
            "out": "o",
            "seeds": seeds,
            "run": {},
            "metrics": {"nll": metric, "refusals": rate, "again": rate},
            "contrasts": contrasts,
        }
    )


def sample(verdict: str) -> dict:
    reply = SampledReply("", Reply(None, f"<b>{verdict}</b>", "none", True, 3), verdict)
    return asdict(Sample((Message("user", "May I?"),), (reply,), label="safe"))


def measured_of(seeds, *, other_rows=False) -> dict:
    """The nll of every row falls by 0.2 in the arm with CoT, from values between 1 and 9; rates have no rows."""
    found = {}
    for arm, gain in ((BASE, 0.0), (COT, 0.2)):
        for seed in seeds:
            estimate = ratio([(level - gain) * n for level, n in zip((1, 9, 4, 6), TOKENS, strict=True)], TOKENS)
            key = "others" if other_rows and arm is COT else "rows"
            nll = {"estimate": asdict(estimate), "rows": RowValues(key, estimate.by_row).to_json()}
            refusals = {"estimate": {}, "samples": [sample("comply" if arm is BASE else "refuse")]}
            found[arm, seed] = {"nll": nll, "refusals": refusals, "again": refusals}
    return found


def summary_of(seeds, measured) -> dict:
    figures = {
        key: {
            "nll": Estimate(*(trees["nll"]["estimate"][k] for k in ("value", "low", "high")), 4, "bootstrap by row"),
            **dict.fromkeys(("refusals", "again"), Estimate(0.5, 0.4, 0.6, 4, "wilson")),
        }
        for key, trees in measured.items()
    }
    summary = summarize(study(seeds), figures, [BASE, COT], COST)
    return summary | {"paired": paired_contrasts(measured, [BASE, COT], summary["contrasts"])}


@pytest.mark.parametrize("seeds", [(1,), (1, 2)])
def test_a_gain_of_every_row_has_an_interval_with_one_seed_too(seeds, tmp_path):
    measured = measured_of(seeds)
    summary = summary_of(seeds, measured)
    (found,) = summary["paired"]
    assert (found["a"], found["b"], found["metric"]) == ("AFT (CoT)", "base", "nll")
    estimate = found["estimate"]
    assert [estimate[key] for key in ("value", "low", "high")] == pytest.approx([-0.2, -0.2, -0.2])
    assert (found["agreeing"], found["rows"], found["seeds"]) == (4, 4, seeds)
    summary["samples"] = shown_samples(study(seeds), measured, [BASE, COT])
    row = "| nll of training | AFT (CoT) | base | nll | -0.200 [-0.200, -0.200] | 4 of 4 |"
    assert row in markdown(summary)
    page = write_page(summary, [], tmp_path, published=False).read_text()
    assert "Differences, paired by row" in page
    assert "verdict: comply" in page
    assert "verdict: refuse" in page
    assert "&lt;b&gt;comply&lt;/b&gt;" in page
    assert page.count("Samples of") == 1, "two metrics of one suite have the same replies"
    for key in ("paired", "samples"):
        del summary[key]
    write_page(summary, [], tmp_path, published=False)  # a study of an earlier version
    assert "paired by row" not in markdown(summary)


def test_arms_that_were_measured_on_other_rows_are_not_paired():
    assert summary_of((1,), measured_of((1,), other_rows=True))["paired"] == []


def test_samples_are_shown_next_to_each_other():
    shown = shown_samples(study((1, 2)), measured_of((1, 2)), [BASE, COT])
    assert list(shown) == ["refusals"]
    ((only,),) = shown.values()
    assert [(r["model"], r["verdict"]) for r in only["replies"]] == [("base", "comply"), ("AFT (CoT)", "refuse")]
