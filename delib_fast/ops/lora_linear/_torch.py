"""The torch backend: each product of the layer is written, or added, to its final tensor.

    forward    h = u Aᵀ          y = x Wᵀ + bias      y += s·h Bᵀ
    backward   g = s·dy B        dx = dy W            dx += g A        dA = gᵀ u        dB = s·dyᵀ h

with u the input of the adapter, x unless dropout was applied to it. The chain of peft writes and reads again a tensor
(N, O) for the update, one for its scaled copy, and one (N, I) for the adapter's share of dx: here the products add to y
and dx instead. Only h (N, r) is kept in addition to the inputs. N is the number of rows.

torch's GEMMs do all of the work, on any device, and nothing elementwise is left for a kernel of our own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from delib_fast.ops._library import LIBRARY

_ARGUMENTS = "Tensor x, Tensor? u, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, float scaling"


def why_not(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Return the reason that this backend cannot run these tensors, or None."""
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return "it computes no gradient of weight and bias, which must be frozen (requires_grad=False)"
    return None


def _forward(
    x: Tensor, u: Tensor | None, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    h = (x if u is None else u) @ lora_a.t()
    y = x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())
    return y.addmm_(h, lora_b.t(), alpha=scaling), h


def _fake_forward(
    x: Tensor, _u: Tensor | None, weight: Tensor, _bias: Tensor | None, lora_a: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], lora_a.shape[0])


def _backward(
    dy: Tensor,
    h: Tensor,
    x: Tensor,
    u: Tensor | None,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (dx, du, dA, dB), each empty unless `wants` has it."""
    wants_x, wants_u, wants_a, wants_b = wants
    dx, du, da, db = (dy.new_empty(0) for _ in wants)
    if wants_x or wants_u or wants_a:
        g = (dy @ lora_b).mul_(scaling)
        if wants_a:
            da = g.t() @ (x if u is None else u)
        if wants_u:
            du = g @ lora_a
        if wants_x:
            dx = dy @ weight
            if u is None:
                dx.addmm_(g, lora_a)
    if wants_b:
        db = (dy.t() @ h).mul_(scaling)
    return dx, du, da, db


def _fake_backward(
    dy: Tensor,
    h: Tensor,
    x: Tensor,
    u: Tensor | None,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shapes = (x.shape, x.shape, lora_a.shape, lora_b.shape)
    dx, du, da, db = (dy.new_empty(shape if want else (0,)) for shape, want in zip(shapes, wants, strict=True))
    return dx, du, da, db


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, u, weight, _, lora_a, lora_b, ctx.scaling = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], x, u, weight, lora_a, lora_b)


def _autograd(ctx: Any, dy: Tensor, _dh: Tensor | None) -> tuple[Tensor | None, ...]:
    wants_x, wants_u, _, _, wants_a, wants_b, _ = ctx.needs_input_grad
    wants = [wants_x, wants_u, wants_a, wants_b]
    grads = torch.ops.delib_fast.lora_linear_backward(dy.contiguous(), *ctx.saved_tensors, ctx.scaling, wants)
    dx, du, da, db = (grad if want else None for grad, want in zip(grads, wants, strict=True))
    return dx, du, None, None, da, db, None


LIBRARY.define(f"lora_linear({_ARGUMENTS}) -> (Tensor y, Tensor h)")
LIBRARY.define(
    "lora_linear_backward(Tensor dy, Tensor h, Tensor x, Tensor? u, Tensor weight, Tensor lora_a, Tensor lora_b, "
    "float scaling, bool[] wants) -> (Tensor dx, Tensor du, Tensor da, Tensor db)"
)
for _name, _kernel, _fake in (
    ("lora_linear", _forward, _fake_forward),
    ("lora_linear_backward", _backward, _fake_backward),
):
    torch.library.impl(f"delib_fast::{_name}", "CompositeExplicitAutograd", _kernel, lib=LIBRARY)
    torch.library.register_fake(f"delib_fast::{_name}", _fake, lib=LIBRARY)
torch.library.register_autograd("delib_fast::lora_linear", _autograd, setup_context=_setup_context, lib=LIBRARY)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    *,
    bias: Tensor | None = None,
    adapter_input: Tensor | None = None,
) -> Tensor:
    """Run the op; the arguments and the result are those of `ops.lora_linear`."""
    rows = None if adapter_input is None else adapter_input.reshape(-1, x.shape[-1])
    flat = x.reshape(-1, x.shape[-1])
    y: Tensor = torch.ops.delib_fast.lora_linear(flat, rows, weight, bias, lora_a, lora_b, scaling)[0]
    return y.view(*x.shape[:-1], weight.shape[0])
