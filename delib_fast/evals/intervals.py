"""Confidence intervals. Every figure of an evaluation is an `Estimate` that names the method of its interval.

Proportions have Wilson's score interval, differences of proportions Newcombe's interval, and everything else the
percentile bootstrap over rows or over groups of rows. All of them describe the sampling of rows for a fixed model;
the variation between training seeds is not included.

scipy and statsmodels compute them (the `evals` extra).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from delib_fast.evals.extra import import_extra

CONFIDENCE = 0.95
RESAMPLES = 1000
_MAX_CELLS = 4_000_000  # row indices in memory at a time while resampling


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its confidence interval. All three numbers are NaN if there was no data."""

    value: float
    low: float
    high: float
    n: int
    """Number of rows, trials or groups."""
    method: str
    """"wilson", "newcombe", "Rogan-Gladen", "bootstrap by row" or "bootstrap by group" (questions, conditions)."""

    def __str__(self) -> str:
        return "no data" if math.isnan(self.value) else f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True, slots=True)
class RowEstimate(Estimate):
    """A figure that is a ratio of sums over rows, with the numbers of each row, so that two models can be paired."""

    by_row: tuple[tuple[float, float], ...] = field(default=(), compare=False, repr=False)
    """Numerator and denominator of each row, in the order of the rows."""


def no_data(method: str) -> Estimate:
    """The estimate from no rows."""
    return Estimate(math.nan, math.nan, math.nan, 0, method)


def wilson(successes: int, n: int, confidence: float = CONFIDENCE) -> Estimate:
    """A proportion with Wilson's score interval, which stays inside [0, 1], also for 0 and n successes.

    Raises ValueError unless 0 ≤ successes ≤ n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}: the count must be between 0 and n")
    if n == 0:
        return no_data("wilson")
    interval = import_extra("scipy.stats").binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return Estimate(successes / n, float(interval.low), float(interval.high), n, "wilson")


def corrected_share(
    reported: Estimate, recall: tuple[int, int], false_alarms: tuple[int, int], *, draws: int = 20_000, seed: int = 0
) -> Estimate:
    """A share that an imperfect classifier reports, corrected for its error (Rogan and Gladen, 1978).

        true share = (reported − false alarm rate) / (recall − false alarm rate), clipped to [0, 1]

    The interval is that of draws of the three rates from their posteriors (Jeffreys' prior), so that it includes the
    uncertainty of the classifier's error. NaN if the classifier is no better than chance.

    Args:
        reported: `wilson` of the verdicts.
        recall: (hits found, hits) of the labelled replies.
        false_alarms: (others reported, others) of the labelled replies.
    """
    method = "Rogan-Gladen"
    if reported.n == 0 or 0 in (recall[1], false_alarms[1]):
        return no_data(method)
    hits = round(reported.value * reported.n)
    gain = recall[0] / recall[1] - false_alarms[0] / false_alarms[1]
    if gain <= 0:
        return Estimate(math.nan, math.nan, math.nan, reported.n, method)
    value = min(1.0, max(0.0, (reported.value - false_alarms[0] / false_alarms[1]) / gain))
    rng = np.random.default_rng(seed)
    p, se, fp = (rng.beta(k + 0.5, n - k + 0.5, draws) for k, n in ((hits, reported.n), recall, false_alarms))
    drawn = np.clip((p - fp) / (se - fp), 0, 1)[se > fp]
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(value, min(float(low), value), max(float(high), value), reported.n, method)


def newcombe(successes_a: float, n_a: int, successes_b: float, n_b: int, confidence: float = CONFIDENCE) -> Estimate:
    """The difference of two proportions, a − b, with Newcombe's hybrid score interval (1998, method 10).

    It assumes independent samples. For the same rows under two conditions that agree on most rows, it is wider than
    necessary.
    """
    if n_a == 0 or n_b == 0:
        return no_data("newcombe")
    low, high = import_extra("statsmodels.stats.proportion").confint_proportions_2indep(
        successes_a, n_a, successes_b, n_b, method="newcomb", compare="diff", alpha=1 - confidence
    )
    return Estimate(successes_a / n_a - successes_b / n_b, float(low), float(high), min(n_a, n_b), "newcombe")


def ratio(
    numerators: ArrayLike,
    denominators: ArrayLike,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Σ numerators / Σ denominators over rows, with a percentile bootstrap over rows.

    Args:
        numerators, denominators: (n,) one number per row, e.g. the summed nll of a row's tokens and their count.
            Rows with a denominator of 0 are excluded.
        resamples, seed: the number of bootstrap resamples, and the seed of their generator. The same rows always
            have the same interval.

    With fewer than about 20 rows, the percentile bootstrap is too narrow; a single row has no interval (NaN).
    """
    top, bottom = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    by_row = tuple(zip(top.tolist(), bottom.tolist(), strict=True))
    used = bottom > 0
    top, bottom = top[used], bottom[used]
    if not len(top):
        return no_data("bootstrap by row")

    def statistic(rows: NDArray[np.int64], axis: int = -1) -> NDArray[np.float64]:
        sums: NDArray[np.float64] = top[rows].sum(axis) / bottom[rows].sum(axis)
        return sums

    low, high = _percentile_bootstrap(statistic, len(top), confidence, resamples, seed, vectorized=True)
    return RowEstimate(float(top.sum() / bottom.sum()), low, high, len(top), "bootstrap by row", by_row)


def mean(values: ArrayLike, *, confidence: float = CONFIDENCE, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """The mean over rows, with a percentile bootstrap over rows."""
    array = np.asarray(values, np.float64)
    return ratio(array, np.ones_like(array), confidence=confidence, resamples=resamples, seed=seed)


def bootstrap(
    statistic: Callable[[NDArray[np.int64]], float],
    groups: Sequence[Any],
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Any statistic of rows, with a percentile bootstrap over groups of rows.

    Args:
        statistic: a function of row indices, some of which may repeat. Resamples where it is NaN are excluded.
        groups: the group of each row, e.g. its question. The rows of a group are resampled together.
    """
    _, group_of = np.unique(np.asarray([str(g) for g in groups]), return_inverse=True)
    n = int(group_of.max()) + 1 if len(group_of) else 0
    method = "bootstrap by row" if n == len(group_of) else "bootstrap by group"
    if n == 0:
        return no_data(method)
    members = np.split(np.argsort(group_of, kind="stable"), np.cumsum(np.bincount(group_of, minlength=n))[:-1])
    low, high = _percentile_bootstrap(
        lambda drawn: float(statistic(np.concatenate([members[g] for g in drawn]))), n, confidence, resamples, seed
    )
    return Estimate(float(statistic(np.arange(len(group_of)))), low, high, n, method)


def share_by_group(
    hits: Sequence[bool] | NDArray[Any], groups: Sequence[Any], *, confidence: float = CONFIDENCE, seed: int = 0
) -> Estimate:
    """The share of hits among rows that are correlated within groups, such as several samples of one question.

    The interval is a bootstrap by group. If all rows hit, or none does, every resample is the same; the interval is
    then Wilson's, with the groups as trials.
    """
    array = np.asarray(hits, np.float64)
    n = len(set(map(str, groups)))
    if len(array) and array.min() == array.max():
        return wilson(n if array[0] else 0, n, confidence)
    return bootstrap(lambda rows: float(array[rows].mean()), groups, confidence=confidence, resamples=400, seed=seed)


def _percentile_bootstrap(
    statistic: Callable[..., Any], n: int, confidence: float, resamples: int, seed: int, *, vectorized: bool = False
) -> tuple[float, float]:
    """The interval of a statistic of the indices 0 … n − 1; NaN for a single index."""
    if n == 1:
        return math.nan, math.nan
    stats = import_extra("scipy.stats")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # scipy's own interval is NaN if a resample is
        found = stats.bootstrap(
            (np.arange(n),),
            statistic,
            n_resamples=resamples,
            batch=max(1, _MAX_CELLS // n),
            vectorized=vectorized,
            method="percentile",
            rng=np.random.default_rng(seed),
        )
    values = found.bootstrap_distribution
    values = values[~np.isnan(values)]
    if not len(values):
        return math.nan, math.nan
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)
