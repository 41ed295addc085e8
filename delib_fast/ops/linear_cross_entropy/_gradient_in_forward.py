"""Schema, fake kernel and autograd formula of the backends, which compute their gradients in the forward pass.

Such an op returns (loss_sum, nll, correct, grad_hidden, grad_weight, dz, rows). Both gradients are those of loss_sum.
They are saved for the backward pass, which multiplies them by the upstream gradient. A gradient that is not needed is
an empty tensor, and its GEMM is skipped.

With keep_dz the backward pass computes the weight's gradient. The op then returns its two factors instead: dz (V, K),
the gradient of the logits, and rows (K, H), the hidden states of the supervised rows, padded with zeros to K rows. If
dz is smaller than the weight's gradient, this saves memory, and two passes over a float32 matrix.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from delib_fast.ops._library import LIBRARY
from delib_fast.ops.linear_cross_entropy._call import LossCall, LossResults, accumulator_dtype

# The arguments are the fields of LossCall; a backend may append its own.
SCHEMA = (
    "(Tensor hidden, Tensor weight, Tensor targets, Tensor? loss_weights, Tensor? loss_positions, "
    "int ignore_index, int chunk_tokens, bool need_grad_hidden, bool need_grad_weight, "
    "float softcap=0.0, float z_loss=0.0, float label_smoothing=0.0, bool keep_dz=False{extra}) -> "
    "(Tensor loss_sum, Tensor nll, Tensor correct, Tensor grad_hidden, Tensor grad_weight, Tensor dz, Tensor rows)"
)

EmptyDz = Callable[[Tensor, int], Tensor]  # (weight, L) -> uninitialised dz (V, K) with K >= L


def empty_results(empty_dz: EmptyDz, call: LossCall, num_rows: int) -> LossResults:
    """Allocate the results of a call with `num_rows` supervised or listed rows, uninitialised."""
    hidden, weight = call.hidden, call.weight
    wide = accumulator_dtype(hidden.dtype)
    dz = empty_dz(weight, num_rows) if call.keep_dz else weight.new_empty(0)
    sum_grad_weight = call.need_grad_weight and not call.keep_dz
    return LossResults(
        loss_sum=hidden.new_empty((), dtype=wide),
        nll=hidden.new_empty(hidden.shape[0], dtype=wide),
        correct=hidden.new_empty(hidden.shape[0], dtype=torch.bool),
        grad_hidden=hidden.new_empty(hidden.shape if call.need_grad_hidden else (0,)),
        grad_weight=weight.new_empty(weight.shape if sum_grad_weight else (0,), dtype=wide),
        dz=dz,
        rows=hidden.new_empty(dz.shape[1] if call.keep_dz else 0, hidden.shape[1]),
    )


def define(name: str, empty_dz: EmptyDz, *, extra: str = "") -> None:
    """Define the op delib_fast::`name` with its fake kernel and autograd formula; the backend registers its kernel."""

    def fake(*args: Any) -> LossResults:
        call = _as_call(args)
        return empty_results(empty_dz, call, 0 if call.loss_positions is None else call.loss_positions.shape[0])

    LIBRARY.define(name + SCHEMA.format(extra=extra))
    torch.library.register_fake(f"delib_fast::{name}", fake, lib=LIBRARY)
    torch.library.register_autograd(f"delib_fast::{name}", _backward, setup_context=_setup_context, lib=LIBRARY)


def _as_call(args: tuple[Any, ...]) -> LossCall:
    """Drop the arguments that a backend appends to the schema."""
    return LossCall(*args[: len(LossCall._fields)])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    call, results = _as_call(inputs), LossResults(*output)
    ctx.mark_non_differentiable(*results[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(results.grad_hidden, results.grad_weight, results.dz, results.rows)
    ctx.need_grad_hidden = call.need_grad_hidden
    ctx.need_grad_weight = call.need_grad_weight
    ctx.keep_dz = call.keep_dz
    ctx.dtypes = (call.hidden.dtype, call.weight.dtype)
    ctx.num_inputs = len(inputs)


def _backward(ctx: Any, grad_loss: Tensor | None, *_unused: Any) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None] * ctx.num_inputs
    if torch.is_grad_enabled():  # create_graph=True: without an error the gradients would silently be constants
        raise RuntimeError(
            "linear_cross_entropy: its gradients are computed in the forward pass and cannot be differentiated again; "
            "remove create_graph=True, or use backend='reference'"
        )
    if grad_loss is not None:
        grad_hidden, grad_weight, dz, rows = ctx.saved_tensors
        if ctx.need_grad_hidden:
            grads[0] = _scaled(grad_hidden, grad_loss, ctx.dtypes[0])
        if ctx.need_grad_weight and ctx.keep_dz:
            grads[1] = torch.ops.delib_fast.weight_gradient(dz, rows, grad_loss)
        elif ctx.need_grad_weight:
            grads[1] = _scaled(grad_weight, grad_loss, ctx.dtypes[1])
    return tuple(grads)


# A private function of torch (present in 2.11 and 2.13). Without it every gradient is a new tensor.
_keeps_graph: Callable[[], bool] = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def _scaled(saved: Tensor, grad_loss: Tensor, dtype: torch.dtype) -> Tensor:
    """Return saved * grad_loss as `dtype`.

    The product is computed in place if the graph is not kept (retain_graph), so that the gradient of a float32 weight
    is not held twice. It is a new tensor under torch.compile, and for 16-bit dtypes, which are rounded once from a
    wider one.
    """
    in_place = saved.dtype == dtype == accumulator_dtype(dtype) and type(saved) is Tensor
    if in_place and not torch.compiler.is_compiling() and not _keeps_graph():
        return saved.mul_(grad_loss)
    scaled: Tensor = torch.ops.delib_fast.scale_gradient(saved, grad_loss, dtype)
    return scaled


def _scale_gradient(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return gradient * scale as a new tensor, multiplied in the wider dtype and rounded once, in one pass.

    The scale is given dimensions because a 0-dimensional tensor would be rounded to the dtype of the gradient first.
    The compiled module has a faster kernel for the CPU.
    """
    scale = scale.to(accumulator_dtype(gradient.dtype)).reshape([1] * gradient.dim())
    return torch.mul(gradient, scale, out=torch.empty_like(gradient, dtype=dtype))


def _weight_gradient(dz: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
    """Return (V, H) = scale * dz (V, K) · rows (K, H).

    The rows are scaled, and rounded once more, before the product. The kernel of the compiled module, for the CPU,
    scales the float32 sums instead.
    """
    return dz @ _scale_gradient(rows, scale, rows.dtype)


LIBRARY.define("scale_gradient(Tensor gradient, Tensor scale, ScalarType dtype) -> Tensor")
torch.library.impl("delib_fast::scale_gradient", "CompositeExplicitAutograd", _scale_gradient, lib=LIBRARY)
torch.library.register_fake(
    "delib_fast::scale_gradient",
    lambda gradient, scale, dtype: torch.empty_like(gradient, dtype=dtype),
    lib=LIBRARY,
)

LIBRARY.define("weight_gradient(Tensor dz, Tensor rows, Tensor scale) -> Tensor")
torch.library.impl("delib_fast::weight_gradient", "CompositeExplicitAutograd", _weight_gradient, lib=LIBRARY)
torch.library.register_fake(
    "delib_fast::weight_gradient",
    lambda dz, rows, scale: dz.new_empty(dz.shape[0], rows.shape[1]),
    lib=LIBRARY,
)
