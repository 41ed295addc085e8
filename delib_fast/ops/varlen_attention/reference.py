"""The definition of varlen_attention in plain torch: one sequence at a time, with all of its scores in memory."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from delib_fast.ops.varlen_attention._merged import ancestors


def varlen_attention(
    q: Tensor,  # (T, Hq, D)
    k: Tensor,  # (T, Hkv, D)
    v: Tensor,  # (T, Hkv, Dv)
    cu_seqlens: Tensor,  # (N+1,) int32
    max_seqlen: int,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # (Hq,)
    cu_seqlens_host: Sequence[int] | None = None,
    prefix: Sequence[int] | None = None,
) -> Tensor:
    """Run the op; the arguments and the result (T, Hq, Dv) are those of `ops.varlen_attention`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    groups = q.shape[1] // k.shape[1]
    compute = torch.promote_types(q.dtype, torch.float32)
    outputs = [q[:0, :, :1].to(compute) * v[:0, :1].to(compute)]
    offsets = cu_seqlens.tolist() if cu_seqlens_host is None else cu_seqlens_host
    tokens = [slice(start, end) for start, end in pairwise(offsets)]
    for sequence, own in enumerate(tokens):
        continued = [] if prefix is None else ancestors(prefix, sequence)
        visible = [tokens[i] for i in (*continued, sequence)]
        q_HLD = q[own].transpose(0, 1).to(compute)
        k_HLD, v_HLD = (torch.cat([x[part] for part in visible]).transpose(0, 1).to(compute) for x in (k, v))
        prefix_length = k_HLD.shape[1] - q_HLD.shape[1]
        scores = (q_HLD @ k_HLD.repeat_interleave(groups, 0).mT) * scale
        key = torch.arange(k_HLD.shape[1], device=q.device)
        query = key[prefix_length:, None]
        mask = (key <= query) & (key > query - (window or len(key) + 1))
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~mask, float("-inf"))
        if sinks is not None:
            scores = torch.cat([scores, sinks.to(compute).view(-1, 1, 1).expand(-1, scores.shape[1], 1)], -1)
        weights = scores.softmax(-1)[..., : len(key)]
        outputs.append((weights @ v_HLD.repeat_interleave(groups, 0)).transpose(0, 1))
    return torch.cat(outputs).to(q.dtype)
