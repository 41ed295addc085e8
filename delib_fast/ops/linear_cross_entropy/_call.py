"""The argument and result tuples that the backends of the fused loss share.

T packed tokens, H hidden size, V vocabulary, L listed rows, C rows of a chunk. dz is the gradient of the logits. If it
is kept for the backward pass, it has K >= L columns.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from delib_fast.ops import _gradient_in_forward
from delib_fast.ops._gradient_in_forward import EmptyDz, accumulator_dtype, empty_gradients

OP = "linear_cross_entropy"
# The arguments are the fields of LossCall; a backend may append its own.
SCHEMA = (
    "(Tensor hidden, Tensor weight, Tensor targets, Tensor? loss_weights, Tensor? loss_positions, "
    "int ignore_index, int chunk_tokens, bool need_grad_hidden, bool need_grad_weight, "
    "float softcap=0.0, float z_loss=0.0, float label_smoothing=0.0, bool keep_dz=False{extra}) -> "
    "(Tensor loss_sum, Tensor nll, Tensor correct, Tensor grad_hidden, Tensor grad_weight, Tensor dz, Tensor rows)"
)


class LossCall(NamedTuple):
    """The arguments of one call of a backend, in the order of SCHEMA."""

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
    """The results of one call of a backend; the last four are those of _gradient_in_forward.Gradients."""

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


def as_call(*args: Any) -> LossCall:
    """Return the call, without the arguments that a backend appends to the schema."""
    return LossCall(*args[: len(LossCall._fields)])


def empty_results(empty_dz: EmptyDz, call: LossCall, num_rows: int) -> LossResults:
    """Allocate the results of a call with `num_rows` supervised or listed rows, uninitialised."""
    hidden, wide = call.hidden, accumulator_dtype(call.hidden.dtype)
    return LossResults(
        hidden.new_empty((), dtype=wide),
        hidden.new_empty(hidden.shape[0], dtype=wide),
        hidden.new_empty(hidden.shape[0], dtype=torch.bool),
        *empty_gradients(empty_dz, call, num_rows),
    )


def define(backend: str, empty_dz: EmptyDz, *, extra: str = "") -> None:
    """Define the op of a backend; `extra` are the arguments that it appends to the schema."""
    _gradient_in_forward.define(
        OP, backend, SCHEMA.format(extra=extra), as_call, functools.partial(empty_results, empty_dz)
    )
