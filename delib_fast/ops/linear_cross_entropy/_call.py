"""The argument and result tuples that the backends of the fused loss share.

T packed tokens, H hidden size, V vocabulary, L listed rows, C rows of a chunk. dz is the gradient of the logits. If it
is kept for the backward pass, it has K >= L columns.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class LossCall(NamedTuple):
    """The arguments of one call of a backend, in the order of the op's schema (see _gradient_in_forward.py)."""

    hidden: Tensor  # (T, H)
    weight: Tensor  # (V, H)
    targets: Tensor  # (T,) int64
    loss_weights: Tensor | None  # (T,)
    loss_positions: Tensor | None  # (L,) int64
    ignore_index: int
    chunk_tokens: int  # 0 for the backend's default
    need_grad_hidden: bool
    need_grad_weight: bool
    softcap: float = 0.0  # 0 for none, as are the next two
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    keep_dz: bool = False  # return dz instead of the weight's gradient, which the backward pass then computes

    @property
    def need_gradient(self) -> bool:
        """Whether the gradient of the logits is needed."""
        return self.need_grad_hidden or self.need_grad_weight

    @property
    def loss_is_nll(self) -> bool:
        """Whether the loss has no further terms."""
        return self.z_loss == 0 and self.label_smoothing == 0


class LossResults(NamedTuple):
    """The results of one call of a backend. A gradient that is not needed is an empty tensor."""

    loss_sum: Tensor  # () float32 (float64 for float64 inputs), as are nll and grad_weight
    nll: Tensor  # (T,)
    correct: Tensor  # (T,) bool
    grad_hidden: Tensor  # (T, H), dtype of the inputs
    grad_weight: Tensor  # (V, H)
    dz: Tensor  # (V, K), dtype of the inputs, in the memory layout that the backend prefers
    rows: Tensor  # (K, H), dtype of the inputs


class LogitsChunk(NamedTuple):
    """The arguments of a kernel that computes the losses of some rows and overwrites their logits with the gradient."""

    logits: Tensor  # (C, V), rows stride(0) >= V entries apart, with zeros in between; overwritten if need_gradient
    positions: Tensor  # (C,) int64: the row of hidden that each row of logits belongs to
    targets: Tensor  # (T,) int64
    row_weights: Tensor | None  # (T,) float32
    nll: Tensor  # (T,) float32; written at `positions`, as are the next two
    loss: Tensor | None  # (T,) float32: nll plus z-loss and label smoothing; None if both are 0
    correct: Tensor  # (T,) bool
    ignore_index: int
    need_gradient: bool
    softcap: float
    z_loss: float
    label_smoothing: float


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of losses and of sums over rows: float64 for float64, otherwise float32."""
    return torch.promote_types(dtype, torch.float32)


def keep_dz_if_smaller(call: LossCall) -> LossCall:
    """Set keep_dz if dz in bfloat16 is no larger than the weight's gradient in float32.

    This is decided on the host, so loss_positions must be given. float16 never keeps dz: its range is too small for
    products of scaled rows.
    """
    if call.loss_positions is None or not call.need_grad_weight or call.hidden.dtype != torch.bfloat16:
        return call
    return call._replace(keep_dz=call.loss_positions.shape[0] <= 2 * call.hidden.shape[1])
