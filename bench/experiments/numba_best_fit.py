"""Best-fit decreasing in plain numba: the peer of `plan_packs` in bench_packing.py, written for the comparison."""

from __future__ import annotations

import numpy as np
from numba import njit


@njit
def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Put lengths into packs, longest first, each into the fullest pack that has room for it.

    Args:
        lengths: (N,) int64, each at most `capacity`.
        capacity: tokens per pack.
    Returns:
        The index of each length's pack, (N,) int64, and the number of packs.
    """
    # counting sort, longest first
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
    tree = np.zeros(
        2 * leaves, np.bool_
    )  # leaf r: an open pack has exactly r tokens of room; inner nodes: any leaf below
    # the packs with the same room form a stack
    top = np.full(capacity + 1, -1, np.int64)  # [room] the pack on top, or -1
    below = np.empty(len(lengths), np.int64)  # [pack] the next pack of its stack, or -1
    packs = np.empty(len(lengths), np.int64)
    opened = 0
    for item in order:
        length = lengths[item]
        room = _first_open(tree, leaves, length)
        if room < 0:
            pack, room = opened, capacity
            opened += 1
        else:
            pack = top[room]
            top[room] = below[pack]
            if top[room] < 0:
                _set(tree, leaves + room, False)
        packs[item] = pack
        left = room - length
        below[pack] = top[left]
        top[left] = pack
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
    """The smallest room of an open pack that is at least `least`; -1 if no open pack has that much."""
    node = leaves + least
    if tree[node]:
        return least
    while node % 2 == 1 or not tree[node + 1]:  # go up until the subtree to the right has an open pack
        node //= 2
        if node == 1:
            return -1
    node += 1
    while node < leaves:
        node = 2 * node if tree[2 * node] else 2 * node + 1
    return node - leaves
