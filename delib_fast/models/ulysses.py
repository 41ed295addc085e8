"""Ulysses sequence parallelism: the tokens of a pack are sharded across P ranks, and so are attention heads.

    (T/P, Hq) q, (T/P, Hkv) k, v    of this rank's tokens
      ──all-to-all──▶  (T, Hq/P) q, (T, Hkv/P) k, v    of all tokens, this rank's heads
      ──varlen_attention with the whole pack's cu_seqlens──▶  (T, Hq/P)
      ──all-to-all──▶  (T/P, Hq)    of this rank's tokens

Everything except attention works on each token independently, and needs no other rank. In attention every rank sees
all tokens of the pack and the boundaries of all its documents, so documents are isolated exactly as on one rank, and
nothing is inferred from positions. If there are fewer kv heads than ranks (P a multiple of Hkv), each kv head is copied
to P / Hkv ranks, and its gradient is summed over them.

Sizes: T tokens of a pack (padded to a multiple of P), P ranks, Hq and Hkv heads of D, with values of Dv.
Cost per layer and rank, forward: (Hq + max(Hkv, P))·(D + Dv)·T/P elements sent, in two all-to-alls; the same backward.
Source: DeepSpeed-Ulysses, arXiv 2309.14509.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def why_not(heads: int, kv_heads: int, size: int) -> str | None:
    """Why the heads cannot be split across `size` ranks, with the numbers of ranks that work; or None."""
    good = [n for n in range(1, heads + 1) if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)]
    if size in good:
        return None
    return (
        f"{heads} query heads and {kv_heads} kv heads cannot be split across {size} ranks; set "
        f"engine.sequence_parallel to {' or '.join(map(str, good))}"
    )


def to_heads(q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Exchange this rank's tokens (T/P, heads, D or Dv) for this rank's heads of all tokens: q (T, Hq/P, D), k
    (T, max(1, Hkv/P), D) and v (T, max(1, Hkv/P), Dv).

    A collective, forward and backward. Raises ValueError if the heads cannot be split across P ranks.
    """
    if reason := why_not(q.shape[1], k.shape[1], dist.get_world_size(group)):
        raise ValueError(reason)
    apply: Any = _ToHeads.apply
    heads: tuple[Tensor, Tensor, Tensor] = apply(q, k, v, group)
    return heads


def own_heads(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's part of one value per query head: (Hq,) to (Hq/P,). The gradients of the ranks add up to all."""
    return values.tensor_split(dist.get_world_size(group))[dist.get_rank(group)]


def to_tokens(out: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Exchange this rank's heads of all tokens (T, Hq/P, D) for all heads of this rank's tokens (T/P, Hq, D).

    A collective, forward and backward.
    """
    apply: Any = _ToTokens.apply
    tokens: Tensor = apply(out, group)
    return tokens


@torch.no_grad()
def gather_tokens(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gather (T/P,) of each rank into (T,) on every rank, without a gradient. A collective."""
    shards = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shards, values.contiguous(), group=group)
    return torch.cat(shards)


def _exchange(blocks: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Send block j of (P, …) to rank j; block i of the result comes from rank i."""
    received = torch.empty_like(blocks, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, blocks.contiguous(), group=group)
    return received


def _split_heads(x: Tensor, size: int) -> Tensor:
    """(T/P, heads, D) to (P, T/P, heads/P, D): each rank gets consecutive heads."""
    blocks: Tensor = x.unflatten(1, (size, -1))
    return blocks.transpose(0, 1)


def _join_heads(blocks: Tensor) -> Tensor:
    """(P, T/P, heads/P, D) to (T/P, heads, D): the inverse of `_split_heads`."""
    return blocks.transpose(0, 1).flatten(1, 2)


def _join(blocks: Sequence[Tensor]) -> Tensor:
    """Tensors (…, heads, D) of several sizes to one (…, Σ heads·D)."""
    return torch.cat([x.flatten(-2) for x in blocks], dim=-1)


def _split(joined: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """The inverse of `_join`, from the (heads, D) of each tensor."""
    parts = joined.split([heads * dim for heads, dim in shapes], dim=-1)
    return [part.unflatten(-1, shape) for part, shape in zip(parts, shapes, strict=True)]


class _ToHeads(torch.autograd.Function):
    """q, k and v are sent in one message, so there is one collective, in the same order on every rank."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, ...]:
        size = dist.get_world_size(group)
        ctx.group, ctx.copies = group, max(1, size // k.shape[1])
        if ctx.copies > 1:
            k, v = k.repeat_interleave(ctx.copies, 1), v.repeat_interleave(ctx.copies, 1)
        blocks = [_split_heads(x, size) for x in (q, k, v)]
        ctx.shapes = [tuple(x.shape[2:]) for x in blocks]
        received = _exchange(_join(blocks), group).flatten(0, 1)
        return tuple(_split(received, ctx.shapes))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        size = dist.get_world_size(ctx.group)
        sent = _join([x.unflatten(0, (size, -1)) for x in gradients])
        dq, dk, dv = (_join_heads(blocks) for blocks in _split(_exchange(sent, ctx.group), ctx.shapes))
        if ctx.copies > 1:
            dk, dv = (x.unflatten(1, (-1, ctx.copies)).sum(2) for x in (dk, dv))
        return dq, dk, dv, None


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _join_heads(_exchange(out.unflatten(0, (dist.get_world_size(group), -1)), group))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        sent = _split_heads(gradient, dist.get_world_size(ctx.group))
        return _exchange(sent, ctx.group).flatten(0, 1), None
