"""What varlen_attention asks of its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def check_tensors(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, window: int | None) -> None:
    """Shapes, dtypes, devices: nothing that would read the device."""
    if q.dim() != 3 or k.dim() != 3 or v.dim() != 3:
        raise ValueError(
            f"q, k and v must be (T, heads, D); they are {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        raise ValueError(
            "q (T, Hq, D), k and v (T, Hkv, D) must agree in T and D; they are "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"the query heads ({q.shape[1]}) must be a multiple of the key heads ({k.shape[1]})")
    if not q.is_floating_point() or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one floating dtype; they have {q.dtype}, {k.dtype} and {v.dtype}")
    if not q.device == k.device == v.device == cu_seqlens.device:
        raise ValueError(
            f"q, k, v and cu_seqlens must be on one device; they are on {q.device}, {k.device}, "
            f"{v.device} and {cu_seqlens.device}"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens must be (N+1,) int32; it is {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}")
    if not isinstance(max_seqlen, int) or isinstance(max_seqlen, bool) or max_seqlen < 0:
        raise ValueError(f"max_seqlen must be an int on the host, the longest run; it is {max_seqlen!r}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 (the token itself) or None; it is {window}")


def check_prefix(prefix: Sequence[int], runs: int) -> None:
    """Each run continues none (-1) or one that stands before it, so there are no rings."""
    if isinstance(prefix, Tensor) or not all(isinstance(parent, int) for parent in prefix):
        raise ValueError(
            f"prefix must be host ints, one a run: the run that it continues, or -1; it is {type(prefix).__name__}"
        )
    if len(prefix) != runs:
        raise ValueError(f"prefix must have one entry a run; it has {len(prefix)} for {runs} runs")
    for run, parent in enumerate(prefix):
        if not -1 <= parent < run:
            raise ValueError(f"prefix[{run}] is {parent}; a run continues one that stands before it, or none (-1)")


def check_runs(cu_seqlens: Sequence[int], tokens: int, max_seqlen: int) -> None:
    """What the runs must fulfil, on host values: a kernel would read past its inputs, or leave tokens
    unwritten."""
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != tokens:
        raise ValueError(
            f"cu_seqlens must go from 0 to T = {tokens}, a padding tail being a run of its own; "
            f"it goes from {cu_seqlens[0]} to {cu_seqlens[-1]}"
        )
    lengths = [end - start for start, end in pairwise(cu_seqlens)]
    if any(length < 0 for length in lengths):
        at = next(i for i, length in enumerate(lengths) if length < 0)
        raise ValueError(f"cu_seqlens must not fall; it does from {cu_seqlens[at]} to {cu_seqlens[at + 1]} at {at + 1}")
    if max(lengths, default=0) > max_seqlen:
        raise ValueError(f"max_seqlen is {max_seqlen}, but a run has {max(lengths)} tokens")
