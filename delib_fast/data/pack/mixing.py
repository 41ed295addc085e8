"""Mix sources: how often an epoch contains each example, by each source's repeat, max_tokens and share of the mix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from delib_fast.data.encode.tokenized_dataset import TokenizedDataset
from delib_fast.data.pack.packing import seeded_permutation


@dataclass(frozen=True, slots=True)
class SourceShare:
    """One source's share of an epoch."""

    name: str
    examples: int
    """Examples of the source."""
    tokens: int
    """Tokens of the source."""
    drawn: int
    """Examples in an epoch, repeats included."""
    drawn_tokens: int
    """Tokens in an epoch, repeats included."""
    share: float
    """Share of the epoch's tokens."""
    wanted: float | None
    """Share that `mix` requests."""

    @property
    def times(self) -> float:
        """How often an epoch contains the source's tokens, on average."""
        return self.drawn_tokens / self.tokens


def mix_datasets(
    datasets: Mapping[str, TokenizedDataset],
    *,
    repeat: Mapping[str, float],
    max_tokens: Mapping[str, int | None],
    mix: Mapping[str, float],
    seed: int,
) -> tuple[TokenizedDataset, list[SourceShare]]:
    """Return (the examples of an epoch, as `mix_sources` chooses them; each source's share). No token is copied."""
    joined = TokenizedDataset.join(list(datasets.values()))
    lengths = {name: dataset.lengths for name, dataset in datasets.items()}
    chosen, shares = mix_sources(lengths, repeat=repeat, max_tokens=max_tokens, mix=mix, seed=seed)
    every_example_once = len(chosen) == len(joined) and bool((np.diff(chosen) == 1).all())
    return joined if every_example_once else joined.take(chosen), shares


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

    Each source contributes whole passes over its examples and a random part of one more pass, in which examples are
    drawn in an order given by the seed and taken if they still fit. A source therefore never exceeds its budget, and
    falls short of it by less than its shortest example that was not taken.

    Args:
        lengths: tokens of each example, by source, in the order of the concatenated dataset.
        repeat: number of passes over each source; may be fractional.
        max_tokens: maximum number of tokens of each source in an epoch; None for no limit.
        mix: relative number of tokens of each source, or empty.
        seed: seed of the random part.
    Returns:
        (M,) indices into the concatenated examples, in the order of the sources, and the share of each source.
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
    drawn_tokens = {}
    start = 0
    for number, (name, n) in enumerate(lengths.items()):
        drawn = _draw(n, budget[name], seed * 1009 + number)
        if not len(drawn):
            raise ValueError(
                f"source {name!r} has a budget of {int(budget[name])} tokens in an epoch, fewer than its shortest "
                f"example ({int(n.min())}): raise its share of the mix, its repeat or its max_tokens"
            )
        chosen.append(drawn + start)
        drawn_tokens[name] = int(n[drawn].sum())
        start += len(n)
    total = sum(drawn_tokens.values())
    shares = [
        SourceShare(
            name, len(n), tokens[name], len(part), drawn_tokens[name], drawn_tokens[name] / total, wanted.get(name)
        )
        for (name, n), part in zip(lengths.items(), chosen, strict=True)
    ]
    return np.concatenate(chosen), shares


def _draw(n: NDArray[np.int64], budget: float, seed: int) -> NDArray[np.int64]:
    """Draw indices into the lengths n, whose lengths sum to at most `budget`.

    Each index occurs as often as any other, or once more.
    """
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
        # The next example is too long for the rest of the budget, and so are all others of its length.
        order, sizes = order[fit:], sizes[fit:]
        keep = sizes <= left
        order, sizes = order[keep], sizes[keep]
    return np.concatenate([whole, *(np.sort(part) for part in taken)]).astype(np.int64)
