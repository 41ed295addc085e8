"""The argument and result tuples that the backends of the fused divergence share.

T packed tokens, H and Ht hidden sizes of student and teacher, V vocabulary, L listed rows, C rows of a chunk. dz is the
gradient of the student's logits. If it is kept for the backward pass, it has K >= L columns.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from delib_fast.ops import _gradient_in_forward
from delib_fast.ops._gradient_in_forward import EmptyDz, accumulator_dtype, empty_gradients

OP = "linear_kl_divergence"
DIRECTIONS = ("forward", "reverse", "jsd")
# The arguments are the fields of DivergenceCall; a backend may append its own.
SCHEMA = (
    "(Tensor hidden, Tensor weight, Tensor teacher_hidden, Tensor teacher_weight, Tensor? targets, "
    "Tensor? loss_weights, Tensor? nll_weights, Tensor? loss_positions, int ignore_index, int chunk_tokens, "
    'bool need_grad_hidden, bool need_grad_weight, str direction="forward", float beta=0.5, float temperature=1.0, '
    "float softcap=0.0, float teacher_softcap=0.0, bool keep_dz=False{extra}) -> "
    "(Tensor loss_sum, Tensor divergence, Tensor nll, Tensor teacher_nll, "
    "Tensor grad_hidden, Tensor grad_weight, Tensor dz, Tensor rows)"
)


class DivergenceCall(NamedTuple):
    """The arguments of one call of a backend, in the order of SCHEMA."""

    hidden: Tensor  # (T, H), of the student, as is weight
    weight: Tensor  # (V, H)
    teacher_hidden: Tensor  # (T, Ht)
    teacher_weight: Tensor  # (V, Ht)
    targets: Tensor | None  # (T,) int64
    loss_weights: Tensor | None  # (T,) of the divergence; None for 1
    nll_weights: Tensor | None  # (T,) of the nll; None for 0
    loss_positions: Tensor | None  # (L,) int64
    ignore_index: int
    chunk_tokens: int  # 0 for the backend's default
    need_grad_hidden: bool
    need_grad_weight: bool
    direction: str = "forward"
    beta: float = 0.5
    temperature: float = 1.0
    softcap: float = 0.0  # 0 for none
    teacher_softcap: float = 0.0
    keep_dz: bool = False  # return dz instead of the weight's gradient, which the backward pass then computes

    @property
    def need_gradient(self) -> bool:
        """Whether the gradient of the logits is needed."""
        return self.need_grad_hidden or self.need_grad_weight


class DivergenceResults(NamedTuple):
    """The results of one call of a backend; the last four are those of _gradient_in_forward.Gradients."""

    loss_sum: Tensor  # () float32 (float64 for float64 inputs), as are the next three
    divergence: Tensor  # (T,)
    nll: Tensor  # (T,)
    teacher_nll: Tensor  # (T,)
    grad_hidden: Tensor  # (T, H), dtype of the inputs
    grad_weight: Tensor  # (V, H)
    dz: Tensor  # (V, K), dtype of the inputs, in the memory layout that the backend prefers
    rows: Tensor  # (K, H), dtype of the inputs


def live_rows(call: DivergenceCall) -> tuple[Tensor, Tensor]:
    """Return (T,) bool, the rows whose divergence or nll has a weight, and (T,) bool, the rows that have a target."""
    T, device = call.hidden.shape[0], call.hidden.device
    has_target = torch.zeros(T, dtype=torch.bool, device=device)
    if call.targets is not None:
        has_target = call.targets != call.ignore_index
    live = torch.ones_like(has_target) if call.loss_weights is None else call.loss_weights != 0
    return (live if call.nll_weights is None else live | ((call.nll_weights != 0) & has_target)), has_target


def as_call(*args: Any) -> DivergenceCall:
    """Return the call, without the arguments that a backend appends to the schema."""
    return DivergenceCall(*args[: len(DivergenceCall._fields)])


def empty_results(empty_dz: EmptyDz, call: DivergenceCall, num_rows: int) -> DivergenceResults:
    """Allocate the results of a call with `num_rows` live or listed rows, uninitialised."""
    hidden, wide = call.hidden, accumulator_dtype(call.hidden.dtype)
    return DivergenceResults(
        hidden.new_empty((), dtype=wide),
        hidden.new_empty(hidden.shape[0], dtype=wide),
        hidden.new_empty(hidden.shape[0], dtype=wide),
        hidden.new_empty(hidden.shape[0], dtype=wide),
        *empty_gradients(empty_dz, call, num_rows),
    )


def define(backend: str, empty_dz: EmptyDz, *, extra: str = "") -> None:
    """Define the op of a backend; `extra` are the arguments that it appends to the schema."""
    _gradient_in_forward.define(
        OP, backend, SCHEMA.format(extra=extra), as_call, functools.partial(empty_results, empty_dz)
    )
