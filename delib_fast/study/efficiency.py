"""Data efficiency: how much more AFT data one arm needs than another to reach the same level."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DRAWS = 1000


@dataclass(frozen=True, slots=True)
class Multiple:
    """How many rows of AFT alone reach the level of `rows` rows of AFT after MSM."""

    rows: int
    level: float
    """The metric of MSM + AFT at `rows`."""
    alone_rows: float
    """Rows at which AFT alone reaches the level: its smallest size if it does so there, inf if it never does."""
    bound: str
    """One of "", "at most" (AFT alone reaches the level at its smallest size) and "more than" (not at its largest)."""
    multiple: float
    """alone_rows / rows; if the level is not reached, the lower bound largest size / rows."""
    low: float
    high: float
    """`low` and `high` bound 95 % of the bootstrap draws of seeds; inf if the level is not reached."""
    reached: float
    """Share of the draws in which AFT alone reaches the level; NaN with one seed."""


def rows_to_reach(level: float, sizes: Sequence[int], values: Sequence[float], *, higher: bool) -> tuple[float, str]:
    """The size at which a curve first reaches a level, interpolated linearly in the logarithm of the size.

        rows = exp(log s_k + (level − v_k) / (v_{k+1} − v_k) · (log s_{k+1} − log s_k))

    Args:
        sizes: in ascending order.
        values: the curve at each size.
        higher: whether higher values are better.
    Returns:
        (rows, ""), or (smallest size, "at most") if the curve starts at or beyond the level, or (inf, "more than") if
        it never reaches it. A curve that falls below the level again has still reached it.
    Raises:
        ValueError: the sizes are not in ascending order, or do not match the values.
    """
    if len(sizes) != len(values) or not len(sizes) or list(sizes) != sorted(set(sizes)):
        raise ValueError(f"{len(sizes)} sizes and {len(values)} values: sizes must be ascending, with one value each")
    sign = 1.0 if higher else -1.0
    curve, target = [sign * v for v in values], sign * level
    if curve[0] >= target:
        return float(sizes[0]), "at most"
    for k in range(len(sizes) - 1):
        if curve[k + 1] >= target:
            fraction = (target - curve[k]) / (curve[k + 1] - curve[k])
            start, end = math.log(sizes[k]), math.log(sizes[k + 1])
            return math.exp(start + fraction * (end - start)), ""
    return math.inf, "more than"


def multiples(
    sizes: Sequence[int], with_msm: NDArray[np.float64], alone: NDArray[np.float64], *, higher: bool
) -> list[Multiple]:
    """For each size, how many times as much data AFT alone needs to reach the level of MSM + AFT.

    Args:
        sizes: in ascending order.
        with_msm, alone: (seeds, sizes) float64, finite: the metric of either arm.

    The intervals are bootstrapped over seeds, which are drawn jointly for both arms. With one seed they are NaN.
    """
    n = len(with_msm)
    draws = np.random.default_rng(0).integers(0, n, (DRAWS, n))
    drawn_alone, drawn_with = alone[draws].mean(1), with_msm[draws].mean(1)
    found = []
    for k, rows in enumerate(sizes):
        level = float(with_msm[:, k].mean())
        alone_rows, bound = rows_to_reach(level, sizes, alone.mean(0).tolist(), higher=higher)
        spread = np.array(
            [
                rows_to_reach(drawn_with[d, k], sizes, drawn_alone[d].tolist(), higher=higher)[0] / rows
                for d in range(DRAWS if n > 1 else 0)
            ]
        )
        low, high = np.quantile(spread, [0.025, 0.975], method="nearest").tolist() if n > 1 else (math.nan, math.nan)
        reached = float(np.isfinite(spread).mean()) if n > 1 else math.nan
        multiple = (sizes[-1] if bound == "more than" else alone_rows) / rows
        found.append(Multiple(rows, level, alone_rows, bound, multiple, low, high, reached))
    return found
