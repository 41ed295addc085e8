"""Intervals against published values and known distributions."""

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


def test_bad_counts_and_no_data():
    with pytest.raises(ValueError, match="7 successes of 5"):
        wilson(7, 5)
    assert math.isnan(wilson(0, 0).value)
    assert math.isnan(mean([]).value)


def test_ratio_weighs_rows_by_their_tokens():
    found = ratio([10.0, 1.0], [10, 100])
    assert found.value == pytest.approx(11 / 110)
    assert found.n == 2


def test_bootstrap_covers_as_it_claims():
    """95 % intervals of the mean of 60 normal numbers hold the truth in about 95 % of 200 repetitions."""
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


def test_same_rows_give_the_same_interval():
    assert mean([1.0, 2.0, 5.0]) == mean([1.0, 2.0, 5.0])


def test_one_row_has_no_interval():
    assert math.isnan(mean([3.0]).low)


def test_share_by_group_is_not_certain_of_zero():
    found = share_by_group([0] * 40, [k // 10 for k in range(40)])
    assert found.method == "wilson"
    assert found.n == 4
    assert found.high == pytest.approx(wilson(0, 4).high)
