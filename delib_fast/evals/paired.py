"""Differences of two models on the same rows, paired by row.

Rows differ far more from each other than models do on one row. The intervals of two models may therefore overlap widely
although every row shows the same difference; the interval of the paired difference does not have this spread.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from delib_fast.evals.intervals import CONFIDENCE, Estimate

_RESAMPLES = 2000


@dataclass(frozen=True)
class RowValues:
    """What a figure has for each row; the figure is Σ numerators / Σ denominators."""

    key: str
    """Identifies the rows and their order: only figures with equal keys can be paired."""
    values: tuple[tuple[float, float], ...]
    """Numerator and denominator of each row, e.g. the nll of its tokens and their number."""
    groups: tuple[str, ...] = ()
    """The group of each row, if rows of one group belong together, such as both orders of a choice."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data, with six digits after the point."""
        values = [[round(top, 6), round(bottom, 6)] for top, bottom in self.values]
        return {"key": self.key, "values": values, "groups": list(self.groups)}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> RowValues:
        """The inverse of `to_json`."""
        return cls(str(tree["key"]), tuple((float(a), float(b)) for a, b in tree["values"]), tuple(tree["groups"]))


@dataclass(frozen=True)
class PairedDifference:
    """The difference of two models on the same rows."""

    estimate: Estimate
    """a − b with its interval over rows (or groups of rows), for these trained models: seeds are not resampled."""
    rows: int
    """Rows that both models have a value for."""
    agreeing: int
    """Rows whose own difference, averaged over seeds, has the sign of the estimate."""


def paired_difference(
    pairs: Sequence[tuple[RowValues, RowValues]], *, resamples: int = _RESAMPLES, seed: int = 0
) -> PairedDifference | None:
    """The mean over pairs of models of their difference a − b, with a percentile bootstrap over rows.

        difference = mean over pairs of (Σ num_a / Σ den_a − Σ num_b / Σ den_b)

    Args:
        pairs: (a, b) of each training seed. Pairs with equal keys are resampled together.
        resamples, seed: the number of resamples, and the seed of their generator.
    Returns:
        None if the models of a pair were measured on different rows, or there are no rows.
    """
    if not pairs or any(a.key != b.key or len(a.values) != len(b.values) or not a.values for a, b in pairs):
        return None
    generator = np.random.default_rng(seed)
    drawn: dict[str, NDArray[np.int64]] = {}
    value, distribution, groups = 0.0, np.zeros(resamples), 0
    for a, b in pairs:
        sums = _sums_by_group(a, b)
        if a.key not in drawn:
            drawn[a.key] = generator.integers(0, len(sums), (resamples, len(sums)))
            groups += len(sums)
        value += float(_difference(sums.sum(0))) / len(pairs)
        distribution += _difference(sums[drawn[a.key]].sum(1)) / len(pairs)
    distribution = distribution[~np.isnan(distribution)]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(distribution, [tail, 1 - tail]) if groups > 1 and len(distribution) else (math.nan,) * 2
    method = f"paired bootstrap by {'group' if any(a.groups for a, _ in pairs) else 'row'}"
    own = _differences_by_row(pairs)
    return PairedDifference(
        Estimate(value, float(low), float(high), groups, method), len(own), int((np.sign(own) == np.sign(value)).sum())
    )


def _sums_by_group(a: RowValues, b: RowValues) -> NDArray[np.float64]:
    """(groups, 4): Σ of num_a, den_a, num_b and den_b."""
    values = np.concatenate([np.asarray(a.values, np.float64), np.asarray(b.values, np.float64)], axis=1)
    if not a.groups:
        return values
    _, group_of = np.unique(np.asarray(a.groups), return_inverse=True)
    sums = np.zeros((int(group_of.max()) + 1, 4))
    np.add.at(sums, group_of, values)
    return sums


def _difference(sums: NDArray[np.float64]) -> Any:
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / sums[..., 1] - sums[..., 2] / sums[..., 3]


def _differences_by_row(pairs: Sequence[tuple[RowValues, RowValues]]) -> NDArray[np.float64]:
    """The difference of each row that has values, averaged over the pairs with the same rows."""
    by_key: dict[str, list[NDArray[np.float64]]] = {}
    for a, b in pairs:
        values = np.concatenate([np.asarray(a.values, np.float64), np.asarray(b.values, np.float64)], axis=1)
        by_key.setdefault(a.key, []).append(_difference(values))
    means: NDArray[np.float64] = np.concatenate([np.mean(found, axis=0) for found in by_key.values()])
    finite: NDArray[np.float64] = means[np.isfinite(means)]
    return finite
