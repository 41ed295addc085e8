"""The checks of varlen_attention's arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def check_tensors(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> None:
    """Raise ValueError if shapes, dtypes or devices do not match. Device memory is not read."""
    if q.dim() != 3 or k.dim() != 3 or v.dim() != 3:
        raise ValueError(
            f"q, k and v must be (T, heads, D); they are {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if k.shape[:2] != v.shape[:2] or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        raise ValueError(
            "q (T, Hq, D), k (T, Hkv, D) and v (T, Hkv, Dv) must agree in T, Hkv and D; they are "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"the number of query heads ({q.shape[1]}) must be a multiple of the kv heads ({k.shape[1]})")
    if not q.is_floating_point() or not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"q, k and v must have the same floating-point dtype; they are {q.dtype}, {k.dtype} and {v.dtype}"
        )
    if not q.device == k.device == v.device == cu_seqlens.device:
        raise ValueError(
            f"q, k, v and cu_seqlens must be on one device; they are on {q.device}, {k.device}, "
            f"{v.device} and {cu_seqlens.device}"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens must be (N+1,) int32; it is {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}")
    if not isinstance(max_seqlen, int) or isinstance(max_seqlen, bool) or max_seqlen < 0:
        raise ValueError(
            f"max_seqlen must be an int on the host, the length of the longest sequence; got {max_seqlen!r}"
        )


def check_options(q: Tensor, window: int | None, softcap: float | None, sinks: Tensor | None) -> None:
    """Raise ValueError if an option is out of its range, or sinks do not match the query heads."""
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 (the token itself) or None; it is {window}")
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"softcap must be a finite number above 0, or None; it is {softcap}")
    if sinks is None:
        return
    if sinks.shape != (q.shape[1],) or not sinks.is_floating_point():
        raise ValueError(
            f"sinks must be ({q.shape[1]},) floating point, one logit per query head; they are {tuple(sinks.shape)} "
            f"{sinks.dtype}"
        )
    if sinks.device != q.device:
        raise ValueError(f"sinks and q must be on one device; they are on {sinks.device} and {q.device}")


def check_prefix(prefix: Sequence[int], num_sequences: int) -> None:
    """Raise ValueError unless each entry is -1 or the index of an earlier sequence, which also rules out cycles."""
    if isinstance(prefix, Tensor) or not all(isinstance(parent, int) for parent in prefix):
        raise ValueError(
            "prefix must be ints on the host, one per sequence: the index of the sequence that it continues, or -1; "
            f"it is a {type(prefix).__name__}"
        )
    if len(prefix) != num_sequences:
        raise ValueError(f"prefix must have one entry per sequence; it has {len(prefix)} for {num_sequences} sequences")
    for sequence, parent in enumerate(prefix):
        if not -1 <= parent < sequence:
            raise ValueError(
                f"prefix[{sequence}] is {parent}; it must be the index of an earlier sequence, or -1 for none"
            )


def check_cu_seqlens(cu_seqlens: Sequence[int], tokens: int, max_seqlen: int) -> None:
    """Raise ValueError if a kernel would read past its inputs or leave tokens unwritten. Takes host values."""
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != tokens:
        raise ValueError(
            f"cu_seqlens must start at 0 and end at T = {tokens}, with padding as a sequence of its own; "
            f"it starts at {cu_seqlens[0]} and ends at {cu_seqlens[-1]}"
        )
    lengths = [end - start for start, end in pairwise(cu_seqlens)]
    if any(length < 0 for length in lengths):
        i = next(i for i, length in enumerate(lengths) if length < 0)
        raise ValueError(
            f"cu_seqlens must not decrease; cu_seqlens[{i}] is {cu_seqlens[i]} "
            f"and cu_seqlens[{i + 1}] is {cu_seqlens[i + 1]}"
        )
    if lengths and max(lengths) > max_seqlen:  # without `default`, which torch.compile does not know
        raise ValueError(f"max_seqlen is {max_seqlen}, but a sequence has {max(lengths)} tokens")
