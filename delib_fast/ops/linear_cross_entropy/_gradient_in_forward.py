"""What every backend that computes its gradients in the forward pass registers: schema, fake, autograd.

The op returns (loss_sum, nll, correct, grad_hidden, grad_weight, dz, rows); the two gradients are those of loss_sum,
saved for the backward pass, which multiplies them by the upstream gradient. A gradient that nobody wants is an empty
tensor, and its GEMM is not done.

With keep_dz the weight's gradient is left to the backward pass: in its place come the gradient of the logits, dz
(V, K), and the hidden states of the supervised rows, (K, H), filled up with zeros to K. Where dz is the smaller of
the two this saves memory, and two passes over a float32 dW.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from delib_fast.ops._library import LIBRARY

ARGUMENTS = (
    "(Tensor hidden, Tensor weight, Tensor targets, Tensor? loss_weights, Tensor? loss_positions, "
    "int ignore_index, int chunk_tokens, bool need_grad_hidden, bool need_grad_weight, "
    "float softcap=0.0, float z_loss=0.0, float label_smoothing=0.0, bool keep_dz=False{more}) -> "
    "(Tensor loss_sum, Tensor nll, Tensor correct, Tensor grad_hidden, Tensor grad_weight, Tensor dz, Tensor rows)"
)


class Terms(NamedTuple):
    """What is done to the logits, and added to the loss; each is off at 0."""

    softcap: float = 0.0
    z_loss: float = 0.0
    label_smoothing: float = 0.0

    @property
    def loss_is_nll(self) -> bool:
        return self.z_loss == 0 and self.label_smoothing == 0


class Results(NamedTuple):
    """T packed tokens, H hidden size, V vocabulary, K supervised tokens and what fills them up; see above."""

    loss_sum: Tensor  # ()     float32 (float64 for float64), as nll and grad_weight
    nll: Tensor  # (T,)
    correct: Tensor  # (T,)   bool
    grad_hidden: Tensor  # (T, H) of the inputs' dtype
    grad_weight: Tensor  # (V, H)
    dz: Tensor  # (V, K) of the inputs' dtype, in whichever layout the backend likes
    rows: Tensor  # (K, H) of the inputs' dtype


def keeps_dz(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss_weights: Tensor | None,
    loss_positions: Tensor | None,
    ignore_index: int,
    chunk_tokens: int,
    need_grad_hidden: bool,
    need_grad_weight: bool,
    *_terms: float,
) -> bool:
    """Whether dz in bfloat16 is no larger than dW in float32, as the host can tell. (float16 has not the range for
    products of scaled rows.)"""
    if loss_positions is None or not need_grad_weight or hidden.dtype != torch.bfloat16:
        return False
    return loss_positions.shape[0] <= 2 * hidden.shape[1]


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: the loss, and the weight gradient until the backward pass."""
    return torch.promote_types(dtype, torch.float32)


EmptyDz = Callable[[Tensor, int], Tensor]  # (weight, L) -> (V, K) with K >= L


def empty_results(
    empty_dz: EmptyDz,
    hidden: Tensor,
    weight: Tensor,
    num_rows: int,
    need_grad_hidden: bool,
    need_grad_weight: bool,
    keep_dz: bool,
) -> Results:
    wide = accumulator_dtype(hidden.dtype)
    dz = empty_dz(weight, num_rows) if keep_dz else weight.new_empty(0)
    return Results(
        loss_sum=hidden.new_empty((), dtype=wide),
        nll=hidden.new_empty(hidden.shape[0], dtype=wide),
        correct=hidden.new_empty(hidden.shape[0], dtype=torch.bool),
        grad_hidden=hidden.new_empty(hidden.shape if need_grad_hidden else (0,)),
        grad_weight=weight.new_empty(weight.shape if need_grad_weight and not keep_dz else (0,), dtype=wide),
        dz=dz,
        rows=hidden.new_empty(dz.shape[1] if keep_dz else 0, hidden.shape[1]),
    )


def _fake(empty_dz: EmptyDz) -> Callable[..., Results]:
    def fake(
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        loss_weights: Tensor | None,
        loss_positions: Tensor | None,
        ignore_index: int,
        chunk_tokens: int,
        need_grad_hidden: bool,
        need_grad_weight: bool,
        softcap: float = 0.0,
        z_loss: float = 0.0,
        label_smoothing: float = 0.0,
        keep_dz: bool = False,
        *_more: Any,
    ) -> Results:
        num_rows = 0 if loss_positions is None else loss_positions.shape[0]
        return empty_results(empty_dz, hidden, weight, num_rows, need_grad_hidden, need_grad_weight, keep_dz)

    return fake


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight = inputs[0], inputs[1]
    results = Results(*output)
    ctx.mark_non_differentiable(*results[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*results[3:])
    ctx.needs = (inputs[7], inputs[8])
    ctx.keeps_dz = inputs[12]
    ctx.dtypes = (hidden.dtype, weight.dtype)
    ctx.num_inputs = len(inputs)


LIBRARY.define("scale_gradient(Tensor gradient, Tensor scale, ScalarType dtype) -> Tensor")


def _scale_gradient(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * scale in one pass, multiplied in the wider dtype and rounded once, as a new tensor; the compiled
    module has a faster one for the CPU.

    The scale gets dimensions because a tensor without any would be rounded to a bfloat16 gradient's dtype first.
    """
    scale = scale.to(accumulator_dtype(gradient.dtype)).reshape([1] * gradient.dim())
    return torch.mul(gradient, scale, out=torch.empty_like(gradient, dtype=dtype))


torch.library.impl("delib_fast::scale_gradient", "CompositeExplicitAutograd", _scale_gradient, lib=LIBRARY)
torch.library.register_fake(
    "delib_fast::scale_gradient",
    lambda gradient, scale, dtype: torch.empty_like(gradient, dtype=dtype),
    lib=LIBRARY,
)


LIBRARY.define("weight_gradient(Tensor dz, Tensor rows, Tensor scale) -> Tensor")


def _weight_gradient(dz: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
    """(V, H) = scale * dz (V, K) · rows (K, H). Here the scale goes into the rows, which are rounded once more; the
    compiled module's, for the CPU, scales the float32 sums."""
    return dz @ _scale_gradient(rows, scale, rows.dtype)


torch.library.impl("delib_fast::weight_gradient", "CompositeExplicitAutograd", _weight_gradient, lib=LIBRARY)
torch.library.register_fake(
    "delib_fast::weight_gradient",
    lambda dz, rows, scale: dz.new_empty(dz.shape[0], rows.shape[1]),
    lib=LIBRARY,
)


# A private name of torch's, in 2.11 as in 2.13; without it every gradient is a new tensor.
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def _scaled(saved: Tensor, grad_loss: Tensor, dtype: torch.dtype) -> Tensor:
    """saved * grad_loss in `dtype`: in place where the graph is not kept (retain_graph), so that a float32 weight's
    gradient is not held twice. Not while it is traced, nor for narrower dtypes, which round once in a wider one."""
    in_place = saved.dtype == dtype == accumulator_dtype(dtype) and type(saved) is Tensor
    if in_place and not torch.compiler.is_compiling() and not _keeps_graph():
        return saved.mul_(grad_loss)
    return torch.ops.delib_fast.scale_gradient(saved, grad_loss, dtype)


def _backward(ctx: Any, grad_loss: Tensor | None, *_unused: Any) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None] * ctx.num_inputs
    if torch.is_grad_enabled():  # create_graph=True: the gradients would pass for constants, in silence
        raise RuntimeError(
            "linear_cross_entropy: its gradients, computed in the forward pass, cannot be differentiated again; "
            "without create_graph=True, or with backend='reference'"
        )
    if grad_loss is not None:
        grad_hidden, grad_weight, dz, rows = ctx.saved_tensors
        if ctx.needs[0]:
            grads[0] = _scaled(grad_hidden, grad_loss, ctx.dtypes[0])
        if ctx.needs[1] and ctx.keeps_dz:
            grads[1] = torch.ops.delib_fast.weight_gradient(dz, rows, grad_loss)
        elif ctx.needs[1]:
            grads[1] = _scaled(grad_weight, grad_loss, ctx.dtypes[1])
    return tuple(grads)


def define(name: str, empty_dz: EmptyDz, *, more: str = "") -> None:
    """Define delib_fast::name with its fake and its autograd; kernels are registered by the backend."""
    LIBRARY.define(name + ARGUMENTS.format(more=more))
    torch.library.register_fake(f"delib_fast::{name}", _fake(empty_dz), lib=LIBRARY)
    torch.library.register_autograd(f"delib_fast::{name}", _backward, setup_context=_setup_context, lib=LIBRARY)
