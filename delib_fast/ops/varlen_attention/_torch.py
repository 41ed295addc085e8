"""The torch backend: `torch.nn.attention.varlen.varlen_attn`, the flash kernel of torch, on CUDA devices.

torch's op has its own fake kernel and autograd formula, so none are registered here. It reads `cu_seqlens` on the
device and takes `max_seqlen` as an int on the host, so there is no device sync. Padding must be a sequence of
`cu_seqlens`: torch 2.13 does not write the gradients of tokens after the last sequence, so they would be NaN. Its
kernels need value heads of the size of the query and key heads, so the smaller are padded with zeros.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from delib_fast.ops import _dispatch
from delib_fast.ops.varlen_attention._merged import NO_PREFIX, Layout, plan_prefixes, register
from delib_fast.ops.varlen_attention._padding import same_head_dims

varlen_attn: Any
try:
    from torch.nn.attention.varlen import varlen_attn  # since torch 2.10
except ImportError:
    varlen_attn = None


def _find_missing() -> str | None:
    """Return what this version of torch lacks, or None."""
    if varlen_attn is None:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen; it needs torch 2.10 or later"
    if "window_size" not in inspect.signature(varlen_attn).parameters:
        return f"varlen_attn of torch {torch.__version__} has no window_size; it needs torch 2.11 or later"
    return None


# Looked up once, at import: torch.compile would trace the search.
_MISSING = _find_missing()
# Older versions accept fewer kv heads without this argument.
_GQA: dict[str, Any] = (
    {"enable_gqa": True} if varlen_attn and "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
)


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
    if not _dispatch.on_gpu(q):
        return f"it needs CUDA tensors; these are on {q.device.type}"
    if _MISSING:
        return _MISSING
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"it supports bfloat16 and float16, not {q.dtype}"
    dim = max(q.shape[-1], v.shape[-1])
    if dim > 256 or dim % 8:
        return f"it supports head dims that are multiples of 8 and at most 256, not {dim}"
    if _dispatch.compute_capability(q.device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or higher"
    if softcap:
        return "varlen_attn has no softcap; a flash-attention package (flash-attn or flash-attn-3) has one"
    if shared_prefix and window is not None:
        return "a sliding window is not supported together with a shared prefix"
    return _why_no_merge("a shared prefix needs" if shared_prefix else "sinks need") if shared_prefix or sinks else None


def _why_no_merge(what: str) -> str | None:
    # varlen_attn returns a log-sum-exp but takes none; its backward op takes one.
    for name in ("_varlen_attn", "_varlen_attn_backward"):
        if not hasattr(torch.ops.torch_attn, name):
            return f"torch {torch.__version__} has no torch_attn::{name}, which {what}"
    return None


def _window_size(layout: Layout) -> list[int]:
    """torch counts the tokens *before* the query: a window of 1 (the token itself) is (0, 0), no window is (-1, 0)."""
    return [layout.window - 1 if layout.window else -1, 0 if layout.causal else -1]


def _forward(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, _ = torch.ops.torch_attn._varlen_attn(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        layout.cu_q,
        layout.cu_k,
        layout.max_q,
        layout.max_k,
        scale=scale,
        window_size=_window_size(layout),
    )
    return out, lse.T.unsqueeze(-1)  # (Hq, T) to (T, Hq, 1)


def _backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: Layout, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
    dq, dk, dv = torch.ops.torch_attn._varlen_attn_backward(
        d_out.contiguous(),
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        out.contiguous(),
        lse.squeeze(-1).T.contiguous(),
        layout.cu_q,
        layout.cu_k,
        layout.max_q,
        layout.max_k,
        False,
        no_dropout,
        scale,
        _window_size(layout),
    )
    return dq, dk, dv


_merged = register("varlen_attention_merged_torch", _forward, _backward)


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
    assert softcap is None, "why_not must be called first"
    scale, value_dim = q.shape[-1] ** -0.5 if scale is None else scale, v.shape[-1]
    q, k, v = same_head_dims(q, k, v)
    window = 0 if window is None or window >= max_seqlen else window
    plan = None
    if prefix is not None:
        host = tuple(cu_seqlens.tolist()) if cu_seqlens_host is None else tuple(cu_seqlens_host)
        plan = plan_prefixes(host, tuple(prefix), q.device)
    if plan or sinks is not None:
        merged = _merged(q, k, v, sinks, cu_seqlens, max_seqlen, scale, window, *(plan or NO_PREFIX))[0]
        return merged[..., :value_dim]
    gqa = _GQA if q.shape[1] != k.shape[1] else {}
    out = varlen_attn(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        scale=scale,
        window_size=(window - 1, 0),
        **gqa,
    )
    assert isinstance(out, Tensor), "varlen_attn returns a tuple only if return_aux is given"
    return out[..., :value_dim]
