"""torch backend: `torch.nn.attention.varlen.varlen_attn`, the flash kernel that torch brings, on a CUDA
device.

torch's op has its own fake and autograd registrations, so nothing is registered here. It reads `cu_seqlens`
on the device and takes `max_seqlen` as a host int: no sync. A padding tail must be a run of `cu_seqlens` (the
data contract says so): torch 2.13 writes no gradient for tokens behind the last run, and they come out as
NaN.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from delib_fast.ops.varlen_attention._prefix import plan, register


@cache
def _missing() -> str | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen; it came with torch 2.10"
    if "window_size" not in inspect.signature(varlen_attn).parameters:
        return f"torch {torch.__version__} has varlen_attn without window_size; it came with torch 2.11"
    return None


@cache
def _gqa_argument() -> dict[str, Any]:
    """`enable_gqa=True` where this torch's varlen_attn asks for it; an older one just takes fewer kv
    heads."""
    from torch.nn.attention.varlen import varlen_attn

    return {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def why_not(q: Tensor, k: Tensor, v: Tensor, window: int | None, shared: bool = False) -> str | None:
    """The reason that this backend can't take these tensors, or None."""
    if q.device.type != "cuda":
        return f"it runs on CUDA tensors; these are on {q.device.type}"
    if missing := _missing():
        return missing
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 or float16, not {q.dtype}"
    if q.shape[-1] > 256 or q.shape[-1] % 8:
        return f"it takes a head dim that is a multiple of 8 and at most 256, not {q.shape[-1]}"
    if torch.cuda.get_device_capability(q.device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or higher"
    return _no_shared_prefix(window) if shared else None


def _no_shared_prefix(window: int | None) -> str | None:
    if window is not None:
        return "a sliding window across a shared prefix is not done by two attentions"
    # varlen_attn returns its log-sum-exp and takes none; the op below it takes one in its backward
    for name in ("_varlen_attn", "_varlen_attn_backward"):
        if not hasattr(torch.ops.torch_attn, name):
            return f"torch {torch.__version__} has no torch_attn::{name}, which a shared prefix needs"
    return None


def _half(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse, _ = torch.ops.torch_attn._varlen_attn(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        cu_q,
        cu_k,
        max_q,
        max_k,
        scale=scale,
        window_size=[-1, 0 if causal else -1],
    )
    return out, lse.T.unsqueeze(-1)  # (Hq, T) to (T, Hq, 1)


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
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
    return torch.ops.torch_attn._varlen_attn_backward(
        d_out.contiguous(),
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        out.contiguous(),
        lse.squeeze(-1).T.contiguous(),
        cu_q,
        cu_k,
        max_q,
        max_k,
        False,
        no_dropout,
        scale,
        [-1, 0 if causal else -1],
    )


_with_prefix = register("varlen_attention_prefix_torch", _half, _half_backward)


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
    from torch.nn.attention.varlen import varlen_attn

    if prefix is not None:
        host = tuple(cu_seqlens.tolist()) if cu_seqlens_host is None else tuple(cu_seqlens_host)
        if shared := plan(host, tuple(prefix), q.device):
            scale = q.shape[-1] ** -0.5 if scale is None else scale
            return _with_prefix(q, k, v, cu_seqlens, max_seqlen, scale, *shared)[0]
    # torch counts the tokens *before* this one: a window of 1 (the token alone) is (0, 0); none is (-1, 0).
    left = -1 if window is None or window >= max_seqlen else window - 1
    gqa = _gqa_argument() if q.shape[1] != k.shape[1] else {}
    out = varlen_attn(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        scale=scale,
        window_size=(left, 0),
        **gqa,
    )
    assert isinstance(out, Tensor), "no log-sum-exp was asked for"
    return out
