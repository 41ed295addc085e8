"""Interpolation, intervals over seeds, and published figures. Nothing is trained."""

from __future__ import annotations

import math

import numpy as np
import pytest


@pytest.mark.parametrize(
    ("level", "rows", "bound"),
    [
        (0.5, math.sqrt(100 * 1000), ""),  # halfway up between 100 and 1000: halfway in the logarithm
        (0.4, 100.0, "at most"),  # reached at the smallest size: only a bound is known
        (0.3, 100.0, "at most"),
        (0.6, 1000.0, ""),
        (0.7, math.inf, "more than"),  # never reached; the fall at the end does not matter
    ],
)
def test_rows_to_reach(level, rows, bound):
    from delib_fast.study.efficiency import rows_to_reach

    found, found_bound = rows_to_reach(level, [100, 1000, 10_000], [0.4, 0.6, 0.5], higher=True)
    assert found == pytest.approx(rows)
    assert found_bound == bound
    # a metric of which less is better is the mirror image
    mirrored, _ = rows_to_reach(-level, [100, 1000, 10_000], [-0.4, -0.6, -0.5], higher=False)
    assert mirrored == found


def test_rows_to_reach_rejects_unsorted_sizes():
    from delib_fast.study.efficiency import rows_to_reach

    with pytest.raises(ValueError, match="2 sizes and 2 values: sizes must be ascending"):
        rows_to_reach(0.5, [1000, 100], [0.1, 0.2], higher=True)


def test_multiples_mark_levels_that_are_not_reached():
    """MSM + AFT at 10 rows equals AFT alone at 100; AFT alone does not reach its level at 1000 rows."""
    from delib_fast.study.efficiency import multiples

    sizes = [10, 100, 1000]
    alone = np.array([[0.1, 0.3, 0.5]] * 3)
    first, second, third = multiples(sizes, np.array([[0.3, 0.4, 0.9]] * 3), alone, higher=True)
    assert (first.multiple, first.bound, first.reached) == (pytest.approx(10), "", 1.0)
    assert second.multiple == pytest.approx(math.sqrt(10))
    assert (third.bound, third.alone_rows, third.reached) == ("more than", math.inf, 0.0)
    assert third.multiple == 1.0, "a lower bound: largest size / rows"
    assert (first.low, first.high) == (pytest.approx(10), pytest.approx(10)), "equal seeds have no spread"
    one_seed = multiples(sizes, np.array([[0.3, 0.4, 0.9]]), alone[:1], higher=True)[0]
    assert math.isnan(one_seed.low), "one seed has no interval"


def test_intervals_over_seeds():
    from delib_fast.evals.intervals import Estimate
    from delib_fast.study.settings import ChoicesMetric
    from delib_fast.study.summary import over_seeds, student

    found = student([1.0, 2.0, 3.0])
    assert (found.value, found.n) == (2.0, 3)
    assert found.high - found.value == pytest.approx(4.303 / math.sqrt(3), rel=1e-3), "from a table of Student's t"
    found = student([float(k) for k in range(32)])
    assert found.high - found.value == pytest.approx(2.0395 * math.sqrt(32 * 33 / 12 / 32), rel=1e-4)
    shares = [Estimate(value, 0.0, 1.0, 100, "wilson") for value in (0.9, 1.0, 1.0)]
    metric = ChoicesMetric(kind="choices", path="-")
    assert over_seeds(shares, metric).high == 1.0, "a share ends at 1"
    assert over_seeds(shares[:1], metric) is shares[0], "one seed keeps its own interval"


def test_every_published_figure_is_cited():
    from delib_fast.reports.published import read_published

    found = read_published()
    cells = {figure.citation: figure.value for figure in found.figures}
    # easily confused: 5 % and 7 % are the cells with CoT
    assert cells["arXiv 2605.02087v2, Fig. 4, Qwen2.5-32B, MSM + AFT (CoT)"] == 0.05
    assert cells["arXiv 2605.02087v2, Fig. 4, Qwen2.5-32B, MSM + AFT (no CoT)"] == 0.22
    assert cells["arXiv 2605.02087v2, Fig. 4, Qwen3-32B, MSM + AFT (CoT)"] == 0.07
    assert cells["arXiv 2605.02087v2, Fig. 4, Qwen3-32B, MSM + AFT (no CoT)"] == 0.10
    assert "cells *with* CoT" in found.caution
    # §4.2 does not say of which kind of AFT its 40× for Qwen2.5-32B is
    multiple = "arXiv 2605.02087v2, §4.2, Qwen2.5-32B"
    assert cells[f"{multiple}, kind of AFT not stated"] == 40
    assert cells[f"{multiple}, no CoT"] is None
    assert cells["arXiv 2605.02087v2, §4.2, Qwen3-32B, no CoT"] == 60
    msm = [f"MSM ({name}){aft}" for name in ("affordability", "America") for aft in ("", " + AFT")]
    columns = ["base", "AFT", *msm]
    figure_2 = {
        name: [cells[f"arXiv 2605.02087v2, Fig. 2, {name}, {column}"] for column in columns]
        for name in ("affordability", "America")
    }
    assert figure_2 == {
        "affordability": [0.23, 0.32, 0.38, 0.48, 0.28, 0.29],
        "America": [0.38, 0.36, 0.36, 0.38, 0.52, 0.55],
    }
    titles = {figure.table for figure in found.figures}
    assert "General (one paragraph) against specific specs, MSM + AFT (CoT)" in titles
    assert len(cells) == len(found.figures), "each figure has its own citation"


def two_arms(values_a, values_b, *, placebo=None, **changes):
    """The differences of a study with arms `MSM (a)` and `MSM (b)`, one seed per value, and a placebo of `MSM (a)`."""
    from delib_fast.evals.intervals import Estimate
    from delib_fast.study.plan import Arm
    from delib_fast.study.settings import StudyConfig

    study = StudyConfig.model_validate(
        {
            "title": "t",
            "out": "-",
            "seeds": list(range(len(values_a))),
            "run": {"model": {"path": "-"}},
            "msm": {"a": {}, "b": {}},
            "metrics": {"choice": {"kind": "choices", "path": "-", "figure": "margin"}},
            "contrasts": [{"title": "a − b", "a": "MSM (a)", "b": "MSM (b)", "metric": "choice"}],
            **changes,
        }
    )
    a, b = Arm(msm="a", only_variant=False), Arm(msm="b", only_variant=False)
    values = {a: values_a, b: values_b}
    if placebo is not None:
        values[Arm(msm="a", only_variant=False, placebo=True)] = placebo
    figures = {
        (arm, s): {"choice": Estimate(v, math.nan, math.nan, 1, "-")}
        for arm, of_arm in values.items()
        for s, v in enumerate(of_arm)
    }
    return study, figures, list(values)


def test_the_detection_floor_of_a_difference():
    """By hand: s = 0.1, n = 3, t(0.975, 2) = 4.3027 and t(0.8, 2) = 1.0607 from a table of Student's t."""
    from delib_fast.study.summary import detection_floor, differences

    assert detection_floor([0.1, 0.2, 0.3]) == pytest.approx((4.3027 + 1.0607) * 0.1 / math.sqrt(3), rel=1e-4)
    assert detection_floor([0.0, 1.0]) == pytest.approx((12.7062 + 1.3764) * 0.5, rel=1e-4)
    assert math.isnan(detection_floor([0.3]))
    assert math.isnan(detection_floor([0.3, 0.3])), "equal seeds say nothing about their spread"
    (found,) = differences(*two_arms([0.2, 0.4, 0.6], [0.1, 0.2, 0.3]))
    assert found.floor == pytest.approx(0.30966, rel=1e-4)
    assert found.verdict == "null", "0.2 ± 0.248 contains 0"
    assert found.placebo is None
    assert differences(*two_arms([0.2, 0.4, 0.6], [0.0, 0.19, 0.41]))[0].verdict == "higher"
    assert differences(*two_arms([0.0, 0.19, 0.41], [0.2, 0.4, 0.6]))[0].verdict == "lower"
    assert differences(*two_arms([0.5], [0.1]))[0].verdict == "no interval"


def test_the_floor_is_detected_with_the_stated_power():
    """The simulated power of the t test at the floor is 80 % for many seeds, and slightly less for very few."""
    from scipy import stats

    from delib_fast.study.summary import detection_floor

    draw = np.random.default_rng(0)
    for n, power in ((3, 0.7675), (8, 0.798), (30, 0.80)):
        values = np.arange(n) - (n - 1) / 2
        floor = detection_floor(values / values.std(ddof=1))  # for a standard deviation of 1
        drawn = draw.standard_normal((100_000, n)) + floor
        t = drawn.mean(1) / (drawn.std(1, ddof=1) / math.sqrt(n))
        assert np.mean(np.abs(t) > stats.t.ppf(0.975, n - 1)) == pytest.approx(power, abs=0.006)


def test_a_placebo_is_shown_next_to_each_difference():
    from delib_fast.study.summary import differences, placebos

    study, figures, arms = two_arms([0.5, 0.7], [0.1, 0.1], placebo=[0.4, 0.9])
    (placebo,) = placebos(study, figures, arms)
    assert (placebo.arm, placebo.metric) == ("MSM (a)", "choice")
    assert placebo.by_seed == pytest.approx((0.1, -0.2))
    assert placebo.estimate.value == pytest.approx(-0.05)
    (found,) = differences(study, figures, arms)
    assert found.placebo == placebo
    assert arms[2].label == "MSM (a), other seed"


def test_a_difference_with_a_void_cell_is_void():
    from delib_fast.evals.metrics.forced_choices import OrderSplit
    from delib_fast.study.summary import Choice, curves, differences, summarize

    study, figures, arms = two_arms([0.5, 0.7], [0.1, 0.1])
    margin = figures[arms[0], 0]["choice"]

    def choices(*habits):
        return {
            (arm, seed): {"choice": Choice(margin, OrderSplit(content=1.0, habit=habit))}
            for arm, of_arm in zip(arms, habits, strict=True)
            for seed, habit in enumerate(of_arm)
        }

    ok, void = choices((0.5, 0.9), (0.2, 1.7)), choices((0.5, 0.9), (0.4, 1.7))
    (found,) = differences(study, figures, arms, choices=ok)
    assert (found.void, found.verdict) == ((), "null"), "the mean habit of MSM (b) is 0.95"
    (found,) = differences(study, figures, arms, choices=void)
    assert (found.void, found.verdict) == (("MSM (b)",), "void")
    cells = [arm["figures"]["choice"] for arm in summarize(study, figures, arms, {}, choices=void)["arms"]]
    assert [(cell["content"], cell["habit"], cell["void"]) for cell in cells] == [
        (1.0, pytest.approx(0.7), False),
        (1.0, pytest.approx(1.05), True),
    ]
    assert [cell["void_seeds"] for cell in cells] == [[], [1]]
    assert curves(study, figures, arms, "choice", void) == []
