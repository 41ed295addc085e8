"""A plain best-fit decreasing in numba, as one would write it: the peer of `plan_packs` that is not a library's."""

from __future__ import annotations

import numpy as np
from numba import njit


@njit
def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """(the pack of each length, how many packs). Lengths in falling order; of the packs that have room, the fullest.

    tree[i] says whether a pack with as much room as one of the leaves under i is open; leaves are 0 … capacity.
    """
    counts = np.zeros(capacity + 2, np.int64)
    for length in lengths:
        counts[capacity - length + 1] += 1
    order = np.empty(len(lengths), np.int64)
    starts = np.cumsum(counts)
    for i, length in enumerate(lengths):
        order[starts[capacity - length]] = i
        starts[capacity - length] += 1
    leaves = 1
    while leaves < capacity + 1:
        leaves *= 2
    tree = np.zeros(2 * leaves, np.bool_)
    last = np.full(capacity + 1, -1, np.int64)  # of the packs with this much room, the last one opened
    before = np.empty(len(lengths), np.int64)  # and for each pack the one below it
    packs = np.empty(len(lengths), np.int64)
    opened = 0
    for item in order:
        length = lengths[item]
        room = _first_open(tree, leaves, length)
        if room < 0:
            pack, room = opened, capacity
            opened += 1
        else:
            pack = last[room]
            last[room] = before[pack]
            if last[room] < 0:
                _set(tree, leaves + room, False)
        packs[item] = pack
        left = room - length
        before[pack] = last[left]
        last[left] = pack
        _set(tree, leaves + left, True)
    return packs, opened


@njit
def _set(tree: np.ndarray, node: int, value: bool) -> None:
    tree[node] = value
    while node > 1:
        node //= 2
        now = tree[2 * node] or tree[2 * node + 1]
        if tree[node] == now:
            break
        tree[node] = now


@njit
def _first_open(tree: np.ndarray, leaves: int, least: int) -> int:
    """The least room, of at least `least`, that an open pack has; -1 if none has so much."""
    node = leaves + least
    if tree[node]:
        return least
    while node % 2 == 1 or not tree[node + 1]:  # up, until the tree to the right has one
        node //= 2
        if node == 1:
            return -1
    node += 1
    while node < leaves:
        node = 2 * node if tree[2 * node] else 2 * node + 1
    return node - leaves
