"""The flash backend: the installed flash-attention package, in the newest generation that supports the GPU.

FlashAttention-4 is `flash_attn.cute` (package flash-attn-4), FlashAttention-3 is `flash_attn_interface` (package
flash-attn-3), FlashAttention-2 is `flash_attn`. All of them read `cu_seqlens` on the device, without a device sync.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Generation(NamedTuple):
    name: str
    module: str
    capabilities: range  # major compute capabilities with forward and backward kernels
    no_window: int | None  # the value of window_size that means no limit


# In order of preference, for a GPU that several of them support.
_GENERATIONS = (
    _Generation("flash-attn-4", "flash_attn.cute.interface", range(10, 13), None),
    _Generation("flash-attn-3", "flash_attn_interface", range(9, 10), -1),
    _Generation("flash-attn-4", "flash_attn.cute.interface", range(9, 10), None),
    _Generation("flash-attn", "flash_attn.flash_attn_interface", range(8, 13), -1),
)


@cache
def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is not installed
        return False


@cache
def _generation(major: int) -> _Generation | None:
    return next((g for g in _GENERATIONS if major in g.capabilities and _installed(g.module)), None)


@cache
def _function(module: str) -> Callable[..., Any]:
    function: Callable[..., Any] = importlib.import_module(module).flash_attn_varlen_func
    return function


def why_not(q: Tensor, k: Tensor, v: Tensor, window: int | None, shared_prefix: bool = False) -> str | None:
    """Return the reason that this backend cannot run these tensors, or None."""
    if q.device.type != "cuda":
        return f"it needs CUDA tensors; these are on {q.device.type}"
    if not any(_installed(g.module) for g in _GENERATIONS):
        return "no flash-attention package is installed (flash-attn, flash-attn-3 or flash-attn-4)"
    if shared_prefix:
        return "its backward function takes no log-sum-exp, which a shared prefix needs"
    major, minor = torch.cuda.get_device_capability(q.device)
    if _generation(major) is None:
        return f"the installed flash-attention package has no kernels for compute capability {major}.{minor}"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"it supports bfloat16 and float16, not {q.dtype}"
    if q.shape[-1] > 256 or q.shape[-1] % 8:
        return f"it supports head dims that are multiples of 8 and at most 256, not {q.shape[-1]}"
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
    """Run the op; the arguments and the result are those of `ops.varlen_attention`."""
    generation = _generation(torch.cuda.get_device_capability(q.device)[0])
    assert generation is not None, "why_not must be called first"
    # flash-attention counts the tokens *before* the query, so a window of 1 (the token itself) is (0, 0).
    limited = window is not None and window < max_seqlen
    window_size = (window - 1, 0) if limited and window is not None else (generation.no_window,) * 2
    out = _function(generation.module)(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen,
        softmax_scale=scale,
        causal=True,
        window_size=window_size,
    )
    first: Tensor = out[0] if isinstance(out, tuple) else out  # flash-attn-4 and early flash-attn-3 also return the lse
    return first
