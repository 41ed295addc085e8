"""Run the dispatch of a GPU on CPU tensors: the device checks are inverted, and the kernels are stand-ins.

The stand-ins compute the real results on the CPU, so that losses and gradients of a whole model can be compared. What
is tested is the rest: the choice of a backend, its checks, the ops of torch, and torch.compile of all this.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from delib_fast.ops import _dispatch
from delib_fast.ops.linear_cross_entropy import _chunked, _cuda
from delib_fast.ops.linear_cross_entropy._call import LogitsChunk, LossCall, LossResults
from delib_fast.ops.varlen_attention import _cpu, _flash
from delib_fast.ops.varlen_attention._merged import Layout


def as_if_gpu(monkeypatch: Any, *, flash: bool = False) -> list[Any]:
    """Make every backend believe that CPU tensors are on an H100, and register CPU kernels for its ops.

    Args:
        flash: a flash-attention package is installed.
    Returns:
        The registrations; keep them as long as they are needed.
    """
    monkeypatch.setattr(_dispatch, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(_cuda, "_WHY_NO_LIBRARY", None)
    for op in ("linear_cross_entropy", "varlen_attention"):
        module = importlib.import_module(f"delib_fast.ops.{op}")
        # the backend of a CPU could run these tensors as well
        monkeypatch.setattr(module, "BACKENDS", tuple(b for b in module.BACKENDS if b.name != "cpu"))
    monkeypatch.setattr(_flash, "_INSTALLED", {g.module: flash and g.name == "flash-attn" for g in _flash._GENERATIONS})
    monkeypatch.setattr(_flash, "_function", lambda module: _flash_attention)
    losses = torch.library.Library("delib_fast", "IMPL")
    losses.impl("linear_cross_entropy_cuda", _loss_kernel, "CPU")
    attention = torch.library.Library("torch_attn", "IMPL")
    attention.impl("_varlen_attn", _varlen_attn, "CPU")
    attention.impl("_varlen_attn_backward", _varlen_attn_backward, "CPU")
    return [losses, attention]


def _loss_kernel(*args: Any) -> LossResults:
    return _chunked.run_chunks(softmax_gradient, LossCall(*args))


def softmax_gradient(chunk: LogitsChunk) -> None:
    """The kernel of a chunk in plain torch, for logits without further terms."""
    target = chunk.targets[chunk.positions]
    weight = torch.ones(len(target)) if chunk.row_weights is None else chunk.row_weights[chunk.positions]
    live = (target != chunk.ignore_index) & (weight != 0)
    z, target = chunk.logits.float(), target.clamp(min=0)
    nll = z.logsumexp(1) - z.gather(1, target[:, None])[:, 0]
    chunk.nll[chunk.positions] = nll.where(live, 0)
    chunk.correct[chunk.positions] = live & (z.argmax(1) == target)
    if chunk.need_gradient:
        dz = z.softmax(1).scatter_add(1, target[:, None], -torch.ones(len(target), 1)) * weight[:, None]
        chunk.logits.copy_(dz.masked_fill(~live[:, None], 0))


def _layout(cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, window: list[int]) -> Layout:
    causal = window[1] == 0
    return Layout(cu_q, cu_k, max_q, max_k, causal, window[0] + 1 if causal and window[0] >= 0 else 0)


def _varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False, scale=None, window_size=None, *_):
    wide = (q.float(), k.float(), v.float())
    out, lse = _cpu._attention(*wide, _layout(cu_q, cu_k, max_q, max_k, window_size), scale)
    return out.to(q.dtype), lse.squeeze(-1).T.contiguous(), torch.zeros(2, dtype=torch.uint64)


def _varlen_attn_backward(
    d_out, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, is_causal, rng_state, scale=None, window_size=None, *_
):
    wide = (x.float() for x in (d_out, q, k, v, out))
    layout = _layout(cu_q, cu_k, max_q, max_k, window_size)
    grads = _cpu._attention_backward(*wide, lse.T.unsqueeze(-1).contiguous(), layout, scale)
    return tuple(grad.to(x.dtype) for grad, x in zip(grads, (q, k, v), strict=True))


def _flash_attention(q, k, v, *, cu_seqlens_q, max_seqlen_q, softmax_scale, window_size, softcap=0.0, **_):
    window = 0 if window_size[0] is None or window_size[0] < 0 else window_size[0] + 1
    return torch.ops.delib_fast.varlen_attention_cpu(
        q, k, v, None, cu_seqlens_q, max_seqlen_q, softmax_scale, window, softcap
    )[0]
