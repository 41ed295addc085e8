"""Shared prompts: several replies to one prompt are packed with the prompt only once.

The first p tokens of a prompt of p + 1 tokens are one sequence of the pack. Each reply is a sequence that continues it,
and begins with the prompt's last token, which predicts the first token of the reply. k examples of n tokens each
(prompt and reply) therefore take p + Σ (n − p) tokens instead of Σ n.

Sizes: N examples, B bundles (replies that share a prompt, or a single example), P packs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from delib_fast.data.encode.tokenized_dataset import TokenizedDataset
from delib_fast.data.pack.packing import Int64, PackPlan, plan_packs

MIN_SHARED_TOKENS = 16
"""Shorter prompts are not shared: computing them again is cheaper than the second attention call."""
_PARTS = (1, 2, 3, 4)
_FULL = 0.98  # if packs are this full, smaller bundles cannot save much


@dataclass(frozen=True, eq=False)
class Bundles:
    """Bundle b contains `examples[offsets[b] : offsets[b + 1]]`, the longest first."""

    offsets: Int64
    """(B+1,)."""
    examples: Int64
    """(N,) indices of all examples."""
    lengths: Int64
    """(B,) tokens that each bundle takes in a pack."""


def bundle(examples: TokenizedDataset, capacity: int) -> Bundles | None:
    """Group the replies to each prompt into bundles.

        for limit in capacity, capacity / 2, capacity / 3, capacity / 4:      # small bundles fill packs better
            for prompt with two or more replies:
                bundle ← its longest reply; then, by descending length, each reply that still fits, else a new bundle
        return the bundles that need the fewest packs

    Args:
        examples: each at most `capacity` long. Their tokens are not read: prompts are identified by their hashes.
        capacity: tokens of a pack.
    Returns:
        The bundles; None if no two replies share a prompt, or if bundles would need more packs.

    Time O(N log N), plus one pass over the prompts for each bundle of the largest prompt. The result depends on the
    dataset only, so the number of packs is the same in every epoch.
    """
    shared, keys = examples.prompt_keys.T
    own = examples.lengths - shared
    eligible = np.flatnonzero(shared >= MIN_SHARED_TOKENS)
    order = eligible[np.lexsort((-own[eligible], shared[eligible], keys[eligible]))]
    same = (keys[order][1:] == keys[order][:-1]) & (shared[order][1:] == shared[order][:-1])
    if not same.any():
        return None
    boundaries = np.flatnonzero(~np.concatenate([[False], same, [False]]))  # first reply of each prompt, and the end
    others = np.setdiff1d(np.arange(len(examples)), order, assume_unique=True)
    best, fewest = None, plan_packs(examples.lengths, capacity).num_packs
    for parts in _PARTS:
        starts = _bundle_starts(own[order], shared[order], boundaries, capacity // parts)
        offsets = np.concatenate([starts, len(order) + np.arange(len(others) + 1)])
        lengths = np.concatenate(
            [np.add.reduceat(own[order], starts) + shared[order[starts]], examples.lengths[others]]
        )
        plan = plan_packs(lengths, capacity)
        if len(starts) < len(order) and (plan.num_packs < fewest or (best is None and plan.num_packs == fewest)):
            best, fewest = Bundles(offsets, np.concatenate([order, others]), lengths), plan.num_packs
            if plan.fill > _FULL:
                break
    return best


def _bundle_starts(own: Int64, shared: Int64, boundaries: Int64, limit: int) -> Int64:
    """Return where the bundles of at most `limit` tokens begin. Each pass finds the next bundle of every prompt."""
    ends_at = np.concatenate([[0], np.cumsum(own)])
    start, last = boundaries[:-1], boundaries[1:]
    found = []
    while len(start):
        found.append(start)
        end = ends_at[start] + limit - shared[start]
        start = np.clip(np.searchsorted(ends_at, end, side="right") - 1, start + 1, last)
        start, last = start[start < last], last[start < last]
    return np.sort(np.concatenate(found))


def plan_bundles(bundles: Bundles, capacity: int, *, seed: int) -> PackPlan:
    """Plan the packs of bundles. The plan's `continues` marks examples that share the prompt of the one before."""
    plan = plan_packs(bundles.lengths, capacity, seed=seed)
    begin, size = bundles.offsets[plan.examples], np.diff(bundles.offsets)[plan.examples]
    first = np.cumsum(size) - size  # index of each bundle's first example in the plan
    at = np.arange(len(bundles.examples)) - np.repeat(first - begin, size)
    continues = np.ones(len(at), bool)
    continues[first] = False
    return PackPlan(
        np.append(first, len(at))[plan.pack_offsets], bundles.examples[at], capacity, plan.num_tokens, continues
    )


@dataclass(frozen=True, eq=False)
class PackSequences:
    """The sequences of one pack, S of them. Each is a span of the tokens of an example."""

    examples: Int64
    """(S,) index of the example whose tokens the sequence contains."""
    begins: Int64
    """(S,) first token of the span, which is also the position id of the sequence's first token."""
    ends: Int64
    """(S,) end of the span."""
    prefix: tuple[int, ...] | None
    """(S,) the sequence that each one continues, or -1; None without shared prompts."""
    example_ids: Int64
    """(S,) the example whose loss the sequence computes; -1 for a shared prompt."""


def sequences_of(examples: TokenizedDataset, indices: Int64, continues: NDArray[np.bool_] | None) -> PackSequences:
    """Return the sequences of a pack of these examples. Raises ValueError if two prompts of equal hash differ."""
    lengths = examples.lengths[indices]
    if continues is None or not continues.any():
        return PackSequences(indices, np.zeros_like(lengths), lengths, None, indices)
    shared = examples.prompt_keys[indices, 0].tolist()
    rows: list[tuple[int, int, int, int, int]] = []
    parent = -1
    for k, (example, length, p) in enumerate(zip(indices.tolist(), lengths.tolist(), shared, strict=True)):
        leads = not continues[k] and k + 1 < len(indices) and bool(continues[k + 1])
        if leads:
            parent, leader = len(rows), example
            rows.append((example, 0, p, -1, -1))
        elif continues[k]:
            _check_equal_prompts(examples, leader, example, p)
        rows.append(
            (example, p, length, parent, example) if leads or continues[k] else (example, 0, length, -1, example)
        )
    columns = np.array(rows, np.int64).T
    return PackSequences(columns[0], columns[1], columns[2], tuple(columns[3].tolist()), columns[4])


def _check_equal_prompts(examples: TokenizedDataset, one: int, other: int, p: int) -> None:
    if not np.array_equal(examples.tokens(one)[:p], examples.tokens(other)[:p]):
        raise ValueError(
            f"{examples.location(one)} and {examples.location(other)} have different prompts with the same hash; "
            "set share_prompts: never"
        )
