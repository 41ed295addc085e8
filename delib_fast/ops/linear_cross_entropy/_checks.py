"""The checks of linear_cross_entropy's arguments. They never read device memory."""

import math

import torch
from torch import Tensor

from delib_fast.ops.linear_cross_entropy._sharded import is_sharded

OP = "linear_cross_entropy"


def check_not_sharded(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError if an argument is a DTensor."""
    if is_sharded(hidden):
        raise ValueError(f"{OP}: hidden is a DTensor; pass the rows of this rank, hidden.to_local()")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if is_sharded(tensor):
            raise ValueError(f"{OP}: {name} is a DTensor; gather it once per step, {name} = gather_weight({name})")


def check_tensors(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    loss_weights: Tensor | None,
    loss_positions: Tensor | None,
) -> None:
    """Raise ValueError if shapes, dtypes or devices do not match."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{OP}: hidden must be (T, H) and weight (V, H), got {_shape(hidden)} and {_shape(weight)}; "
            "flatten batch and sequence first: hidden.flatten(0, 1)"
        )
    if hidden.dtype != weight.dtype or not hidden.dtype.is_floating_point:
        raise ValueError(
            f"{OP}: hidden is {hidden.dtype} and weight {weight.dtype}; both must have the same floating-point dtype"
        )
    rows = hidden.shape[:1]
    _check_rows("targets", targets, rows, torch.int64)
    if loss_weights is not None:
        _check_rows("loss_weights", loss_weights, rows, None)
        if loss_weights.requires_grad:
            raise ValueError(f"{OP}: loss_weights requires a gradient, which is not supported; detach it")
    if loss_positions is not None and (loss_positions.dim() != 1 or loss_positions.dtype != torch.int64):
        raise ValueError(
            f"{OP}: loss_positions must be (L,) torch.int64, got {_shape(loss_positions)} {loss_positions.dtype}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{OP}: bias must be ({weight.shape[0]},), one entry per row of weight; got {_shape(bias)}")
    if bias is not None and bias.dtype != weight.dtype:
        raise ValueError(f"{OP}: bias is {bias.dtype} and weight {weight.dtype}; cast one of them")
    for name, tensor in (
        ("weight", weight),
        ("bias", bias),
        ("targets", targets),
        ("loss_weights", loss_weights),
        ("loss_positions", loss_positions),
    ):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{OP}: {name} is on {tensor.device}, hidden on {hidden.device}; move one of them")


def check_options(
    logit_scale: float, softcap: float | None, z_loss: float, label_smoothing: float, chunk_tokens: int | None
) -> None:
    """Raise ValueError if an option is out of range."""
    # Not math.isfinite: under torch.compile(dynamic=True) a float is a symbol, which it does not accept.
    if not -math.inf < logit_scale < math.inf:
        raise ValueError(f"{OP}: logit_scale={logit_scale}; it must be a finite number, 1 for none")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"{OP}: softcap={softcap}; it must be a positive number, or None for none")
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"{OP}: z_loss={z_loss}; it must be a finite number of at least 0, 0 for none")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{OP}: label_smoothing={label_smoothing}; it must be in [0, 1], 0 for none")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"{OP}: chunk_tokens={chunk_tokens}; it must be at least 1, or None for the default")


def _check_rows(name: str, tensor: Tensor, rows: torch.Size, dtype: torch.dtype | None) -> None:
    dtype_fits = tensor.dtype == dtype if dtype is not None else tensor.dtype.is_floating_point
    if tensor.shape != rows or not dtype_fits:
        raise ValueError(
            f"{OP}: {name} must be ({rows[0]},) {dtype or 'floating point'}, one entry per row of hidden; "
            f"got {_shape(tensor)} {tensor.dtype}"
        )


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
