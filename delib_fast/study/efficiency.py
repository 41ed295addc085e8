"""How much more AFT data one arm needs than another to reach the same level."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DRAWS = 1000


@dataclass(frozen=True, slots=True)
class Multiple:
    """What `rows` rows behind MSM are worth in rows of AFT alone."""

    rows: int
    level: float
    """the figure of MSM + AFT at `rows`"""
    alone_rows: float
    """rows at which AFT alone reaches that level; inf: it does not; its smallest size: it does there already"""
    bound: str
    """"" | "at most" (AFT alone is there at its smallest size) | "more than" (not reached at its largest)"""
    multiple: float
    """alone_rows / rows; where it is not reached, largest size / rows, which it is more than"""
    low: float
    high: float
    """95 % of draws of seeds; inf where it is not reached"""
    reached: float
    """share of the draws in which AFT alone reaches the level; NaN with one seed"""


def rows_to_reach(level: float, sizes: Sequence[int], values: Sequence[float], *, higher: bool) -> tuple[float, str]:
    """Where a curve over sizes first reaches a level, interpolated linearly in the logarithm of the size.

        rows = exp(log s_k + (level − v_k) / (v_{k+1} − v_k) · (log s_{k+1} − log s_k))

    Args:
        sizes: rising; values: the curve at each.
        higher: whether more is better.
    Returns:
        The rows and "", or the smallest size and "at most" if the curve begins at or beyond the level, or inf and
        "more than" if it never gets there. A curve that falls back later has still reached it.
    """
    if len(sizes) != len(values) or not len(sizes) or list(sizes) != sorted(set(sizes)):
        raise ValueError(f"{len(sizes)} sizes and {len(values)} values; sizes must rise and each have a value")
    sign = 1.0 if higher else -1.0
    curve, wanted = [sign * v for v in values], sign * level
    if curve[0] >= wanted:
        return float(sizes[0]), "at most"
    for k in range(len(sizes) - 1):
        if curve[k + 1] >= wanted:
            part = (wanted - curve[k]) / (curve[k + 1] - curve[k])
            near, far = math.log(sizes[k]), math.log(sizes[k + 1])
            return math.exp(near + part * (far - near)), ""
    return math.inf, "more than"


def multiples(
    sizes: Sequence[int], with_msm: NDArray[np.float64], alone: NDArray[np.float64], *, higher: bool
) -> list[Multiple]:
    """For each size, the multiple of data that AFT alone needs to reach MSM + AFT.

    Args:
        sizes: rising; with_msm, alone: (seeds, sizes) figures, NaN nowhere.
    Seeds are drawn again for the interval, the same in both arms; from one seed there is none (NaN).
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
