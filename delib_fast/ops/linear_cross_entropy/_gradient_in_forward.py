"""What every backend that computes its gradients in the forward pass registers: schema, fake, autograd.

The op returns (loss_sum, nll, correct, grad_hidden, grad_weight); the two gradients are those of loss_sum, saved
for the backward pass, which multiplies them by the upstream gradient. A gradient that nobody wants is an empty
tensor, and its GEMM is not done.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from delib_fast.ops._library import LIBRARY

ARGUMENTS = (
    "(Tensor hidden, Tensor weight, Tensor targets, Tensor? loss_weights, Tensor? loss_positions, "
    "int ignore_index, int chunk_tokens, bool need_grad_hidden, bool need_grad_weight, "
    "float softcap=0.0, float z_loss=0.0, float label_smoothing=0.0{more}) -> "
    "(Tensor loss_sum, Tensor nll, Tensor correct, Tensor grad_hidden, Tensor grad_weight)"
)
Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class Terms(NamedTuple):
    """What is done to the logits, and added to the loss; each is off at 0."""

    softcap: float = 0.0
    z_loss: float = 0.0
    label_smoothing: float = 0.0

    @property
    def loss_is_nll(self) -> bool:
        return self.z_loss == 0 and self.label_smoothing == 0


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: the loss, and the weight gradient until the backward pass."""
    return torch.promote_types(dtype, torch.float32)


def empty_results(hidden: Tensor, weight: Tensor, need_grad_hidden: bool, need_grad_weight: bool) -> Results:
    wide = accumulator_dtype(hidden.dtype)
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty(hidden.shape[0], dtype=wide),
        hidden.new_empty(hidden.shape[0], dtype=torch.bool),
        hidden.new_empty(hidden.shape if need_grad_hidden else (0,)),
        weight.new_empty(weight.shape if need_grad_weight else (0,), dtype=wide),
    )


def _fake(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss_weights: Tensor | None,
    loss_positions: Tensor | None,
    ignore_index: int,
    chunk_tokens: int,
    need_grad_hidden: bool,
    need_grad_weight: bool,
    *_more: Any,
) -> Results:
    return empty_results(hidden, weight, need_grad_hidden, need_grad_weight)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    hidden, weight = inputs[0], inputs[1]
    _, nll, correct, grad_hidden, grad_weight = output
    ctx.mark_non_differentiable(nll, correct, grad_hidden, grad_weight)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad_hidden, grad_weight)
    ctx.needs = (inputs[7], inputs[8])
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
        for i, (needed, saved) in enumerate(zip(ctx.needs, ctx.saved_tensors, strict=True)):
            if needed:
                grads[i] = _scaled(saved, grad_loss, ctx.dtypes[i])
    return tuple(grads)


def define(name: str, *, more: str = "") -> None:
    """Define delib_fast::name with its fake and its autograd; kernels are registered by the backend."""
    LIBRARY.define(name + ARGUMENTS.format(more=more))
    torch.library.register_fake(f"delib_fast::{name}", _fake, lib=LIBRARY)
    torch.library.register_autograd(f"delib_fast::{name}", _backward, setup_context=_setup_context, lib=LIBRARY)
