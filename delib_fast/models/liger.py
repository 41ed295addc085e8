"""Liger's RMSNorm and SwiGLU instead of a model's own, module by module, for any architecture.

Two kinds of module are replaced: norms that compute one of the two formulas below, and MLPs that compute
down(silu(gate(x)) · up(x)). Each module is identified by evaluating it on random numbers instead of by its name, so a
norm that computes something else is left alone.

    llama   w · x / rms(x)              rounded before the multiplication by w
    gemma   (1 + w) · x / rms(x)        float32 until the end

Rotary positions stay the model's own, because Liger replaces a function of transformers' modeling module, which would
affect every model in the process. Liger's kernels are written in Triton; their speed has not been measured here, since
that needs a GPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from delib_fast.models.attention import UnsupportedModelError
from delib_fast.models.forward_patch import ForwardPatch


def why_not_liger(device: torch.device) -> str | None:
    """The reason why Liger's layers cannot run on the device, or None."""
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed (pip install liger-kernel)"
    return None if device.type == "cuda" else f"liger-kernel's layers need a GPU, and the model is on {device.type}"


def computes_with_liger(model: PreTrainedModel) -> bool:
    """Whether the model has a norm or an MLP that Liger computes."""
    return any(_norm_offset(module) is not None or _is_swiglu(module) for module in model.modules())


def patch_liger(model: PreTrainedModel) -> list[ForwardPatch]:
    """Replace the forwards of norms and MLPs. Modules whose forward was replaced already are left alone.

    Returns:
        The installed patches, for `remove_patches`.
    Raises:
        UnsupportedModelError: the model has no norm and no MLP that Liger computes.
    """
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    patches: list[ForwardPatch] = []
    for module in model.modules():
        patch: ForwardPatch | None = None
        if (offset := _norm_offset(module)) is not None:
            patch = _NormForward(module, offset, LigerRMSNormFunction.apply)
        elif _is_swiglu(module):
            patch = _SwigluForward(module, LigerSiLUMulFunction.apply)
        if patch is not None and "forward" not in vars(module):
            patch.install()
            patches.append(patch)
    if not patches:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no RMSNorm and no SwiGLU that Liger computes; set layers to eager or compile"
        )
    return patches


class _NormForward(ForwardPatch):
    def __init__(self, module: nn.Module, offset: float, kernel: Callable[..., Tensor]) -> None:
        super().__init__(module)
        self._kernel, self._offset, self._eps = kernel, offset, _epsilon(module)

    def patched(self, hidden_states: Tensor) -> Tensor:
        casting, in_place = "gemma" if self._offset else "llama", False
        return self._kernel(hidden_states, self.module.weight, self._eps, self._offset, casting, in_place)


class _SwigluForward(ForwardPatch):
    def __init__(self, module: nn.Module, kernel: Callable[..., Tensor]) -> None:
        super().__init__(module)
        self._kernel = kernel

    def patched(self, x: Tensor) -> Tensor:
        mlp = self.module
        product: Tensor = mlp.down_proj(self._kernel(mlp.gate_proj(x), mlp.up_proj(x)))
        return product


def _epsilon(module: nn.Module) -> float | None:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return float(eps) if isinstance(eps, int | float) else None


@torch.no_grad()
def _norm_offset(module: nn.Module) -> float | None:
    """0 if the module computes llama's formula, 1 if gemma's, None if neither."""
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
    weight_fp32 = weight.detach().float()
    x = torch.randn(3, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.device)
    try:
        out = module(x.to(weight.dtype)).float()
    except (TypeError, RuntimeError, ValueError):  # it takes something other than one tensor
        return None
    x = x.to(weight.dtype).float()
    unit = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    for offset in (0.0, 1.0):
        if out.shape == x.shape and torch.allclose(out, unit * (weight_fp32 + offset), rtol=2e-2, atol=1e-3):
            return offset
    return None


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
