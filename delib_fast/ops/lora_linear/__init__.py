"""A frozen linear layer with a LoRA adapter, as one differentiable op."""

from __future__ import annotations

import torch
from torch import Tensor

from delib_fast.ops._dispatch import Backend, choose
from delib_fast.ops.lora_linear import _torch, reference

_OP = "lora_linear"


def _always(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    return None


BACKENDS = (
    Backend("torch", _torch.lora_linear, _torch.why_not),
    Backend("reference", reference.lora_linear, _always),
)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    *,
    bias: Tensor | None = None,
    adapter_input: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """A frozen linear layer plus a low-rank update: y = x Wᵀ + bias + scaling · (x Aᵀ) Bᵀ.

    Args:
        x: (…, I) floating point.
        weight: (O, I), of the dtype of x. The "torch" backend needs it frozen; it computes no gradient of it.
        lora_a: (r, I).
        lora_b: (O, r).
        scaling: the factor of the update, α/r in LoRA.
        bias: (O,) of the frozen layer, or None.
        adapter_input: (…, I), what the adapter receives instead of x: dropout(x), if the adapter has dropout.
        backend: "auto", "torch" or "reference".

    Under torch.autocast all tensors are cast to its dtype, as torch.nn.functional.linear does.

    Returns:
        (…, O), of the dtype of x.

    Raises:
        ValueError: a shape, dtype or device does not match, or the backend does not exist.
        BackendUnavailable: the requested backend cannot run these inputs.

    Numerics: "torch" adds the update to y, and the adapter's share to the gradient of x, inside of the GEMMs, which
        accumulate in float32 and round once. The chain of single products rounds the update, the scaled update and
        their sum. Deterministic if the GEMMs are.
    Cost: for N rows, 2·N·I·O + 2·N·r·(I + O) FLOPs forward, twice that backward less the 2·N·I·O of a weight gradient.
        x is kept for the backward pass, and N·r more elements.

    Source: Hu et al., LoRA, arXiv 2106.09685.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, lora_a, lora_b = x.to(dtype), weight.to(dtype), lora_a.to(dtype), lora_b.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        adapter_input = None if adapter_input is None else adapter_input.to(dtype)
    _check(x, weight, lora_a, lora_b, bias, adapter_input)
    run = choose(_OP, BACKENDS, backend, x, weight, bias).run
    y: Tensor = run(x, weight, lora_a, lora_b, float(scaling), bias=bias, adapter_input=adapter_input)
    return y


def _check(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None, adapter_input: Tensor | None
) -> None:
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"{_OP}: x must be (…, I) and weight (O, I), got {tuple(x.shape)} and {tuple(weight.shape)}")
    outputs, inputs = weight.shape
    rank = lora_a.shape[0] if lora_a.dim() else 0
    expected: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "lora_a": (lora_a, (rank, inputs)),
        "lora_b": (lora_b, (outputs, rank)),
    }
    if bias is not None:
        expected["bias"] = (bias, (outputs,))
    if adapter_input is not None:
        expected["adapter_input"] = (adapter_input, tuple(x.shape))
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{_OP}: {name} must be {shape} for x {tuple(x.shape)}, weight {tuple(weight.shape)} and lora_a "
                f"{tuple(lora_a.shape)}, got {tuple(tensor.shape)}"
            )
    if not x.dtype.is_floating_point:
        raise ValueError(f"{_OP}: x is {x.dtype}; it must be floating point")
    for name, tensor in {"weight": weight, **{name: tensor for name, (tensor, _) in expected.items()}}.items():
        if tensor.dtype != x.dtype:
            raise ValueError(f"{_OP}: {name} is {tensor.dtype} and x {x.dtype}; cast one of them, or use autocast")
        if tensor.device != x.device:
            raise ValueError(f"{_OP}: {name} is on {tensor.device} and x on {x.device}; move one of them")
