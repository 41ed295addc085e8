"""Shared prefixes and sinks as ordinary attentions, merged by their log-sum-exp.

    out₁, lse₁ = causal attention of each sequence to itself
    out₂, lse₂ = full attention of all tokens that continue a prefix to that prefix and its own prefixes
    out₃, lse₃ = 0, the sink of the head
    lse = log Σ e^lseᵢ;   out = Σ outᵢ·e^(lseᵢ − lse)

The backward pass is exact. A flash backward recomputes each probability as e^(score − lse) and subtracts
rowsum(dout·out). If each of the attentions is given the *merged* out and lse, it returns its part of the true
gradients, and the parts are added. The gradient of a sink is the sum of −e^(sink − lse)·rowsum(dout·out).

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
    window: int = 0
    """Tokens that a token attends to, including itself; 0 for all. Only with `causal`."""


# forward(q, k, v, layout, scale) -> (out, lse), where lse is (Tq, Hq, 1)
Forward = Callable[[Tensor, Tensor, Tensor, Layout, float], tuple[Tensor, Tensor]]
# backward(d_out, q, k, v, out, lse, layout, scale) -> (dq, dk, dv)
Backward = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Layout, float],
    tuple[Tensor, Tensor, Tensor],
]

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor cu_seqlens, int max_seqlen, float scale, int window, "
    "Tensor? queries, Tensor? keys, Tensor? cu_queries, Tensor? cu_keys, int max_queries, int max_keys"
)
NO_PREFIX = (None, None, None, None, 0, 0)
"""The plan of a call without shared prefixes."""


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

    Returns the op: (q, k, v, sinks, cu_seqlens, max_seqlen, scale, window, *plan) -> (out, lse), with the plan of
    `plan_prefixes` or NO_PREFIX. The head dims of q, k and v are equal. A window of 0 means no limit; it must be 0 if a
    sequence continues another.
    """

    def op(*args: Any) -> tuple[Tensor, Tensor]:
        return _merged_forward(forward, _MergedCall(*args))

    def backward_op(d_out: Tensor, out: Tensor, lse: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _merged_backward(backward, d_out, out, lse, _MergedCall(*args))

    def autograd(ctx: Any, d_out: Tensor, _d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, out, lse = ctx.saved_tensors
        call = ctx.call._replace(**dict(zip(_TENSORS, tensors, strict=True)))
        grads = getattr(torch.ops.delib_fast, f"{name}_backward")(d_out, out, lse, *call)
        d_sinks = sinks_gradient(d_out, out, lse, call.sinks) if ctx.needs_input_grad[3] else None
        return (*grads, d_sinks, *[None] * (len(_MergedCall._fields) - 4))

    LIBRARY.define(f"{name}({_ARGUMENTS}) -> (Tensor out, Tensor lse)")
    LIBRARY.define(
        f"{name}_backward(Tensor d_out, Tensor out, Tensor lse, {_ARGUMENTS}) -> (Tensor dq, Tensor dk, Tensor dv)"
    )
    for suffix, kernel, fake in (("", op, fake_outputs), ("_backward", backward_op, _fake_backward)):
        torch.library.impl(f"delib_fast::{name}{suffix}", "CompositeExplicitAutograd", kernel, lib=LIBRARY)
        torch.library.register_fake(f"delib_fast::{name}{suffix}", fake, lib=LIBRARY)
    torch.library.register_autograd(f"delib_fast::{name}", autograd, setup_context=_setup_context, lib=LIBRARY)
    registered: Callable[..., tuple[Tensor, Tensor]] = getattr(torch.ops.delib_fast, name)
    return registered


class _MergedCall(NamedTuple):
    """The arguments of the op, in the order of its schema: _ARGUMENTS."""

    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None
    cu_seqlens: Tensor
    max_seqlen: int
    scale: float
    window: int
    queries: Tensor | None
    keys: Tensor | None
    cu_queries: Tensor | None
    cu_keys: Tensor | None
    max_queries: int
    max_keys: int

    @property
    def own(self) -> Layout:
        """Each sequence on itself."""
        return Layout(self.cu_seqlens, self.cu_seqlens, self.max_seqlen, self.max_seqlen, True, self.window)

    @property
    def shared(self) -> Layout:
        """The continuing tokens on their prefixes."""
        assert self.cu_queries is not None
        assert self.cu_keys is not None
        return Layout(self.cu_queries, self.cu_keys, self.max_queries, self.max_keys, causal=False)


_TENSORS = ("q", "k", "v", "sinks", "cu_seqlens", "queries", "keys", "cu_queries", "cu_keys")


def merge_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Return out (…, Hq, D) and lse (…, Hq, 1) with the sinks (Hq,), both in the dtype of lse."""
    both = torch.logaddexp(lse, sinks.to(lse.dtype).unsqueeze(-1))
    return out.to(lse.dtype) * (lse - both).exp(), both


def sinks_gradient(d_out: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Return the gradient of the sinks (Hq,), from out (T, Hq, D) and lse (T, Hq, 1) that contain them.

    Tokens whose upstream gradient is zero are left out, so that a NaN in a token without a loss does not leak.
    """
    delta = (d_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    probability = (sinks.to(lse.dtype) - lse.squeeze(-1)).exp()
    dead = (d_out == 0).all(-1)
    return -(probability * delta).masked_fill(dead, 0).sum(0).to(sinks.dtype)


def _merged_forward(forward: Forward, call: _MergedCall) -> tuple[Tensor, Tensor]:
    q, k, v, queries, keys = call.q, call.k, call.v, call.queries, call.keys
    out, lse = forward(q, k, v, call.own, call.scale)
    if queries is not None and keys is not None:
        out_C, lse_C = forward(q[queries], k[keys], v[keys], call.shared, call.scale)
        own = lse[queries]
        both = torch.logaddexp(own, lse_C)
        merged = out[queries].to(lse.dtype) * (own - both).exp() + out_C.to(lse.dtype) * (lse_C - both).exp()
        out, lse = out.to(lse.dtype).index_copy(0, queries, merged), lse.index_copy(0, queries, both)
    if call.sinks is not None:
        out, lse = merge_sinks(out, lse, call.sinks)
    return out.to(q.dtype), lse


def _merged_backward(
    backward: Backward, d_out: Tensor, out: Tensor, lse: Tensor, call: _MergedCall
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, queries, keys = call.q, call.k, call.v, call.queries, call.keys
    dq, dk, dv = backward(d_out, q, k, v, out, lse, call.own, call.scale)
    if queries is None or keys is None:
        return dq, dk, dv
    dq_C, dk_K, dv_K = backward(
        d_out[queries], q[queries], k[keys], v[keys], out[queries], lse[queries], call.shared, call.scale
    )
    parts = ((dq, queries, dq_C), (dk, keys, dk_K), (dv, keys, dv_K))
    # index_add, because a prefix of a prefix is among the keys of several groups; in the dtype of lse.
    dq, dk, dv = (grad.to(lse.dtype).index_add(0, rows, part.to(lse.dtype)) for grad, rows, part in parts)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def fake_outputs(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Return empty out (T, Hq, Dv) and lse (T, Hq, 1), as the ops do."""
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty((*q.shape[:2], v.shape[-1])), q.new_empty((*q.shape[:2], 1), dtype=lse_dtype)


def _fake_backward(d_out: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (q, k, v)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    call = _MergedCall(*inputs)
    ctx.save_for_backward(*(getattr(call, name) for name in _TENSORS), *output)
    ctx.mark_non_differentiable(output[1])
    ctx.call = call._replace(**dict.fromkeys(_TENSORS))  # type: ignore[arg-type]  # the tensors are saved above
