"""LoRA layers of peft that run as one op, `ops.lora_linear`, instead of a chain of products and sums.

A call runs the chain of peft wherever the op does not compute the same: the adapter is switched off, merged or one of
several, or a variant of LoRA (DoRA, …); the base layer is quantised or trained; ZeRO-3 or FSDP has sharded the weights;
or the layers inside have hooks, which the op would skip.

Compiled blocks run the chain too: inductor fuses its sums with what surrounds them, which is faster than an op that it
cannot look into (bench/README.md). Their layers are not patched at all. A patch is an object of its own for each layer,
so that dynamo would compile each block again, until it gives up after eight.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from delib_fast.models.forward_patch import ForwardPatch
from delib_fast.ops import lora_linear


def patch_lora(model: nn.Module, layers: str = "eager") -> list[ForwardPatch]:
    """Make the LoRA layers of nn.Linear in a model run as one op.

    Args:
        layers: how the blocks run, as in `patch_layers`. With "compile", no layer is patched.
    Returns:
        The installed patches, for `remove_patches`; empty if the model has no such layers.
    """
    if layers == "compile":
        return []
    lora = sys.modules.get("peft.tuners.lora")  # a model has no layers of a package that was never imported
    if lora is None:
        return []
    found: list[Any] = [module for module in model.modules() if type(module) is lora.Linear]
    patches: list[ForwardPatch] = [LoraForward(layer) for layer in found if type(layer.base_layer) is nn.Linear]
    for patch in patches:
        patch.install()
    return patches


class LoraForward(ForwardPatch):
    """The forward of one LoRA layer."""

    def patched(self, *args: Any, **kwargs: Any) -> Any:
        layer = self.module
        if len(args) != 1 or kwargs or torch.compiler.is_compiling() or not _is_plain(layer):
            return self.original(*args, **kwargs)
        (x,) = args
        name = layer.active_adapters[0]
        base, a, b = layer.base_layer, layer.lora_A[name].weight, layer.lora_B[name].weight
        if not torch.is_autocast_enabled(x.device.type) and not x.dtype == base.weight.dtype == a.dtype == b.dtype:
            return self.original(x)
        dropout = layer.lora_dropout[name]
        dropped = dropout(x) if layer.training and not isinstance(dropout, nn.Identity) else None
        return lora_linear(x, base.weight, a, b, layer.scaling[name], bias=base.bias, adapter_input=dropped)


def _is_plain(layer: Any) -> bool:
    """Whether the layer, as it is now, is W x + s·B A x with a frozen W."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return False
    name = layer.active_adapters[0]
    if name not in layer.lora_A or name in layer.lora_variant:
        return False
    inner = (layer.base_layer, layer.lora_A[name], layer.lora_B[name])
    if any(type(module) is not nn.Linear or _has_hooks(module) for module in inner):
        return False
    base, *adapter = inner
    if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        return False
    if any(module.bias is not None for module in adapter):  # lora_bias
        return False
    return not any(_is_sharded(module.weight) for module in inner)


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _is_sharded(weight: torch.Tensor) -> bool:
    """Whether ZeRO-3 or FSDP gathers the weight by hooks of its module."""
    return hasattr(weight, "ds_id") or hasattr(weight, "placements")
