"""Differences paired by row: exact values, groups, seeds, and what cannot be paired."""

from __future__ import annotations

import math

import numpy as np
import pytest

from delib_fast.evals.intervals import RowEstimate, mean, ratio
from delib_fast.evals.paired import RowValues, paired_difference
from delib_fast.evals.results import SuiteResult, Table, result_from_json, to_json_data


def rows_of(values, key="rows", groups=()):
    return RowValues(key, tuple((float(a), float(b)) for a, b in values), groups)


def test_a_gain_of_every_row_is_certain_although_the_intervals_overlap():
    draw = np.random.default_rng(0)
    tokens = draw.integers(20, 200, 40)
    before = tokens * draw.normal(3.5, 1.0, 40)
    after = before - 0.1 * tokens
    a, b = ratio(after, tokens), ratio(before, tokens)
    assert a.high > b.low + 0.1, "unpaired, the two cannot be told apart"
    found = paired_difference([(rows_of(a.by_row), rows_of(b.by_row))])
    assert (found.estimate.value, found.estimate.low, found.estimate.high) == pytest.approx((-0.1, -0.1, -0.1))
    assert (found.rows, found.agreeing, found.estimate.n) == (40, 40, 40)


def test_the_difference_is_that_of_the_figures():
    """Σ/Σ, not the mean over rows; rows without a token count in neither."""
    a, b = rows_of([(1, 1), (6, 3), (0, 0)]), rows_of([(2, 1), (3, 3), (0, 0)])
    found = paired_difference([(a, b)])
    assert found.estimate.value == pytest.approx(7 / 4 - 5 / 4)
    assert (found.rows, found.agreeing) == (2, 1)
    assert found.estimate.method == "paired bootstrap by row"


def test_rows_of_a_group_are_drawn_together():
    """Both orders of a choice: the halves differ by ±10, and their sum by exactly 1."""
    a, b = [(11, 1), (-9, 1)] * 6, [(0, 1)] * 12
    groups = tuple(str(k // 2) for k in range(12))
    by_row = paired_difference([(rows_of(a), rows_of(b))]).estimate
    by_group = paired_difference([(rows_of(a, groups=groups), rows_of(b, groups=groups))]).estimate
    assert by_row.low < -3 < 5 < by_row.high
    assert (by_group.value, by_group.low, by_group.high, by_group.n) == (1.0, 1.0, 1.0, 6)
    assert by_group.method == "paired bootstrap by group"


def test_seeds_are_averaged_and_their_rows_drawn_together():
    """The seeds' differences are +k and 2 − k: their mean is 1 for every row, and so for every resample."""
    first = (rows_of([(k, 1) for k in range(8)]), rows_of([(0, 1)] * 8))
    second = (rows_of([(2 - k, 1) for k in range(8)]), rows_of([(0, 1)] * 8))
    found = paired_difference([first, second])
    assert (found.estimate.value, found.estimate.low, found.estimate.high) == pytest.approx((1.0, 1.0, 1.0))
    other = (rows_of([(2 - k, 1) for k in range(8)], key="of seed 2"), rows_of([(0, 1)] * 8, key="of seed 2"))
    apart = paired_difference([first, other])
    assert apart.estimate.value == pytest.approx(1.0)
    assert apart.estimate.high - apart.estimate.low > 1, "other rows: drawn on their own"
    assert (apart.rows, apart.estimate.n) == (16, 16)


def test_different_rows_are_not_paired():
    a = rows_of([(1, 1), (2, 1)])
    assert paired_difference([(a, rows_of([(1, 1), (2, 1)], key="other"))]) is None
    assert paired_difference([(a, rows_of([(1, 1)]))]) is None
    assert paired_difference([]) is None
    alone = paired_difference([(rows_of([(3, 1)]), rows_of([(1, 1)]))]).estimate
    assert alone.value == 2.0
    assert math.isnan(alone.low), "a single row has no interval"


def test_the_numbers_of_rows_are_stored_with_a_suite_and_not_in_reports():
    estimate = mean([1.0, 2.0, 4.0])
    assert isinstance(estimate, RowEstimate)
    result = SuiteResult("s", "S", "", (Table("t", ("a",), ((estimate,),)),), rows_key="abc")
    assert "by_row" not in str(to_json_data(result))
    read = result_from_json(to_json_data(result, rows=True))
    assert read.tables[0].rows[0][0].by_row == ((1.0, 1.0), (2.0, 1.0), (4.0, 1.0))
    assert read == result
    values = RowValues("abc", estimate.by_row, ("x", "y", "y"))
    assert RowValues.from_json(values.to_json()) == values
