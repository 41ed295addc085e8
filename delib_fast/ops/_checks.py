"""Checks that the fused heads share. They never read device memory."""

import math

import torch
from torch import Tensor

from delib_fast.ops._sharded import is_sharded


def check_not_sharded(op: str, **tensors: Tensor | None) -> None:
    """Raise ValueError if one of the named tensors is a DTensor; those named *hidden are rows, the others weights."""
    for name, tensor in tensors.items():
        if is_sharded(tensor):
            remedy = (
                f"pass the rows of this rank, {name}.to_local()"
                if name.endswith("hidden")
                else f"gather it once per step, {name} = gather_weight({name})"
            )
            raise ValueError(f"{op}: {name} is a DTensor; {remedy}")


def check_head(op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, prefix: str = "") -> None:
    """Raise ValueError if the shapes or dtypes of a head do not match; `prefix` comes before the names of all three."""
    names = [f"{prefix}{name}" for name in ("hidden", "weight", "bias")]
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{op}: {names[0]} must be (T, H) and {names[1]} (V, H), got {shape(hidden)} and {shape(weight)}; "
            f"flatten batch and sequence first: {names[0]}.flatten(0, 1)"
        )
    if hidden.dtype != weight.dtype or not hidden.dtype.is_floating_point:
        raise ValueError(
            f"{op}: {names[0]} is {hidden.dtype} and {names[1]} {weight.dtype}; "
            "both must have the same floating-point dtype"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{op}: {names[2]} must be ({weight.shape[0]},), one entry per row of {names[1]}; got {shape(bias)}"
        )
    if bias is not None and bias.dtype != weight.dtype:
        raise ValueError(f"{op}: {names[2]} is {bias.dtype} and {names[1]} {weight.dtype}; cast one of them")


def check_rows(op: str, name: str, tensor: Tensor | None, rows: int, dtype: torch.dtype | None) -> None:
    """Raise ValueError unless `tensor` is None or has one entry per row and this dtype (None: floating point)."""
    if tensor is None:
        return
    dtype_fits = tensor.dtype == dtype if dtype is not None else tensor.dtype.is_floating_point
    if tensor.shape != (rows,) or not dtype_fits:
        raise ValueError(
            f"{op}: {name} must be ({rows},) {dtype or 'floating point'}, one entry per row of hidden; "
            f"got {shape(tensor)} {tensor.dtype}"
        )
    if tensor.requires_grad:
        raise ValueError(f"{op}: {name} requires a gradient, which is not supported; detach it")


def check_positions(op: str, loss_positions: Tensor | None) -> None:
    """Raise ValueError unless `loss_positions` is None or (L,) int64."""
    if loss_positions is not None and (loss_positions.dim() != 1 or loss_positions.dtype != torch.int64):
        raise ValueError(
            f"{op}: loss_positions must be (L,) torch.int64, got {shape(loss_positions)} {loss_positions.dtype}"
        )


def check_devices(op: str, hidden: Tensor, **others: Tensor | None) -> None:
    """Raise ValueError if one of the named tensors is not on the device of `hidden`."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, hidden on {hidden.device}; move one of them")


def check_chunk_tokens(op: str, chunk_tokens: int | None) -> None:
    """Raise ValueError unless `chunk_tokens` is None or at least 1."""
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"{op}: chunk_tokens={chunk_tokens}; it must be at least 1, or None for the default")


def check_logit_options(op: str, logit_scale: float, softcap: float | None, prefix: str = "") -> None:
    """Raise ValueError if the scale or the softcap is out of range."""
    # Not math.isfinite: under torch.compile(dynamic=True) a float is a symbol, which it does not accept.
    if not -math.inf < logit_scale < math.inf:
        raise ValueError(f"{op}: {prefix}logit_scale={logit_scale}; it must be a finite number, 1 for none")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"{op}: {prefix}softcap={softcap}; it must be a positive number, or None for none")


def shape(tensor: Tensor) -> str:
    """Return the shape as text."""
    return str(tuple(tensor.shape))
