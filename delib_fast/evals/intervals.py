"""Confidence intervals: every figure of an evaluation is an `Estimate`, and says how its interval was made.

Wilson's score interval for a proportion; Newcombe's hybrid of two Wilson intervals for a difference of
proportions; the percentile bootstrap over rows (or over groups of rows) for everything else. All are about
which rows were drawn, with the model held fixed: what another training seed would give is not in them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95
DRAWS = 1000
_CELLS = 4_000_000  # numbers held at a time while resampling


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its interval. NaN where there was nothing to estimate from."""

    value: float
    low: float
    high: float
    n: int
    """how many rows (or trials) it rests on"""
    method: str
    """"wilson", "newcombe", "bootstrap by row" or "bootstrap by group" (questions, conditions)"""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return "no data" if math.isnan(self.value) else f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def nothing(method: str) -> Estimate:
    """The estimate of no data."""
    return Estimate(math.nan, math.nan, math.nan, 0, method)


def wilson(successes: int, n: int, confidence: float = CONFIDENCE) -> Estimate:
    """A proportion with Wilson's score interval, which stays inside [0, 1] and is honest at 0 and at n.

        centre ± half = (p + z²/2n ± z·sqrt(p(1−p)/n + z²/4n²)) / (1 + z²/n)

    Raises ValueError unless 0 ≤ successes ≤ n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}: the count must lie between 0 and n")
    if n == 0:
        return nothing("wilson")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = successes / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == n else (centre + half) / scale
    return Estimate(p, low, high, n, "wilson")


def newcombe(successes_a: int, n_a: int, successes_b: int, n_b: int, confidence: float = CONFIDENCE) -> Estimate:
    """The difference of two proportions, a − b, with Newcombe's hybrid score interval (1998, method 10).

    It takes the two samples as independent. Where the same rows are in both and do alike, it is wider than need be.
    """
    a, b = wilson(successes_a, n_a, confidence), wilson(successes_b, n_b, confidence)
    if n_a == 0 or n_b == 0:
        return nothing("newcombe")
    difference = a.value - b.value
    low = difference - math.hypot(a.value - a.low, b.high - b.value)
    high = difference + math.hypot(a.high - a.value, b.value - b.low)
    return Estimate(difference, low, high, min(n_a, n_b), "newcombe")


def ratio(
    numerators: ArrayLike, denominators: ArrayLike, *, confidence: float = CONFIDENCE, draws: int = DRAWS, seed: int = 0
) -> Estimate:
    """Σ numerators / Σ denominators over rows, with a percentile bootstrap over rows.

    Args:
        numerators, denominators: (n,) one number a row: e.g. Σ nll of a row's tokens, and how many there are. Rows
            without a denominator (0) are left out.
        draws, seed: how often the rows are drawn again, and the generator's seed: the same rows give the same
            interval.
    With fewer than about 20 rows the percentile bootstrap is too narrow; from one row there is no interval (NaN).
    """
    top, bottom = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    used = bottom > 0
    top, bottom = top[used], bottom[used]
    n = len(top)
    if n == 0:
        return nothing("bootstrap by row")
    if n == 1:
        return Estimate(float(top[0] / bottom[0]), math.nan, math.nan, 1, "bootstrap by row")
    values = np.concatenate(
        [(w := _row_weights(n, size, seed + k)) @ top / (w @ bottom) for k, size in enumerate(_portions(n, draws))]
    )
    low, high = _percentiles(values, confidence)
    return Estimate(float(top.sum() / bottom.sum()), low, high, n, "bootstrap by row")


def mean(values: ArrayLike, *, confidence: float = CONFIDENCE, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """The mean over rows, with a percentile bootstrap over rows."""
    array = np.asarray(values, np.float64)
    return ratio(array, np.ones_like(array), confidence=confidence, draws=draws, seed=seed)


def bootstrap(
    statistic: Callable[[NDArray[np.int64]], float],
    groups: Sequence[Any],
    *,
    confidence: float = CONFIDENCE,
    draws: int = DRAWS,
    seed: int = 0,
) -> Estimate:
    """Any statistic of rows, with a percentile bootstrap over groups of rows.

    Args:
        statistic: takes row indices (some may occur several times) and gives a number; NaN draws are left out.
        groups: what each row belongs to (its question, say); rows of one group are drawn together.
    """
    _, group_of = np.unique(np.asarray([str(g) for g in groups]), return_inverse=True)
    n = int(group_of.max()) + 1 if len(group_of) else 0
    method = "bootstrap by row" if n == len(group_of) else "bootstrap by group"
    if n == 0:
        return nothing(method)
    if n == 1:
        return Estimate(float(statistic(np.arange(len(group_of)))), math.nan, math.nan, 1, method)
    order = np.argsort(group_of, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(group_of, minlength=n))[:-1])
    generator = np.random.default_rng(seed)
    values = np.array(
        [statistic(np.concatenate([members[g] for g in generator.integers(0, n, n)])) for _ in range(draws)]
    )
    low, high = _percentiles(values[~np.isnan(values)], confidence)
    return Estimate(float(statistic(np.arange(len(group_of)))), low, high, n, method)


def share_by_group(
    hits: Sequence[bool] | NDArray[Any], groups: Sequence[Any], *, confidence: float = CONFIDENCE, seed: int = 0
) -> Estimate:
    """The share of hits, where rows of one group do alike (samples of one question).

    Bootstrap by group. Where every row hits, or none does, the bootstrap can't tell how sure that is: then Wilson's
    interval with the groups as trials, which takes the rows of a group as one.
    """
    array = np.asarray(hits, np.float64)
    n = len(set(map(str, groups)))
    if len(array) and array.min() == array.max():
        return wilson(n if array[0] else 0, n, confidence)
    return bootstrap(lambda rows: float(array[rows].mean()), groups, confidence=confidence, draws=400, seed=seed)


def _portions(n: int, draws: int) -> list[int]:
    size = max(1, _CELLS // n)
    return [min(size, draws - done) for done in range(0, draws, size)]


def _row_weights(n: int, draws: int, seed: int) -> NDArray[np.float64]:
    """(draws, n) how often each row is drawn."""
    picks = np.random.default_rng(seed).integers(0, n, (draws, n)) + np.arange(draws)[:, None] * n
    return np.bincount(picks.ravel(), minlength=draws * n).reshape(draws, n).astype(np.float64)


def _percentiles(values: NDArray[np.float64], confidence: float) -> tuple[float, float]:
    if not len(values):
        return math.nan, math.nan
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)
