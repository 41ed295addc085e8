"""The checks of linear_cross_entropy's arguments. They never read device memory."""

import math

import torch
from torch import Tensor

from delib_fast.ops._checks import (
    check_chunk_tokens,
    check_devices,
    check_head,
    check_logit_options,
    check_positions,
    check_rows,
)
from delib_fast.ops.linear_cross_entropy._call import OP


def check_tensors(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    loss_weights: Tensor | None,
    loss_positions: Tensor | None,
) -> None:
    """Raise ValueError if shapes, dtypes or devices do not match."""
    check_head(OP, hidden, weight, bias)
    check_rows(OP, "targets", targets, hidden.shape[0], torch.int64)
    check_rows(OP, "loss_weights", loss_weights, hidden.shape[0], None)
    check_positions(OP, loss_positions)
    check_devices(
        OP,
        hidden,
        weight=weight,
        bias=bias,
        targets=targets,
        loss_weights=loss_weights,
        loss_positions=loss_positions,
    )


def check_options(
    logit_scale: float, softcap: float | None, z_loss: float, label_smoothing: float, chunk_tokens: int | None
) -> None:
    """Raise ValueError if an option is out of range."""
    check_logit_options(OP, logit_scale, softcap)
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"{OP}: z_loss={z_loss}; it must be a finite number of at least 0, 0 for none")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{OP}: label_smoothing={label_smoothing}; it must be in [0, 1], 0 for none")
    check_chunk_tokens(OP, chunk_tokens)
