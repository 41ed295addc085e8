"""Shared prefixes without a new kernel: two attentions, merged by their log-sum-exp.

    out₁, lse₁ = each run on itself, causal
    out₂, lse₂ = all tokens that continue a prefix on that prefix and its own prefixes, not causal
    lse = log(e^lse₁ + e^lse₂);   out = out₁·e^(lse₁ − lse) + out₂·e^(lse₂ − lse)

Backward is exact: a flash backward recomputes each probability as e^(score − lse) and takes rowsum(dout·out) off, so
each half, given the *merged* out and lse, gives its share of the true gradients, and the shares add up.

All tokens that continue one prefix go through the second attention as one run of queries, wherever they stand in the
pack, since nothing between them is causal there: its keys are read once for all completions. Bytes beyond the two
attentions: the continuing q, out and dq, and the prefixes' k, v, dk, dv, gathered and scattered once each.

Sizes: T tokens of the pack; C tokens that continue a prefix; K tokens of prefixes (a prefix's own prefixes counted
with each); G prefixes that something continues.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

# half(q, k, v, cu_q, cu_k, max_q, max_k, causal, scale) -> (out, lse (Tq, Hq, 1))
Half = Callable[..., tuple[Tensor, Tensor]]
# half_backward(d_out, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, causal, scale) -> (dq, dk, dv)
HalfBackward = Callable[..., tuple[Tensor, Tensor, Tensor]]


class Plan(NamedTuple):
    """Who reads which prefix, as tensors on the device."""

    queries: Tensor
    """(C,) int64, places of the continuing tokens, those of one prefix together"""
    keys: Tensor
    """(K,) int64, places of the prefixes' tokens, in the same order of prefixes"""
    cu_queries: Tensor
    """(G+1,) int32"""
    cu_keys: Tensor
    """(G+1,) int32"""
    max_queries: int
    max_keys: int


def ancestors(prefix: Sequence[int], run: int) -> list[int]:
    """The runs that `run` continues, the first of the text first."""
    found: list[int] = []
    while (run := prefix[run]) >= 0:
        found.append(run)
    return found[::-1]


@lru_cache(maxsize=16)  # every layer of a step asks for the same one
def plan(cu_seqlens: tuple[int, ...], prefix: tuple[int, ...], device: torch.device) -> Plan | None:
    """None where no run continues another, or only empty ones are continued."""
    children: dict[int, list[int]] = {}
    for run, parent in enumerate(prefix):
        if parent >= 0:
            children.setdefault(parent, []).append(run)

    def places(runs: Sequence[int]) -> Tensor:
        return torch.cat([torch.arange(cu_seqlens[run], cu_seqlens[run + 1]) for run in runs])

    groups = [(places(runs), places([*ancestors(prefix, parent), parent])) for parent, runs in children.items()]
    groups = [(queries, keys) for queries, keys in groups if len(queries) and len(keys)]
    if not groups:
        return None
    tensors = [torch.cat([group[side] for group in groups]).to(device) for side in (0, 1)]
    borders = [
        torch.tensor([0, *accumulate(len(group[side]) for group in groups)], dtype=torch.int32, device=device)
        for side in (0, 1)
    ]
    longest = [max(len(group[side]) for group in groups) for side in (0, 1)]
    return Plan(tensors[0], tensors[1], borders[0], borders[1], longest[0], longest[1])


def register(name: str, half: Half, half_backward: HalfBackward) -> Callable[..., tuple[Tensor, Tensor]]:
    """Register delib_fast::<name> and its backward, of two halves of one backend."""

    @torch.library.custom_op(f"delib_fast::{name}", mutates_args=())
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        scale: float,
        queries: Tensor,
        keys: Tensor,
        cu_queries: Tensor,
        cu_keys: Tensor,
        max_queries: int,
        max_keys: int,
    ) -> tuple[Tensor, Tensor]:
        out, lse = half(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, True, scale)
        out_C, lse_C = half(q[queries], k[keys], v[keys], cu_queries, cu_keys, max_queries, max_keys, False, scale)
        own = lse[queries]
        both = torch.logaddexp(own, lse_C)
        merged = out[queries].to(lse.dtype) * (own - both).exp() + out_C.to(lse.dtype) * (lse_C - both).exp()
        out, lse = out.to(lse.dtype).index_copy(0, queries, merged), lse.index_copy(0, queries, both)
        return out.to(q.dtype), lse

    @torch.library.custom_op(f"delib_fast::{name}_backward", mutates_args=())
    def backward(
        d_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        scale: float,
        queries: Tensor,
        keys: Tensor,
        cu_queries: Tensor,
        cu_keys: Tensor,
        max_queries: int,
        max_keys: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = half_backward(
            d_out, q, k, v, out, lse, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, True, scale
        )
        dq_C, dk_K, dv_K = half_backward(
            d_out[queries],
            q[queries],
            k[keys],
            v[keys],
            out[queries],
            lse[queries],
            cu_queries,
            cu_keys,
            max_queries,
            max_keys,
            False,
            scale,
        )
        shares = ((dq, queries, dq_C), (dk, keys, dk_K), (dv, keys, dv_K))
        # a prefix's prefix is among the keys of several: index_add, in the dtype of lse
        dq, dk, dv = (g.to(lse.dtype).index_add(0, places, share.to(lse.dtype)) for g, places, share in shares)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)

    def setup_context(ctx, inputs, output) -> None:
        q, k, v, cu_seqlens, ctx.max_seqlen, ctx.scale, *tensors, ctx.max_queries, ctx.max_keys = inputs
        ctx.save_for_backward(q, k, v, *output, cu_seqlens, *tensors)
        ctx.mark_non_differentiable(output[1])

    def autograd(ctx, d_out: Tensor, _d_lse: Tensor | None):
        q, k, v, out, lse, cu_seqlens, *tensors = ctx.saved_tensors
        op = getattr(torch.ops.delib_fast, f"{name}_backward")
        grads = op(
            d_out, q, k, v, out, lse, cu_seqlens, ctx.max_seqlen, ctx.scale, *tensors, ctx.max_queries, ctx.max_keys
        )
        return (*grads, *[None] * 9)

    forward.register_fake(
        lambda q, k, v, *_: (
            q.new_empty(q.shape),
            q.new_empty((*q.shape[:2], 1), dtype=torch.promote_types(q.dtype, torch.float32)),
        )
    )
    backward.register_fake(
        lambda d_out, q, k, v, *_: (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))
    )
    forward.register_autograd(autograd, setup_context=setup_context)
    return forward
