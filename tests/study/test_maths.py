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
    assert len(cells) == len(found.figures), "each figure has its own citation"
