"""Schema, fake kernel and autograd formula of the fused heads, which compute their gradients in the forward pass.

The first two arguments of such an op are hidden (T, H) and weight (V, H). Its first result is loss_sum, the only
differentiable one, and its last four are (grad_hidden, grad_weight, dz, rows). Both gradients are those of loss_sum.
They are saved for the backward pass, which multiplies them by the upstream gradient. A gradient that is not needed is
an empty tensor, and its GEMM is skipped.

With keep_dz the backward pass computes the weight's gradient. The op then returns its two factors instead: dz (V, K),
the gradient of the logits, and rows (K, H), the hidden states of the L supervised rows, padded with zeros to K rows. If
dz is smaller than the weight's gradient, this saves memory, and two passes over a float32 matrix.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from delib_fast.ops._library import LIBRARY

EmptyDz = Callable[[Tensor, int], Tensor]  # (weight, L) -> uninitialised dz (V, K) with K >= L


class HeadCall(Protocol):
    """What the arguments of all fused heads have in common."""

    @property
    def hidden(self) -> Tensor:
        """Return hidden (T, H)."""

    @property
    def weight(self) -> Tensor:
        """Return weight (V, H)."""

    @property
    def loss_positions(self) -> Tensor | None:
        """Return loss_positions (L,)."""

    @property
    def need_grad_hidden(self) -> bool:
        """Return whether the gradient of `hidden` is needed."""

    @property
    def need_grad_weight(self) -> bool:
        """Return whether the gradient of `weight` is needed."""

    @property
    def keep_dz(self) -> bool:
        """Return whether dz and the rows are returned instead of the weight's gradient."""

    def _replace(self, *, keep_dz: bool) -> Any: ...


AnyCall = TypeVar("AnyCall", bound=HeadCall)


class Gradients(NamedTuple):
    """The last four results of a fused head. A gradient that is not needed is an empty tensor."""

    grad_hidden: Tensor  # (T, H), dtype of the inputs
    grad_weight: Tensor  # (V, H) float32 (float64 for float64 inputs)
    dz: Tensor  # (V, K), dtype of the inputs, in the memory layout that the backend prefers
    rows: Tensor  # (K, H), dtype of the inputs


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of losses and of sums over rows: float64 for float64, otherwise float32."""
    return torch.promote_types(dtype, torch.float32)


def keep_dz_if_smaller(call: AnyCall) -> AnyCall:
    """Set keep_dz if dz in bfloat16 is no larger than the weight's gradient in float32.

    This is decided on the host, so loss_positions must be given. float16 never keeps dz: its range is too small for
    products of scaled rows.
    """
    if call.loss_positions is None or not call.need_grad_weight or call.hidden.dtype != torch.bfloat16:
        return call
    kept: AnyCall = call._replace(keep_dz=call.loss_positions.shape[0] <= 2 * call.hidden.shape[1])
    return kept


def empty_gradients(empty_dz: EmptyDz, call: HeadCall, num_rows: int) -> Gradients:
    """Allocate the gradients of a call with `num_rows` supervised or listed rows, uninitialised."""
    hidden, weight = call.hidden, call.weight
    dz = empty_dz(weight, num_rows) if call.keep_dz else weight.new_empty(0)
    sum_grad_weight = call.need_grad_weight and not call.keep_dz
    return Gradients(
        grad_hidden=hidden.new_empty(hidden.shape if call.need_grad_hidden else (0,)),
        grad_weight=weight.new_empty(weight.shape if sum_grad_weight else (0,), dtype=accumulator_dtype(hidden.dtype)),
        dz=dz,
        rows=hidden.new_empty(dz.shape[1] if call.keep_dz else 0, hidden.shape[1]),
    )


def define(
    op: str,
    backend: str,
    schema: str,
    as_call: Callable[..., HeadCall],
    empty_results: Callable[[Any, int], tuple[Tensor, ...]],
) -> None:
    """Define delib_fast::`op`_`backend` with its fake kernel and autograd formula; the backend registers its kernel.

    Args:
        op: the public name of the op, for error messages.
        backend: the name of the backend.
        schema: the arguments and results.
        as_call: makes the call from the arguments; those that the backend appends to the schema are dropped by it.
        empty_results: allocates the results of a call with this number of rows.
    """
    name = f"{op}_{backend}"

    def fake(*args: Any) -> tuple[Tensor, ...]:
        call = as_call(*args)
        return empty_results(call, 0 if call.loss_positions is None else call.loss_positions.shape[0])

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call = as_call(*inputs)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[-len(Gradients._fields) :])
        ctx.op = op
        ctx.need_grad_hidden = call.need_grad_hidden
        ctx.need_grad_weight = call.need_grad_weight
        ctx.keep_dz = call.keep_dz
        ctx.dtypes = (call.hidden.dtype, call.weight.dtype)
        ctx.num_inputs = len(inputs)

    LIBRARY.define(name + schema)
    torch.library.register_fake(f"delib_fast::{name}", fake, lib=LIBRARY)
    torch.library.register_autograd(f"delib_fast::{name}", _backward, setup_context=setup_context, lib=LIBRARY)


def _backward(ctx: Any, grad_loss: Tensor | None, *_unused: Any) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None] * ctx.num_inputs
    if torch.is_grad_enabled():  # create_graph=True: without an error the gradients would silently be constants
        raise RuntimeError(
            f"{ctx.op}: its gradients are computed in the forward pass and cannot be differentiated again; "
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
