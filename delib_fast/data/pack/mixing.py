"""How often an epoch shows each example: sources repeated, capped, and mixed by their share of the tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from delib_fast.data.pack.packing import seeded_permutation


@dataclass(frozen=True, slots=True)
class SourceShare:
    """What one source gives to an epoch."""

    name: str
    examples: int
    """it has"""
    tokens: int
    """it has"""
    drawn: int
    """examples of an epoch, repeats counted"""
    drawn_tokens: int
    share: float
    """of the epoch's tokens"""
    wanted: float | None
    """the share that `mix` asks for"""

    @property
    def times(self) -> float:
        """how often an epoch shows its tokens"""
        return self.drawn_tokens / self.tokens


def mix_sources(
    lengths: Mapping[str, NDArray[np.int64]],
    *,
    repeat: Mapping[str, float],
    max_tokens: Mapping[str, int | None],
    mix: Mapping[str, float],
    seed: int,
) -> tuple[NDArray[np.int64], list[SourceShare]]:
    """Choose the examples of an epoch.

        supply[s] = min(tokens[s] · repeat[s], max_tokens[s])
        budget[s] = supply[s]                              without a mix
                  = mix[s] · min over t of supply[t] / mix[t]    with one (mix normalised to 1)

    A source gives whole passes over its examples, and of the last pass a drawn part: examples in an order that is a
    function of the seed, each taken if it still fits; so it never gives more than its budget, and falls short of it
    by less than its shortest example that was left out.

    Args:
        lengths: tokens of each example, by source, in the order of the concatenated set.
        repeat, max_tokens: of every source, as configured.
        mix: weight of every source, or empty.
        seed: of the draw.
    Returns:
        (M,) indices into the concatenated examples, in the order of the sources, and what each source gives.
    Raises:
        ValueError: a budget is smaller than every example of its source.
    """
    tokens = {name: int(n.sum()) for name, n in lengths.items()}
    budget = {name: tokens[name] * repeat[name] for name in lengths}
    for name, most in max_tokens.items():
        budget[name] = budget[name] if most is None else min(budget[name], most)
    wanted = {name: weight / sum(mix.values()) for name, weight in mix.items()}
    if wanted:
        epoch = min(budget[name] / wanted[name] for name in lengths)
        budget = {name: wanted[name] * epoch for name in lengths}
    chosen = []
    start = 0
    for number, (name, n) in enumerate(lengths.items()):
        drawn = _draw(n, budget[name], seed * 1009 + number)
        if not len(drawn):
            raise ValueError(
                f"source {name!r} is to give {int(budget[name])} tokens an epoch, fewer than its shortest "
                f"example has ({int(n.min())}): raise its part of the mix, its repeat or its max_tokens"
            )
        chosen.append(drawn + start)
        start += len(n)
    given = {
        name: int(n[part - first].sum())
        for (name, n), part, first in zip(lengths.items(), chosen, _starts(list(lengths.values())), strict=True)
    }
    total = sum(given.values())
    shares = [
        SourceShare(name, len(n), tokens[name], len(part), given[name], given[name] / total, wanted.get(name))
        for (name, n), part in zip(lengths.items(), chosen, strict=True)
    ]
    return np.concatenate(chosen), shares


def _starts(lengths: Sequence[NDArray[np.int64]]) -> list[int]:
    return [0, *np.cumsum([len(n) for n in lengths]).tolist()][:-1]


def _draw(n: NDArray[np.int64], budget: float, seed: int) -> NDArray[np.int64]:
    """Indices into n whose lengths sum to at most `budget`, each as often as any other or once more."""
    total = int(n.sum())
    passes = int(budget * (1 + 1e-12) // total)
    whole = np.tile(np.arange(len(n)), passes)
    left = int(budget * (1 + 1e-12)) - passes * total
    order = seeded_permutation(len(n), seed)
    taken = []
    sizes = n[order]
    shortest = int(n.min())
    while left >= shortest and len(sizes):
        ends = np.cumsum(sizes)
        fit = int(np.searchsorted(ends, left, side="right"))
        taken.append(order[:fit])
        left -= int(ends[fit - 1]) if fit else 0
        # What stopped the run is too long for what is left, and so is everything as long.
        order, sizes = order[fit:], sizes[fit:]
        keep = sizes <= left
        order, sizes = order[keep], sizes[keep]
    return np.concatenate([whole, *(np.sort(part) for part in taken)]).astype(np.int64)
