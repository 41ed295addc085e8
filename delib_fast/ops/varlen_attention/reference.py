"""The definition of `varlen_attention`: every run on its own, scores in full, plain torch."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from delib_fast.ops.varlen_attention._prefix import ancestors


def varlen_attention(
    q: Tensor,  # (T, Hq, D)
    k: Tensor,  # (T, Hkv, D)
    v: Tensor,  # (T, Hkv, D)
    cu_seqlens: Tensor,  # (N+1,) int32
    max_seqlen: int,
    *,
    scale: float | None = None,
    window: int | None = None,
    cu_seqlens_host: Sequence[int] | None = None,
    prefix: Sequence[int] | None = None,
) -> Tensor:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    groups = q.shape[1] // k.shape[1]
    compute = torch.promote_types(q.dtype, torch.float32)
    runs = [q[:0].to(compute)]
    borders = cu_seqlens.tolist() if cu_seqlens_host is None else cu_seqlens_host
    places = [slice(start, end) for start, end in pairwise(borders)]
    for run, own in enumerate(places):
        before = [] if prefix is None else ancestors(prefix, run)
        q_HLD = q[own].transpose(0, 1).to(compute)
        k_HLD, v_HLD = (torch.cat([x[places[i]] for i in (*before, run)]).transpose(0, 1).to(compute) for x in (k, v))
        seen = k_HLD.shape[1] - q_HLD.shape[1]  # tokens of the prefixes
        scores = (q_HLD @ k_HLD.repeat_interleave(groups, 0).mT) * scale
        key = torch.arange(k_HLD.shape[1], device=q.device)
        query = key[seen:, None]
        visible = (key <= query) & (key > query - (window or len(key) + 1))
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        runs.append((weights @ v_HLD.repeat_interleave(groups, 0)).transpose(0, 1))
    return torch.cat(runs).to(q.dtype)
