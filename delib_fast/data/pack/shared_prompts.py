"""Several replies to one prompt in one pack, the prompt once.

Of a prompt of p + 1 tokens the first p are one run of the pack. Each reply is a run that continues it and begins with
the prompt's last token, which predicts the reply's first one. So k replies take p + Σ (n − p) tokens instead of Σ n.

Sizes: N examples, B bundles (replies that share a run, or a single example), P packs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from delib_fast.data.encode.tokenized_dataset import TokenizedDataset
from delib_fast.data.pack.packing import Int64, PackPlan, plan_packs

LEAST_SHARED_TOKENS = 16
"""Below this a prompt is cheaper computed again than read by a second attention."""
_PARTS = (1, 2, 3, 4)
_FULL = 0.98  # packs as full as this are not worth another try


@dataclass(frozen=True, eq=False)
class Bundles:
    """Bundle b holds `examples[offsets[b] : offsets[b + 1]]`, the longest first."""

    offsets: Int64
    """(B+1,)"""
    examples: Int64
    """(N,) every example once"""
    lengths: Int64
    """(B,) tokens that each takes in a pack"""


def bundle(examples: TokenizedDataset, capacity: int) -> Bundles | None:
    """Put replies to one prompt together, as many as fit; None where no two do, or where it would make more packs.

        for most in capacity, capacity / 2, capacity / 3, capacity / 4:      # small bundles fill packs better
            for prompt with two replies or more:
                bundle ← its longest reply;   by falling length, each reply that still fits into `most`, else a new one
        the bundles that make the fewest packs

    Args:
        examples: each at most `capacity` long. Their tokens are not read: prompts are told apart by their hashes.
        capacity: tokens of a pack.
    Time O(N log N), and as many passes over the prompts as the largest needs bundles. A function of the set alone, so
    the number of packs stays the same in every epoch.
    """
    shared, keys = examples.prompts.T
    own = examples.lengths - shared
    able = np.flatnonzero(shared >= LEAST_SHARED_TOKENS)
    order = able[np.lexsort((-own[able], shared[able], keys[able]))]
    same = (keys[order][1:] == keys[order][:-1]) & (shared[order][1:] == shared[order][:-1])
    if not same.any():
        return None
    borders = np.flatnonzero(~np.concatenate([[False], same, [False]]))  # where a prompt's replies begin, and the end
    alone = np.setdiff1d(np.arange(len(examples)), order, assume_unique=True)
    best, fewest = None, plan_packs(examples.lengths, capacity).num_packs
    for parts in _PARTS:
        starts = _cut(own[order], shared[order], borders, capacity // parts)
        offsets = np.concatenate([starts, len(order) + np.arange(len(alone) + 1)])
        lengths = np.concatenate([np.add.reduceat(own[order], starts) + shared[order[starts]], examples.lengths[alone]])
        plan = plan_packs(lengths, capacity)
        if len(starts) < len(order) and (plan.num_packs < fewest or (best is None and plan.num_packs == fewest)):
            best, fewest = Bundles(offsets, np.concatenate([order, alone]), lengths), plan.num_packs
            if plan.fill > _FULL:
                break
    return best


def _cut(own: Int64, shared: Int64, borders: Int64, most: int) -> Int64:
    """Where bundles begin: all prompts at once, one more bundle of each in every pass."""
    ends_at = np.concatenate([[0], np.cumsum(own)])
    start, last = borders[:-1], borders[1:]
    found = []
    while len(start):
        found.append(start)
        room = ends_at[start] + most - shared[start]
        start = np.clip(np.searchsorted(ends_at, room, side="right") - 1, start + 1, last)
        start, last = start[start < last], last[start < last]
    return np.sort(np.concatenate(found))


def plan_bundles(bundles: Bundles, capacity: int, *, seed: int) -> PackPlan:
    """`plan_packs` of bundles: the plan says of each example whether it shares the prompt of the one before it."""
    plan = plan_packs(bundles.lengths, capacity, seed=seed)
    begin, size = bundles.offsets[plan.examples], np.diff(bundles.offsets)[plan.examples]
    first = np.cumsum(size) - size  # where each bundle stands in the plan
    at = np.arange(len(bundles.examples)) - np.repeat(first - begin, size)
    continues = np.ones(len(at), bool)
    continues[first] = False
    return PackPlan(
        np.append(first, len(at))[plan.pack_offsets], bundles.examples[at], capacity, plan.num_tokens, continues
    )


@dataclass(frozen=True, eq=False)
class Runs:
    """The runs of one pack, R of them: a span of tokens of an example each."""

    examples: Int64
    begins: Int64
    """also the position of the run's first token"""
    ends: Int64
    prefix: tuple[int, ...] | None
    """the run that each continues, or -1; None where no prompt is shared"""
    ids: Int64
    """the example that each run learns; -1 where it is a prompt alone"""


def sequences_of(examples: TokenizedDataset, members: Int64, continues: NDArray[np.bool_] | None) -> Runs:
    """The runs of a pack. Raises ValueError where two prompts of one hash are not the same."""
    lengths = examples.lengths[members]
    if continues is None or not continues.any():
        return Runs(members, np.zeros_like(lengths), lengths, None, members)
    shared = examples.prompts[members, 0].tolist()
    rows: list[tuple[int, int, int, int, int]] = []
    parent = -1
    for k, (example, length, p) in enumerate(zip(members.tolist(), lengths.tolist(), shared, strict=True)):
        leads = not continues[k] and k + 1 < len(members) and bool(continues[k + 1])
        if leads:
            parent, leader = len(rows), example
            rows.append((example, 0, p, -1, -1))
        elif continues[k]:
            _check_same(examples, leader, example, p)
        rows.append(
            (example, p, length, parent, example) if leads or continues[k] else (example, 0, length, -1, example)
        )
    columns = np.array(rows, np.int64).T
    return Runs(columns[0], columns[1], columns[2], tuple(columns[3].tolist()), columns[4])


def _check_same(examples: TokenizedDataset, one: int, other: int, p: int) -> None:
    if not np.array_equal(examples.tokens(one)[:p], examples.tokens(other)[:p]):
        raise ValueError(
            f"{examples.locations[one]} and {examples.locations[other]} have different prompts of one hash; "
            "set share_prompts: never"
        )
