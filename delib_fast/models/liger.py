"""Liger's RMSNorm and SwiGLU in the place of a model's own, module by module, whatever the architecture.

Which modules: norms that compute one of the two formulas below, and MLPs that compute down(silu(gate(x)) · up(x)). Both
are asked on a few random numbers rather than by name, so that a norm that does something else stays as it is.

    llama   w · x / rms(x)              rounded before the weight
    gemma   (1 + w) · x / rms(x)        float32 until the end

Rotary positions stay the model's: Liger's replace a function of transformers' modeling module, for every model in the
process. Its kernels are Triton's; not yet measured here, since that needs a GPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from delib_fast.models.attention import UnsupportedModelError


def why_not_liger(device: torch.device) -> str | None:
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed (pip install liger-kernel)"
    return None if device.type == "cuda" else f"liger-kernel's layers need a GPU, and the model is on {device.type}"


def plug_liger(model: PreTrainedModel) -> Callable[[], None]:
    """Replace the forwards of norms and MLPs; returns what undoes it.

    Raises UnsupportedModelError where the model has neither in a form that Liger computes.
    """
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    changed: list[nn.Module] = []
    for module in model.modules():
        forward: Callable[[Tensor], Tensor] | None = None
        if (offset := _norm_offset(module)) is not None:
            forward = _norm(module, offset, LigerRMSNormFunction.apply)
        elif _is_swiglu(module):
            forward = _swiglu(module, LigerSiLUMulFunction.apply)
        if forward is not None and "forward" not in vars(module):
            vars(module)["forward"] = forward
            changed.append(module)
    if not changed:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no RMSNorm and no SwiGLU that Liger computes; set layers to eager or compile"
        )

    def unplug() -> None:
        for module in changed:
            vars(module).pop("forward", None)

    return unplug


def _epsilon(module: nn.Module) -> float | None:
    found = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return float(found) if isinstance(found, int | float) else None


@torch.no_grad()
def _norm_offset(module: nn.Module) -> float | None:
    """0 for llama's formula, 1 for gemma's, None for what is neither."""
    weight, eps = getattr(module, "weight", None), _epsilon(module)
    if (
        not isinstance(weight, nn.Parameter)
        or weight.dim() != 1
        or eps is None
        or weight.numel() == 0
        or weight.is_meta
        or list(module.children())
    ):
        return None
    wide = weight.detach().float()
    x = torch.randn(3, len(wide), generator=torch.Generator().manual_seed(0)).to(wide.device)
    try:
        out = module(x.to(weight.dtype)).float()
    except (TypeError, RuntimeError, ValueError):  # takes something else than one tensor
        return None
    x = x.to(weight.dtype).float()
    unit = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    for offset in (0.0, 1.0):
        if out.shape == x.shape and torch.allclose(out, unit * (wide + offset), rtol=2e-2, atol=1e-3):
            return offset
    return None


def _norm(module: nn.Module, offset: float, kernel: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    eps, casting = _epsilon(module), "gemma" if offset else "llama"

    def forward(hidden_states: Tensor) -> Tensor:
        return kernel(hidden_states, module.weight, eps, offset, casting, False)

    return forward


def _is_swiglu(module: nn.Module) -> bool:
    act: Any = getattr(module, "act_fn", None)
    names = {name for name, _ in module.named_children()}
    if (
        not {"gate_proj", "up_proj", "down_proj"} <= names
        or not callable(act)
        or names - {"gate_proj", "up_proj", "down_proj", "act_fn"}
    ):
        return False
    x = torch.linspace(-4, 4, 9)
    return bool(torch.allclose(act(x), nn.functional.silu(x)))


def _swiglu(module: Any, kernel: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        return module.down_proj(kernel(module.gate_proj(x), module.up_proj(x)))

    return forward
