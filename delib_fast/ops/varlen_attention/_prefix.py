"""Shared prefixes as two ordinary attentions, merged by their log-sum-exp.

    out₁, lse₁ = causal attention of each sequence to itself
    out₂, lse₂ = full attention of all tokens that continue a prefix to that prefix and its own prefixes
    lse = log(e^lse₁ + e^lse₂);   out = out₁·e^(lse₁ − lse) + out₂·e^(lse₂ − lse)

The backward pass is exact. A flash backward recomputes each probability as e^(score − lse) and subtracts
rowsum(dout·out). If each of the two attentions is given the *merged* out and lse, it returns its part of the true
gradients, and the parts are added.

In the second attention all tokens that continue one prefix form one sequence of queries, wherever they are in the pack,
because there is no causal order between them and the prefix. The keys of a prefix are therefore read once for all of
its completions. In addition to the two attentions, q, out and dq of the continuing tokens and k, v, dk and dv of the
prefixes are gathered and scattered once each.

Sizes: T tokens of the pack; C tokens that continue a prefix; K tokens of the prefixes (a prefix's own prefixes are
counted with it); G prefixes that are continued.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from delib_fast.ops._library import LIBRARY


class PrefixPlan(NamedTuple):
    """Which tokens attend to which prefix; all tensors are on the device."""

    queries: Tensor  # (C,) int64, positions in the pack of the continuing tokens, grouped by prefix
    keys: Tensor  # (K,) int64, positions in the pack of the prefixes' tokens, in the same order of prefixes
    cu_queries: Tensor  # (G+1,) int32
    cu_keys: Tensor  # (G+1,) int32
    max_queries: int
    max_keys: int


class Layout(NamedTuple):
    """The sequences of one attention: G of them, each with its queries and its keys."""

    cu_q: Tensor  # (G+1,) int32
    cu_k: Tensor  # (G+1,) int32
    max_q: int
    max_k: int
    causal: bool


# forward(q, k, v, layout, scale) -> (out, lse), where lse is (Tq, Hq, 1)
Forward = Callable[[Tensor, Tensor, Tensor, Layout, float], tuple[Tensor, Tensor]]
# backward(d_out, q, k, v, out, lse, layout, scale) -> (dq, dk, dv)
Backward = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Layout, float],
    tuple[Tensor, Tensor, Tensor],
]

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, int max_seqlen, float scale, "
    "Tensor queries, Tensor keys, Tensor cu_queries, Tensor cu_keys, int max_queries, int max_keys"
)


def ancestors(prefix: Sequence[int], sequence: int) -> list[int]:
    """Return the sequences that `sequence` continues, in the order of the text."""
    found: list[int] = []
    while (sequence := prefix[sequence]) >= 0:
        found.append(sequence)
    return found[::-1]


@lru_cache(maxsize=16)  # every layer of a step has the same plan
def plan_prefixes(cu_seqlens: tuple[int, ...], prefix: tuple[int, ...], device: torch.device) -> PrefixPlan | None:
    """Return the plan, or None if no sequence continues another or all of the continued ones are empty."""
    children: dict[int, list[int]] = {}
    for sequence, parent in enumerate(prefix):
        if parent >= 0:
            children.setdefault(parent, []).append(sequence)

    def positions(sequences: Sequence[int]) -> Tensor:
        return torch.cat([torch.arange(cu_seqlens[i], cu_seqlens[i + 1]) for i in sequences])

    groups = [
        (positions(sequences), positions([*ancestors(prefix, parent), parent]))
        for parent, sequences in children.items()
    ]
    groups = [(queries, keys) for queries, keys in groups if len(queries) and len(keys)]
    if not groups:
        return None
    queries, keys = zip(*groups, strict=True)

    def offsets(parts: Sequence[Tensor]) -> Tensor:
        return torch.tensor([0, *accumulate(len(part) for part in parts)], dtype=torch.int32, device=device)

    return PrefixPlan(
        torch.cat(queries).to(device),
        torch.cat(keys).to(device),
        offsets(queries),
        offsets(keys),
        max(len(part) for part in queries),
        max(len(part) for part in keys),
    )


def register(name: str, forward: Forward, backward: Backward) -> Callable[..., tuple[Tensor, Tensor]]:
    """Register the op delib_fast::`name` and its backward op, given the attention of one backend.

    Returns the op: (q, k, v, cu_seqlens, max_seqlen, scale, *plan) -> (out, lse).
    """

    def op(*args: Any) -> tuple[Tensor, Tensor]:
        return _merged_forward(forward, _PrefixCall(*args))

    def backward_op(d_out: Tensor, out: Tensor, lse: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _merged_backward(backward, d_out, out, lse, _PrefixCall(*args))

    def autograd(ctx: Any, d_out: Tensor, _d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, cu_seqlens, queries, keys, cu_queries, cu_keys, out, lse = ctx.saved_tensors
        call = (q, k, v, cu_seqlens, ctx.max_seqlen, ctx.scale, queries, keys, cu_queries, cu_keys, *ctx.max_lengths)
        grads = getattr(torch.ops.delib_fast, f"{name}_backward")(d_out, out, lse, *call)
        return (*grads, *[None] * (len(_PrefixCall._fields) - 3))

    LIBRARY.define(f"{name}({_ARGUMENTS}) -> (Tensor out, Tensor lse)")
    LIBRARY.define(
        f"{name}_backward(Tensor d_out, Tensor out, Tensor lse, {_ARGUMENTS}) -> (Tensor dq, Tensor dk, Tensor dv)"
    )
    for suffix, kernel, fake in (("", op, _fake), ("_backward", backward_op, _fake_backward)):
        torch.library.impl(f"delib_fast::{name}{suffix}", "CompositeExplicitAutograd", kernel, lib=LIBRARY)
        torch.library.register_fake(f"delib_fast::{name}{suffix}", fake, lib=LIBRARY)
    torch.library.register_autograd(f"delib_fast::{name}", autograd, setup_context=_setup_context, lib=LIBRARY)
    registered: Callable[..., tuple[Tensor, Tensor]] = getattr(torch.ops.delib_fast, name)
    return registered


class _PrefixCall(NamedTuple):
    """The arguments of the op, in the order of its schema: _ARGUMENTS."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    scale: float
    queries: Tensor
    keys: Tensor
    cu_queries: Tensor
    cu_keys: Tensor
    max_queries: int
    max_keys: int

    @property
    def own(self) -> Layout:
        """Each sequence on itself."""
        return Layout(self.cu_seqlens, self.cu_seqlens, self.max_seqlen, self.max_seqlen, causal=True)

    @property
    def shared(self) -> Layout:
        """The continuing tokens on their prefixes."""
        return Layout(self.cu_queries, self.cu_keys, self.max_queries, self.max_keys, causal=False)


def _merged_forward(forward: Forward, call: _PrefixCall) -> tuple[Tensor, Tensor]:
    q, k, v, queries, keys = call.q, call.k, call.v, call.queries, call.keys
    out, lse = forward(q, k, v, call.own, call.scale)
    out_C, lse_C = forward(q[queries], k[keys], v[keys], call.shared, call.scale)
    own = lse[queries]
    both = torch.logaddexp(own, lse_C)
    merged = out[queries].to(lse.dtype) * (own - both).exp() + out_C.to(lse.dtype) * (lse_C - both).exp()
    out, lse = out.to(lse.dtype).index_copy(0, queries, merged), lse.index_copy(0, queries, both)
    return out.to(q.dtype), lse


def _merged_backward(
    backward: Backward, d_out: Tensor, out: Tensor, lse: Tensor, call: _PrefixCall
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, queries, keys = call.q, call.k, call.v, call.queries, call.keys
    dq, dk, dv = backward(d_out, q, k, v, out, lse, call.own, call.scale)
    dq_C, dk_K, dv_K = backward(
        d_out[queries], q[queries], k[keys], v[keys], out[queries], lse[queries], call.shared, call.scale
    )
    parts = ((dq, queries, dq_C), (dk, keys, dk_K), (dv, keys, dv_K))
    # index_add, because a prefix of a prefix is among the keys of several groups; in the dtype of lse.
    dq, dk, dv = (grad.to(lse.dtype).index_add(0, rows, part.to(lse.dtype)) for grad, rows, part in parts)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((*q.shape[:2], 1), dtype=lse_dtype)


def _fake_backward(d_out: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (q, k, v)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    call = _PrefixCall(*inputs)
    ctx.save_for_backward(
        call.q, call.k, call.v, call.cu_seqlens, call.queries, call.keys, call.cu_queries, call.cu_keys, *output
    )
    ctx.mark_non_differentiable(output[1])
    ctx.max_seqlen, ctx.scale, ctx.max_lengths = call.max_seqlen, call.scale, (call.max_queries, call.max_keys)
