"""The flash backend: the installed flash-attention package, in the newest generation that supports the GPU.

Its kernels need value heads of the size of the query and key heads, so smaller ones are padded with zeros.

FlashAttention-4 is `flash_attn.cute` (package flash-attn-4), FlashAttention-3 is `flash_attn_interface` (package
flash-attn-3), FlashAttention-2 is `flash_attn`. All of them read `cu_seqlens` on the device, without a device sync.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from delib_fast.ops import _dispatch
from delib_fast.ops.varlen_attention._padding import same_head_dims


class _Generation(NamedTuple):
    name: str
    module: str
    capabilities: range  # major compute capabilities with forward and backward kernels
    no_window: int | None  # the value of window_size that means no limit
    softcap: bool  # whether the backward kernels support it for sequences of several lengths


# In order of preference, for a GPU that several of them support.
_GENERATIONS = (
    _Generation("flash-attn-4", "flash_attn.cute.interface", range(10, 13), None, softcap=False),
    _Generation("flash-attn-3", "flash_attn_interface", range(9, 10), -1, softcap=True),
    _Generation("flash-attn-4", "flash_attn.cute.interface", range(9, 10), None, softcap=False),
    _Generation("flash-attn", "flash_attn.flash_attn_interface", range(8, 13), -1, softcap=True),
)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is not installed
        return False


# Looked up once, at import: torch.compile traces a search for a module, even if @cache has its result, and fails.
_INSTALLED = {generation.module: _is_installed(generation.module) for generation in _GENERATIONS}


@_dispatch.constant_under_compile
def _generation(major: int, softcap: bool) -> _Generation | None:
    usable = (g for g in _GENERATIONS if major in g.capabilities and _INSTALLED[g.module])
    return next((g for g in usable if not softcap or _takes_softcap(g)), None)


def _takes_softcap(generation: _Generation) -> bool:
    return generation.softcap and "softcap" in inspect.signature(_function(generation.module)).parameters


@_dispatch.constant_under_compile
def _function(module: str) -> Callable[..., Any]:
    function: Callable[..., Any] = importlib.import_module(module).flash_attn_varlen_func
    return function


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
    if not any(_INSTALLED.values()):
        return "no flash-attention package is installed (flash-attn, flash-attn-3 or flash-attn-4)"
    for what, given in (("a shared prefix needs", shared_prefix), ("sinks need", sinks)):
        if given:
            return f"its backward function takes no log-sum-exp, which {what}"
    major, minor = _dispatch.compute_capability(q.device)
    if _generation(major, False) is None:
        return f"the installed flash-attention package has no kernels for compute capability {major}.{minor}"
    if _generation(major, softcap) is None:
        return "the installed flash-attention package has no softcap; flash-attn 2.6 or newer and flash-attn-3 have one"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"it supports bfloat16 and float16, not {q.dtype}"
    dim = max(q.shape[-1], v.shape[-1])
    if dim > 256 or dim % 8:
        return f"it supports head dims that are multiples of 8 and at most 256, not {dim}"
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
    generation = _generation(_dispatch.compute_capability(q.device)[0], softcap is not None)
    assert generation is not None, "why_not must be called first"
    assert sinks is None, "why_not must be called first"
    scale, value_dim = q.shape[-1] ** -0.5 if scale is None else scale, v.shape[-1]
    q, k, v = same_head_dims(q, k, v)
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
        **({} if softcap is None else {"softcap": softcap}),
    )
    first: Tensor = out[0] if isinstance(out, tuple) else out  # flash-attn-4 and early flash-attn-3 also return the lse
    return first[..., :value_dim]
