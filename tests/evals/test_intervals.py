"""Intervals against published values, known distributions, and the implementation that preceded the libraries."""

from __future__ import annotations

import math

import numpy as np
import pytest

from delib_fast.evals.intervals import bootstrap, mean, newcombe, ratio, share_by_group, wilson


def test_wilson_known_values():
    # Newcombe 1998 (Statistics in Medicine 17:857), method 3: 81/263, 15/148, 0/20, 1/29
    for successes, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        found = wilson(successes, n)
        assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)


def test_newcombe_known_values():
    # Newcombe 1998 (Statistics in Medicine 17:873), method 10: 56/70 − 48/80 and 9/10 − 3/10
    found = newcombe(56, 70, 48, 80)
    assert (found.value, found.low, found.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)
    found = newcombe(9, 10, 3, 10)
    assert (found.low, found.high) == pytest.approx((0.1705, 0.8090), abs=1e-4)


def test_invalid_counts_and_no_data():
    with pytest.raises(ValueError, match="7 successes of 5"):
        wilson(7, 5)
    assert math.isnan(wilson(0, 0).value)
    assert math.isnan(mean([]).value)


def test_ratio_weights_rows_by_their_tokens():
    found = ratio([10.0, 1.0], [10, 100])
    assert found.value == pytest.approx(11 / 110)
    assert found.n == 2


def test_bootstrap_has_its_nominal_coverage():
    """95 % intervals of the mean of 60 normal numbers contain the true mean in about 95 % of 200 repetitions."""
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        found = mean(generator.normal(1.0, 2.0, 60), resamples=300)
        hits += found.low <= 1.0 <= found.high
    assert 0.90 <= hits / 200 <= 0.98


def test_bootstrap_by_group_is_wider_where_rows_repeat():
    values = np.repeat(np.random.default_rng(1).normal(size=20), 50)
    by_row = mean(values)
    by_group = bootstrap(lambda i: float(values[i].mean()), np.repeat(np.arange(20), 50).tolist())
    assert by_group.method == "bootstrap by group"
    assert (by_group.high - by_group.low) > 3 * (by_row.high - by_row.low)


def test_the_same_rows_give_the_same_interval():
    assert mean([1.0, 2.0, 5.0]) == mean([1.0, 2.0, 5.0])


def test_one_row_has_no_interval():
    assert math.isnan(mean([3.0]).low)


def test_share_by_group_of_no_hits_has_an_interval():
    found = share_by_group([0] * 40, [k // 10 for k in range(40)])
    assert found.method == "wilson"
    assert found.n == 4
    assert found.high == pytest.approx(wilson(0, 4).high)


def test_values_match_the_implementation_without_libraries():
    """The figures of the previous implementation, which had its own formulas and drew its own resamples."""
    x, y = np.random.default_rng(3).normal(2, 1, 30), np.random.default_rng(4).integers(0, 9, 30)
    groups = [k // 3 for k in range(30)]

    def with_nan(rows):
        return float(x[rows].mean()) if x[rows].mean() > 1.8 else math.nan

    for found, expected in (
        (wilson(64, 72), (0.8888888888888888, 0.7957706176633595, 0.9426118036505065, 72)),
        (newcombe(9, 10, 3, 10), (0.6000000000000001, 0.17052272393450307, 0.809017973535488, 10)),
        (mean(x), (2.0581429893511234, 1.6674931178945263, 2.4416522006407804, 30)),
        (ratio(x * y, y), (1.9317039243847005, 1.4577787272339267, 2.3956171624179254, 28)),
        (share_by_group(x > 2, groups), (0.4, 0.2325000000000003, 0.5666666666666667, 10)),
        (bootstrap(with_nan, groups), (2.0581429893511234, 1.825470027018624, 2.4333304388153336, 10)),
    ):
        assert (found.value, found.low, found.high, found.n) == pytest.approx(expected, rel=1e-12)
