"""The cpu backend: the C++ loops of csrc/varlen_attention, or torch's flash kernel for what they do not support.

The C++ loops process each sequence and kv head as a separate task, so nothing is padded, and no key is copied for the
query heads that share it. They support float32 and bfloat16 and head dims that are multiples of 16 up to 256. Only they
cap scores. On processors with AMX or AVX-512 BF16 they multiply bfloat16 with float32 sums, and round probabilities and
the gradients of scores to bfloat16, as the kernels of GPUs do; on others they convert bfloat16 to float32. Packs in
which the number of sequences × kv heads is below the number of threads would leave threads idle, so without a cap they
use torch's kernel.

Everything else uses `_scaled_dot_product_flash_attention_for_cpu`, forward and backward. The sequences of a pack are
grouped into a few batches of similar length, so that a hundred short sequences need a few kernel calls instead of a
hundred. A shorter sequence of a batch is padded with zeros at its end. The mask is causal, so no real token attends to
the padding, and the outputs of the padding are dropped. A (T, T) mask is never built. With a sliding window each block
of queries attends only to the keys that are visible to it, at a cost of O(T·window). Sinks are merged afterwards.

torch's kernel computes bfloat16 and float16 in float32: the half-precision backward kernel of torch 2.13 takes 10 times
as long (T = 2048, 8 heads of 64, one sequence, 2 cores: 1413 ms against 144 ms), and its forward kernel is no faster.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from delib_fast.ops._library import LIBRARY, WHY_NO_COMPILED
from delib_fast.ops.varlen_attention._checks import check_cu_seqlens
from delib_fast.ops.varlen_attention._merged import (
    Layout,
    fake_outputs,
    merge_sinks,
    plan_prefixes,
    register,
    sinks_gradient,
)
from delib_fast.ops.varlen_attention._padding import same_head_dims

_forward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

LIBRARY.define(
    "varlen_attention_compiled(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor cu_seqlens, float scale, "
    "int window, float softcap) -> (Tensor out, Tensor lse)"
)
LIBRARY.define(
    "varlen_attention_compiled_backward(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor cu_seqlens, float scale, int window, float softcap) -> (Tensor dq, Tensor dk, Tensor dv)"
)

# The shortest sequence of a batch, as a fraction of the longest: at most 1 - 0.75² of the scores are padding.
_MIN_LENGTH_RATIO = 0.75
# Sequences up to this length are batched anyway: the kernel call costs more than the scores.
_SHORT_TOKENS = 32
# The smallest block of queries with a sliding window: with smaller ones the calls cost more than the scores they save.
_MIN_WINDOW_BLOCK = 128


def why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    shared_prefix: bool = False,
    softcap: bool = False,
    sinks: bool = False,
) -> str | None:
    """Return the reason that this backend cannot run these tensors, or None."""
    if q.device.type != "cpu":
        return f"it needs CPU tensors; these are on {q.device.type}"
    if q.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        return f"it supports float64, float32, bfloat16 and float16, not {q.dtype}"
    for what, given in (("a sliding window is", window is not None), ("a softcap is", softcap)):
        if shared_prefix and given:
            return f"{what} not supported together with a shared prefix"
    if softcap and WHY_NO_COMPILED is not None:
        return f"softcap needs the C++ loops: {WHY_NO_COMPILED}"
    if softcap and not _has_loops(q, v):
        return (
            "with a softcap it supports float32 and bfloat16 and head dims that are multiples of 16 up to 256, not "
            f"{q.dtype} and {q.shape[-1]}" + ("" if q.shape[-1] == v.shape[-1] else f" and {v.shape[-1]}")
        )
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
    softcap: float | None = None,
    sinks: Tensor | None = None,
    cu_seqlens_host: Sequence[int] | None = None,
    prefix: Sequence[int] | None = None,
) -> Tensor:
    """Run the op; the arguments and the result are those of `ops.varlen_attention`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if prefix is not None:
        host = tuple(cu_seqlens.tolist()) if cu_seqlens_host is None else tuple(cu_seqlens_host)
        if plan := plan_prefixes(host, tuple(prefix), q.device):
            # In float32 throughout, so that the two attentions are merged before they are rounded.
            wide = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in same_head_dims(q, k, v)]
            merged = _merged(*wide, sinks, cu_seqlens, max_seqlen, scale, 0, *plan)[0]
            return merged[..., : v.shape[-1]].to(q.dtype)
    # 0 means no window and no cap in the op's schema.
    window = 0 if window is None or window >= max_seqlen else window
    out: Tensor = torch.ops.delib_fast.varlen_attention_cpu(
        q, k, v, sinks, cu_seqlens, max_seqlen, scale, window, softcap or 0.0
    )[0]
    return out


def _has_loops(q: Tensor, v: Tensor) -> bool:
    """Return whether the C++ loops exist for this dtype and these head dims."""
    dims = (q.shape[-1], v.shape[-1])
    return q.dtype in (torch.float32, torch.bfloat16) and all(dim % 16 == 0 and dim <= 256 for dim in dims)


def compiled_supports(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Sequence[int], softcap: float) -> bool:
    """Return whether to use the C++ loops.

    They parallelise over sequences and kv heads, so a single long sequence with few heads would leave threads idle.
    """
    tasks = k.shape[1] * sum(end > start for start, end in pairwise(cu_seqlens))
    return WHY_NO_COMPILED is None and _has_loops(q, v) and (softcap > 0 or tasks >= torch.get_num_threads())


class _Batch(NamedTuple):
    """Sequences that one kernel call computes."""

    starts: list[int]
    lengths: list[int]
    longest: int

    def gather(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the sequences of x (T, H, D) as (B, H, longest, D), each padded with zeros at its end."""
        if len(self.starts) == 1:
            return x[self.starts[0] : self.starts[0] + self.longest].to(dtype).transpose(0, 1).unsqueeze(0)
        batch = x.new_zeros((len(self.starts), self.longest, *x.shape[1:]), dtype=dtype)
        for row, (start, length) in enumerate(zip(self.starts, self.lengths, strict=True)):
            batch[row, :length] = x[start : start + length]
        return batch.transpose(1, 2)

    def scatter(self, batch_BHLD: Tensor, x: Tensor) -> None:
        """Write the sequences of the batch to x (T, H, D); the inverse of `gather`."""
        for row, (start, length) in enumerate(zip(self.starts, self.lengths, strict=True)):
            x[start : start + length] = batch_BHLD[row, :, :length].transpose(0, 1)


def _batches(cu_seqlens: list[int]) -> list[_Batch]:
    """Group the sequences that are not empty into batches of similar length."""
    sequences = sorted(((end - start, start) for start, end in pairwise(cu_seqlens) if end > start), reverse=True)
    batches: list[_Batch] = []
    for length, start in sequences:
        last = batches[-1] if batches else None
        if last is not None and (length >= _MIN_LENGTH_RATIO * last.longest or last.longest <= _SHORT_TOKENS):
            last.starts.append(start)
            last.lengths.append(length)
        else:
            batches.append(_Batch([start], [length], length))
    return batches


def _blocks(longest: int, window: int, dtype: torch.dtype) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """Yield (queries, keys, additive mask) for each kernel call; without a window there is one causal call."""
    if not 0 < window < longest:
        yield slice(0, longest), slice(0, longest), None
        return
    size = max(window, _MIN_WINDOW_BLOCK)
    for begin in range(0, longest, size):
        end = min(begin + size, longest)
        first_key = max(0, begin - window + 1)
        distance = torch.arange(begin, end).view(-1, 1) - torch.arange(first_key, end).view(1, -1)
        hidden = (distance < 0) | (distance >= window)
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
        yield slice(begin, end), slice(first_key, end), mask


@torch.library.custom_op("delib_fast::varlen_attention_cpu", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    offsets = cu_seqlens.tolist()
    check_cu_seqlens(offsets, q.shape[0], max_seqlen)
    if compiled_supports(q, k, v, offsets, softcap):
        float_sinks = None if sinks is None else sinks.float()
        out, lse = torch.ops.delib_fast.varlen_attention_compiled(
            q, k, v, float_sinks, cu_seqlens, scale, window, softcap
        )
        return out, lse
    assert softcap == 0, "why_not must be called first"
    dtype = torch.promote_types(q.dtype, torch.float32)
    out = q.new_empty((*q.shape[:2], v.shape[-1]))
    lse = torch.empty((*q.shape[:2], 1), dtype=dtype)  # (T, Hq, 1), so that it is gathered in the same way as out
    for batch in _batches(offsets):
        q_B, k_B, v_B = same_head_dims(*(batch.gather(x, dtype) for x in (q, k, v)))
        blocks = [
            _forward_kernel(
                q_B[:, :, rows], k_B[:, :, keys], v_B[:, :, keys], 0.0, mask is None, attn_mask=mask, scale=scale
            )
            for rows, keys, mask in _blocks(batch.longest, window, dtype)
        ]
        out_B = torch.cat([o for o, _ in blocks], dim=2)[..., : v.shape[-1]]
        lse_B = torch.cat([e for _, e in blocks], dim=2).unsqueeze(-1)
        if sinks is not None:
            out_B, lse_B = merge_sinks(out_B, lse_B, sinks.unsqueeze(-1))
        batch.scatter(out_B, out)
        batch.scatter(lse_B, lse)
    return out, lse


_forward.register_fake(fake_outputs)


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
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    offsets = cu_seqlens.tolist()
    if compiled_supports(q, k, v, offsets, softcap):
        dq, dk, dv = torch.ops.delib_fast.varlen_attention_compiled_backward(
            d_out, q, k, v, out, lse, cu_seqlens, scale, window, softcap
        )
        return dq, dk, dv
    dtype = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    for batch in _batches(offsets):
        q_B, k_B, v_B = same_head_dims(*(batch.gather(x, dtype) for x in (q, k, v)))
        g_B, o_B = (pad(batch.gather(x, dtype), (0, v_B.shape[-1] - v.shape[-1])) for x in (d_out, out))
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
            batch.scatter(grad_B[..., : grad.shape[-1]], grad)
    return dq, dk, dv


@_backward.register_fake
def _(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, sinks, cu_seqlens, _, ctx.scale, ctx.window, ctx.softcap = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, sinks)
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx: Any, d_out: Tensor, _d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, cu_seqlens, sinks = ctx.saved_tensors
    dq, dk, dv = torch.ops.delib_fast.varlen_attention_cpu_backward(
        d_out, q, k, v, out, lse, cu_seqlens, ctx.scale, ctx.window, ctx.softcap
    )
    d_sinks = sinks_gradient(d_out, out, lse, sinks) if ctx.needs_input_grad[3] else None
    return dq, dk, dv, d_sinks, None, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> tuple[Tensor, Tensor]:
    if layout.causal:
        out, lse = _forward(q, k, v, None, layout.cu_q, layout.max_q, scale, layout.window, 0.0)
        return out, lse
    out, lse = torch.empty(q.shape, dtype=q.dtype), torch.empty((*q.shape[:2], 1), dtype=q.dtype)
    for rows, keys in _slices(layout):
        o, e = _forward_kernel(_heads(q, rows), _heads(k, keys), _heads(v, keys), 0.0, False, scale=scale)
        out[rows], lse[rows] = o[0].transpose(0, 1), e[0].T.unsqueeze(-1)
    return out, lse


def _attention_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: Layout, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    if layout.causal:
        dq, dk, dv = _backward(d_out, q, k, v, out, lse, layout.cu_q, scale, layout.window, 0.0)
        return dq, dk, dv
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    for rows, keys in _slices(layout):
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
        for whole, tokens, grad in zip((dq, dk, dv), (rows, keys, keys), grads, strict=True):
            whole[tokens] = grad[0].transpose(0, 1)
    return dq, dk, dv


def _slices(layout: Layout) -> Iterator[tuple[slice, slice]]:
    """Yield the queries and the keys of each sequence."""
    for queries, keys in zip(pairwise(layout.cu_q.tolist()), pairwise(layout.cu_k.tolist()), strict=True):
        yield slice(*queries), slice(*keys)


def _heads(x: Tensor, tokens: slice) -> Tensor:
    """Return the tokens of x (T, H, D) as (1, H, L, D)."""
    return x[tokens].transpose(0, 1).unsqueeze(0)


_merged = register("varlen_attention_merged_cpu", _attention, _attention_backward)
