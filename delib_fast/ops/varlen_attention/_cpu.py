"""CPU backend: our own loops in C++ (csrc/varlen_attention), or torch's flash kernel where they don't apply.

Ours take each run under each kv head as a task of its own, so nothing is padded and no key is copied for the query
heads that share it. They do float32 and bfloat16, head dims that are multiples of 16 up to 256, no window, and packs
with at least as many runs × kv heads as there are threads.

The rest goes through `_scaled_dot_product_flash_attention_for_cpu`, forward and backward.
The runs of a pack are put in a few batches of similar length, so that a hundred short runs cost a few kernel
calls instead of a hundred. A shorter run of a batch is padded behind its end with zeros: the mask is causal,
so no real token sees the padding, and the padding's own rows are dropped. No (T, T) mask is ever built; a
sliding window is done a block of queries at a time against the keys that the block can see, O(T·window).

bf16 and fp16 are computed in fp32: torch 2.13's half-precision backward kernel takes 10 times as long (T =
2048, 8 heads of 64, one run, 2 cores: 1413 ms against 144 ms), and the forward pass is no faster.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from delib_fast.ops._library import LIBRARY, WHY_NO_COMPILED
from delib_fast.ops.varlen_attention._checks import check_runs
from delib_fast.ops.varlen_attention._prefix import plan, register

_forward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

LIBRARY.define(
    "varlen_attention_runs(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, float scale) -> (Tensor out, Tensor lse)"
)
LIBRARY.define(
    "varlen_attention_runs_backward(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor cu_seqlens, float scale) -> (Tensor dq, Tensor dk, Tensor dv)"
)

# A batch takes runs down to this share of its longest one: at most 1 - 0.75² of its scores are padding.
_SHORTEST_SHARE = 0.75
# Runs as short as this go together anyway: what they cost is the call, not the scores.
_SHORT_TOKENS = 32
# Queries a block under a sliding window: below this, calls cost more than the scores that they save.
_LEAST_WINDOW_BLOCK = 128


def why_not(q: Tensor, k: Tensor, v: Tensor, window: int | None, shared: bool = False) -> str | None:
    """The reason that this backend can't take these tensors, or None."""
    if q.device.type != "cpu":
        return f"it runs on CPU tensors; these are on {q.device.type}"
    if q.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float64, float32, bfloat16 or float16, not {q.dtype}"
    if shared and window is not None:
        return "a sliding window across a shared prefix is not done by two attentions"
    return None


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    window: int | None = None,
    cu_seqlens_host: Sequence[int] | None = None,
    prefix: Sequence[int] | None = None,
) -> Tensor:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if prefix is not None:
        host = tuple(cu_seqlens.tolist()) if cu_seqlens_host is None else tuple(cu_seqlens_host)
        if shared := plan(host, tuple(prefix), q.device):
            # in float32 throughout, so that the halves are merged before anything is rounded
            wide = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v)]
            return _with_prefix(*wide, cu_seqlens, max_seqlen, scale, *shared)[0].to(q.dtype)
    window = 0 if window is None or window >= max_seqlen else window  # 0 is none, in the op's schema
    return torch.ops.delib_fast.varlen_attention_cpu(q, k, v, cu_seqlens, max_seqlen, scale, window)[0]


def compiled_can(q: Tensor, k: Tensor, runs: Sequence[int], window: int) -> bool:
    """Whether the C++ loops take these tensors. They share out runs and kv heads, so a lone long run under few heads
    would keep most threads waiting."""
    tasks = k.shape[1] * sum(end > start for start, end in pairwise(runs))
    return (
        WHY_NO_COMPILED is None
        and window == 0
        and q.dtype in (torch.float32, torch.bfloat16)
        and q.shape[-1] % 16 == 0
        and q.shape[-1] <= 256
        and tasks >= torch.get_num_threads()
    )


class _Batch(NamedTuple):
    """Runs that go through the kernel together."""

    starts: list[int]
    lengths: list[int]
    longest: int

    def gather(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The runs of x (T, H, D) as (B, H, longest, D), zeros behind the end of each."""
        if len(self.starts) == 1:
            return x[self.starts[0] : self.starts[0] + self.longest].to(dtype).transpose(0, 1).unsqueeze(0)
        batch = x.new_zeros((len(self.starts), self.longest, *x.shape[1:]), dtype=dtype)
        for row, (start, length) in enumerate(zip(self.starts, self.lengths, strict=True)):
            batch[row, :length] = x[start : start + length]
        return batch.transpose(1, 2)

    def scatter(self, batch_BHLD: Tensor, x: Tensor) -> None:
        """The inverse of `gather`: writes the runs of the batch into x (T, H, D)."""
        for row, (start, length) in enumerate(zip(self.starts, self.lengths, strict=True)):
            x[start : start + length] = batch_BHLD[row, :, :length].transpose(0, 1)


def _batches(cu_seqlens: list[int]) -> list[_Batch]:
    runs = sorted(((end - start, start) for start, end in pairwise(cu_seqlens) if end > start), reverse=True)
    batches: list[_Batch] = []
    for length, start in runs:
        last = batches[-1] if batches else None
        if last is not None and (length >= _SHORTEST_SHARE * last.longest or last.longest <= _SHORT_TOKENS):
            last.starts.append(start)
            last.lengths.append(length)
        else:
            batches.append(_Batch([start], [length], length))
    return batches


def _blocks(longest: int, window: int, dtype: torch.dtype) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """(queries, keys, additive mask) of each kernel call; without a window one call that is simply causal."""
    if not 0 < window < longest:
        yield slice(0, longest), slice(0, longest), None
        return
    size = max(window, _LEAST_WINDOW_BLOCK)
    for begin in range(0, longest, size):
        end = min(begin + size, longest)
        first_key = max(0, begin - window + 1)
        distance = torch.arange(begin, end).view(-1, 1) - torch.arange(first_key, end).view(1, -1)
        hidden = (distance < 0) | (distance >= window)
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
        yield slice(begin, end), slice(first_key, end), mask


@torch.library.custom_op("delib_fast::varlen_attention_cpu", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    runs = cu_seqlens.tolist()
    check_runs(runs, q.shape[0], max_seqlen)
    if compiled_can(q, k, runs, window):
        return torch.ops.delib_fast.varlen_attention_runs(q, k, v, cu_seqlens, scale)
    dtype = torch.promote_types(q.dtype, torch.float32)
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty((*q.shape[:2], 1), dtype=dtype)  # (T, Hq, 1), so that it gathers like out
    for batch in _batches(runs):
        q_B, k_B, v_B = (batch.gather(x, dtype) for x in (q, k, v))
        blocks = [
            _forward_kernel(
                q_B[:, :, rows], k_B[:, :, keys], v_B[:, :, keys], 0.0, mask is None, attn_mask=mask, scale=scale
            )
            for rows, keys, mask in _blocks(batch.longest, window, dtype)
        ]
        batch.scatter(torch.cat([o for o, _ in blocks], dim=2), out)
        batch.scatter(torch.cat([e for _, e in blocks], dim=2).unsqueeze(-1), lse)
    return out, lse


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((*q.shape[:2], 1), dtype=dtype)


@torch.library.custom_op("delib_fast::varlen_attention_cpu_backward", mutates_args=())
def _backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    runs = cu_seqlens.tolist()
    if compiled_can(q, k, runs, window):
        return torch.ops.delib_fast.varlen_attention_runs_backward(d_out, q, k, v, out, lse, cu_seqlens, scale)
    dtype = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    for batch in _batches(runs):
        g_B, q_B, k_B, v_B, o_B = (batch.gather(x, dtype) for x in (d_out, q, k, v, out))
        e_B = batch.gather(lse, dtype).squeeze(-1)
        dq_B, dk_B, dv_B = (torch.zeros_like(x) for x in (q_B, k_B, v_B))
        for rows, keys, mask in _blocks(batch.longest, window, dtype):
            grads = _backward_kernel(
                g_B[:, :, rows],
                q_B[:, :, rows],
                k_B[:, :, keys],
                v_B[:, :, keys],
                o_B[:, :, rows],
                e_B[:, :, rows],
                0.0,
                mask is None,
                attn_mask=mask,
                scale=scale,
            )
            dq_B[:, :, rows] = grads[0]
            dk_B[:, :, keys] += grads[1]
            dv_B[:, :, keys] += grads[2]
        for grad_B, grad in ((dq_B, dq), (dk_B, dk), (dv_B, dv)):
            batch.scatter(grad_B, grad)
    return dq, dk, dv


@_backward.register_fake
def _(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, cu_seqlens, _, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx, d_out: Tensor, _d_lse: Tensor | None):
    q, k, v, out, lse, cu_seqlens = ctx.saved_tensors
    dq, dk, dv = torch.ops.delib_fast.varlen_attention_cpu_backward(
        d_out, q, k, v, out, lse, cu_seqlens, ctx.scale, ctx.window
    )
    return dq, dk, dv, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _half(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    if causal:
        return _forward(q, k, v, cu_q, max_q, scale, 0)
    out, lse = torch.empty(q.shape, dtype=q.dtype), torch.empty((*q.shape[:2], 1), dtype=q.dtype)
    for rows, keys in _pairs(cu_q, cu_k):
        o, e = _forward_kernel(_heads(q, rows), _heads(k, keys), _heads(v, keys), 0.0, False, scale=scale)
        out[rows], lse[rows] = o[0].transpose(0, 1), e[0].T.unsqueeze(-1)
    return out, lse


def _half_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if causal:
        return _backward(d_out, q, k, v, out, lse, cu_q, scale, 0)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    for rows, keys in _pairs(cu_q, cu_k):
        grads = _backward_kernel(
            _heads(d_out, rows),
            _heads(q, rows),
            _heads(k, keys),
            _heads(v, keys),
            _heads(out, rows),
            _heads(lse, rows).squeeze(-1),
            0.0,
            False,
            scale=scale,
        )
        for whole, places, grad in zip((dq, dk, dv), (rows, keys, keys), grads, strict=True):
            whole[places] = grad[0].transpose(0, 1)
    return dq, dk, dv


def _pairs(cu_q: Tensor, cu_k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Of each prefix: the queries and the keys."""
    for queries, keys in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        yield slice(*queries), slice(*keys)


def _heads(x: Tensor, places: slice) -> Tensor:
    """(T, H, D) to (1, H, L, D)"""
    return x[places].transpose(0, 1).unsqueeze(0)


_with_prefix = register("varlen_attention_prefix_cpu", _half, _half_backward)
