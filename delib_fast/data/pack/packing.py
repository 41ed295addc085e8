"""Plan packs: which examples share a micro-batch, as a pure function of (lengths, capacity, seed).

`plan_packs` is best-fit decreasing over the whole dataset. The planner is compiled (csrc/packing). The Python code
below is its definition. It computes the same plan, and is used if the compiled module is not built.

Sizes: N examples, P packs.
"""

from __future__ import annotations

import bisect
import importlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Backend = Literal["auto", "cpp", "python"]
Int64 = NDArray[np.int64]
MAX_CAPACITY = 1 << 24

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class PackPlan:
    """Which examples are in which pack: pack p contains `examples[pack_offsets[p] : pack_offsets[p + 1]]`."""

    pack_offsets: Int64
    """(P+1,)."""
    examples: Int64
    """(N,) indices of all examples, pack after pack."""
    capacity: int
    num_tokens: int
    """Tokens in all packs: the sum of the lengths, with a shared prompt counted once."""
    continues: NDArray[np.bool_] | None = None
    """(N,) whether each example shares the prompt of the one before it; None without shared prompts."""

    @property
    def num_packs(self) -> int:
        return len(self.pack_offsets) - 1

    @property
    def fill(self) -> float:
        """Tokens ÷ (packs × capacity): the share of the capacity that is used."""
        return self.num_tokens / (self.num_packs * self.capacity) if self.num_packs else 1.0

    def pack(self, index: int) -> Int64:
        """The example indices of one pack."""
        return self.examples[self.pack_offsets[index] : self.pack_offsets[index + 1]]

    def pack_continues(self, index: int) -> NDArray[np.bool_] | None:
        """`continues` of one pack."""
        span = slice(self.pack_offsets[index], self.pack_offsets[index + 1])
        return None if self.continues is None else self.continues[span]


def plan_packs(
    lengths: Sequence[int] | NDArray[np.integer], capacity: int, *, seed: int = 0, backend: Backend = "auto"
) -> PackPlan:
    """Put examples into packs by best-fit decreasing.

        for example in examples by descending length (examples of equal length in a random order given by the seed):
            pack ← the open pack with the least free space ≥ length (the newest of these), else a new one

    Args:
        lengths: (N,) tokens of each example, each in 1 … capacity.
        capacity: maximum number of tokens of a pack, at most 2^24.
        seed: permutes examples of equal length, so that each epoch packs different examples together. The number of
            packs does not depend on it.
        backend: "cpp", "python", or "auto" for the first of them that is available.
    Returns:
        The plan, with packs in the order in which they were opened: the longest example first.
    Raises:
        ValueError: a length is below 1 or above the capacity (the message names the first), there are no lengths, the
            capacity is out of range, or the requested backend is not available.

    Deterministic, and equal on both backends. Time O(N + capacity), memory O(N + capacity).
    """
    checked = _checked(lengths, capacity)
    planner = _planner(backend)
    pack_offsets, examples = planner(checked, capacity, seed & (2**64 - 1))
    return PackPlan(pack_offsets, examples, capacity, int(checked.sum(dtype=np.int64)))


def _checked(lengths: Sequence[int] | NDArray[np.integer], capacity: int) -> NDArray[np.int32]:
    if not 1 <= capacity <= MAX_CAPACITY:
        raise ValueError(f"pack capacity is {capacity}; it must be in 1 … {MAX_CAPACITY} tokens")
    values = np.asarray(lengths)
    if values.ndim != 1:
        raise ValueError(f"lengths must have one dimension, not shape {values.shape}")
    if values.size == 0:
        raise ValueError("there is nothing to pack: lengths is empty")
    if not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"lengths must be integers, not {values.dtype}")
    bad = np.flatnonzero((values < 1) | (values > capacity))
    if bad.size:
        i = int(bad[0])
        more = f" ({bad.size} such lengths)" if bad.size > 1 else ""
        if values[i] > capacity:
            raise ValueError(
                f"example {i} has {values[i]} tokens, more than the pack capacity {capacity}"
                f"{more}: raise pack_capacity, or drop or split it first"
            )
        kind = "0" if values[i] == 0 else f"negative ({values[i]})"
        raise ValueError(f"the length of example {i} is {kind}{more}; an example must have at least one token")
    return np.ascontiguousarray(values, dtype=np.int32)


@cache
def _compiled() -> Callable[[NDArray[np.int32], int, int], tuple[Int64, Int64]] | None:
    import torch  # noqa: F401  delib_fast._C is linked to torch's libraries, which this import loads

    try:
        module = importlib.import_module("delib_fast._C")
    except ModuleNotFoundError:
        return None
    return getattr(module, "plan_packs", None)


@cache
def _warn_slow() -> None:
    _log.warning("delib_fast._C is not built: packs are planned in Python, which is about 40 times slower")


def _planner(backend: Backend) -> Callable[[NDArray[np.int32], int, int], tuple[Int64, Int64]]:
    if backend not in ("auto", "cpp", "python"):
        raise ValueError(f"packing backend {backend!r} is unknown; use 'auto', 'cpp' or 'python'")
    compiled = None if backend == "python" else _compiled()
    if compiled is not None:
        return compiled
    if backend == "cpp":
        raise ValueError(
            "packing backend 'cpp' is not available: delib_fast._C was not built (it needs g++); "
            "reinstall with a compiler, or use backend='python'"
        )
    if backend == "auto":
        _warn_slow()
    return _plan_in_python


# --- the definition -----------------------------------------------------------------------------------------


def _plan_in_python(lengths: NDArray[np.int32], capacity: int, seed: int) -> tuple[Int64, Int64]:
    shuffled = seeded_permutation(len(lengths), seed)
    order = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    packs: list[list[int]] = []
    open_packs: dict[int, list[int]] = {}  # free space -> packs with this much of it, the newest last
    spaces: list[int] = []  # the keys of open_packs, ascending
    for example, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        at = bisect.bisect_left(spaces, length)
        if at == len(spaces):
            pack, space = len(packs), capacity
            packs.append([])
        else:
            space = spaces[at]
            pack = open_packs[space].pop()
            if not open_packs[space]:
                del open_packs[space], spaces[at]
        packs[pack].append(example)
        rest = space - length
        if rest > 0:
            if rest not in open_packs:
                open_packs[rest] = []
                bisect.insort(spaces, rest)
            open_packs[rest].append(pack)
    pack_offsets = np.cumsum([0, *map(len, packs)], dtype=np.int64)
    return pack_offsets, np.fromiter((i for pack in packs for i in pack), np.int64, len(lengths))


def seeded_permutation(N: int, seed: int) -> Int64:
    """Return a pseudo-random permutation of 0 … N-1 that is the same on every machine and with every numpy version."""
    bits = max(N - 1, 0).bit_length()
    mask, shift = np.uint64((1 << bits) - 1), np.uint64(bits // 2 + 1)
    keys = _splitmix64(seed, 6)
    x = np.arange(1 << bits, dtype=np.uint64)
    for multiplier, offset in zip(keys[0::2], keys[1::2], strict=True):
        x = (x * np.uint64(multiplier | 1) + np.uint64(offset)) & mask
        x ^= x >> shift
    return x[x < N].astype(np.int64)


def _splitmix64(state: int, count: int) -> list[int]:
    """Return `count` pseudo-random 64-bit numbers (SplitMix64; Steele, Lea and Flood 2014)."""
    numbers, mask = [], 2**64 - 1
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        numbers.append(z ^ (z >> 31))
    return numbers
