"""How a decoder block computes everything except attention and matrix products: RMSNorm and residual, rotary
positions with QK-norm, SwiGLU.

    eager      transformers' own code (the default)
    compile    torch.compile of each block (regional: all blocks of a kind share one compiled function)
    liger      Liger's Triton kernels for the norms and SwiGLU (models/liger.py; optional, needs a GPU)

A compiled block contains the packed attention as one opaque op, so there is no graph break. The sizes of a pack are
symbols in the graph: packs with other lengths or another number of sequences do not recompile it. Only passes that
compute gradients are compiled. Evaluation and generation run eagerly, and so does the first pass of each block, in
which packed attention raises its errors about unsupported layers.

With activation checkpointing, the checkpoint surrounds the compiled function. A pass that ran eagerly is recomputed
eagerly, because a checkpoint compares what the two passes save. Packs with a shared prompt, and packs that are split
across ranks, run eagerly; ZeRO 3 is refused, because its hooks gather weights inside a block.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from delib_fast.models.attention import UnsupportedModelError
from delib_fast.models.forward_patch import ForwardPatch
from delib_fast.models.liger import patch_liger, why_not_liger

CHOICES = ("eager", "compile", "liger")
BACKEND: Any = "inductor"
"""The backend of torch.compile."""

# Until transformers 5.22 a layer applied checkpointing around its forward; newer versions apply it inside.
_CHECKPOINTS_INSIDE = "__call__" not in vars(GradientCheckpointingLayer)


def check_layers(choice: str, device: torch.device) -> None:
    """Check that `choice` can run on the device that the model trains on.

    Raises:
        ValueError: the choice does not exist.
        UnsupportedModelError: the choice is "liger" and Liger cannot run on the device.
    """
    if choice not in CHOICES:
        raise ValueError(f"layers={choice!r} does not exist; choose from {', '.join(CHOICES)}")
    if choice == "liger" and (reason := why_not_liger(device)):
        raise UnsupportedModelError(f"layers is liger: {reason}; set it to eager or compile")


def why_one_pass(choice: str) -> str | None:
    """Why every pack must run in one pass through the model, with the remedy, or None."""
    return "Compiled layers need one pass: set layers to eager" if choice == "compile" else None


def patch_layers(model: PreTrainedModel, choice: str = "eager") -> list[ForwardPatch]:
    """Make the decoder blocks of a model run as `choice` says.

    The device is not checked here (see `check_layers`), because the model may still be on the CPU.

    Returns:
        The installed patches, for `remove_patches`; empty for "eager".
    Raises:
        ValueError: the choice does not exist.
        UnsupportedModelError: the model has no blocks of a known kind, or the forward of one was replaced already.
    """
    if choice not in CHOICES:
        raise ValueError(f"layers={choice!r} does not exist; choose from {', '.join(CHOICES)}")
    if choice == "eager":
        return []
    if choice == "liger":
        return patch_liger(model)
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no blocks that transformers marks as layers, so there is nothing to "
            f"{choice}; set layers to eager"
        )
    if any("forward" in vars(block) for block in blocks):
        raise UnsupportedModelError(
            f"the forward of {type(blocks[0]).__name__} was replaced already, so it cannot be compiled; set layers to "
            "eager"
        )
    patches: list[ForwardPatch] = [_CompiledForward(block) for block in blocks]
    for patch in patches:
        patch.install()
    return patches


class _CompiledForward(ForwardPatch):
    """The compiled forward of one block. The compiled code is shared, and takes the block as an argument."""

    def __init__(self, block: GradientCheckpointingLayer) -> None:
        super().__init__(block)
        self._ran_eagerly, self._ran_compiled = False, False
        self._eager_pack: weakref.ref[Tensor] | None = None  # the cu_seqlens of the last pack that ran eagerly

    def patched(self, *args: Any, **kwargs: Any) -> Any:
        borders = kwargs.get("cu_seq_lens_q")
        if not self._can_compile(kwargs):
            self._ran_eagerly = True
            self._eager_pack = None if borders is None else weakref.ref(borders)
            return self.original(*args, **kwargs)
        if self._eager_pack is not None and self._eager_pack() is borders:
            self._eager_pack = None  # the same pack again: from now on it is recomputed compiled
        # The op reads the sequence boundaries from cu_seqlens. A tuple of them would be compiled in as constants.
        call = partial(self._code(), self.module, **{**kwargs, "cu_seqlens_host": None})
        if _CHECKPOINTS_INSIDE and self.module.gradient_checkpointing and self.module.training:
            call = partial(self.module._gradient_checkpointing_func, call)
        if self._ran_compiled:
            return call(*args)
        self._ran_compiled = True
        # Sizes should be symbols, but a norm's epsilon as a symbol makes dynamo start over, which doubles the wait.
        with torch._dynamo.config.patch(specialize_float=True):
            return call(*args)

    def _can_compile(self, kwargs: dict[str, Any]) -> bool:
        if not (self._ran_eagerly and torch.is_grad_enabled()):
            return False
        name = type(self.module).__name__
        if any(hasattr(parameter, "ds_id") for parameter in self.module.parameters()):
            raise UnsupportedModelError(
                f"{name} is compiled, and ZeRO-3 gathers its weights by hooks inside it; set layers to eager, or use "
                "ZeRO stage 2"
            )
        if _is_recomputed() and self._eager_pack is not None and self._eager_pack() is kwargs.get("cu_seq_lens_q"):
            return False
        # A shared prefix is passed to the op as host ints, and shards of a pack are exchanged between ranks: both stay
        # eager. So does a call that is not a pack, which has masks and perhaps a cache.
        is_whole = kwargs.get("varlen_prefix") is None and kwargs.get("sequence_group") is None
        return is_whole and "varlen_backend" in kwargs

    def _code(self) -> Callable[..., Any]:
        function = type(self.module).forward
        function = getattr(function, "__wrapped__", function) if _CHECKPOINTS_INSIDE else function
        return _compile(function, BACKEND)


def _is_recomputed() -> bool:
    """Whether a backward pass is running, so that a forward pass is the recomputation of a checkpoint."""
    return torch._C._current_graph_task_id() != -1


@cache
def _compile(function: Callable[..., Any], backend: Any) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True, backend=backend)
