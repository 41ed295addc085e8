"""How a decoder block computes what stands around its attention and its matrix products: RMSNorm and residual, rotary
positions with QK-norm, SwiGLU.

    eager      as transformers writes it
    compile    torch.compile of the block (regional: every block of a kind runs the same compiled code)
    liger      Liger's Triton kernels for the norms and SwiGLU (models/liger.py; optional, needs a GPU)

The compiled block holds the attention of a pack as one opaque op, so that nothing breaks it in two. Sizes of packs are
symbols in it: packs of other lengths and other numbers of runs don't compile it again. Only passes that make gradients
are compiled; evaluation and generation run as ever, and so does each block's first pass, in which everything that
packed attention refuses is refused by name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from delib_fast.models.attention import UnsupportedModelError
from delib_fast.models.liger import plug_liger, why_not_liger

CHOICES = ("auto", "eager", "compile", "liger")
# What `auto` takes on a device: what was measured to make a whole step faster there (bench/README.md), eager where
# nothing was.
MEASURED: dict[str, str] = {}
BACKEND: Any = "inductor"

_log = logging.getLogger("delib_fast")
# Until transformers 5.22 a layer checkpoints around its forward, since then inside it.
_CHECKPOINTS_INSIDE = "__call__" not in vars(GradientCheckpointingLayer)


def resolve_layers(choice: str, device: torch.device, zero_stage: int = 0) -> str:
    """`auto` as what it means on this device.

    Raises ValueError for an unknown choice, UnsupportedModelError for one that can't run there.
    """
    if choice not in CHOICES:
        raise ValueError(f"layers={choice!r} does not exist; choose from {', '.join(CHOICES)}")
    if choice == "liger" and (reason := why_not_liger(device)):
        raise UnsupportedModelError(f"layers is liger: {reason}; set it to eager or compile")
    if choice != "auto":
        return choice
    return "eager" if zero_stage == 3 else MEASURED.get(device.type, "eager")


def plug_layers(model: PreTrainedModel, choice: str = "auto") -> Callable[[], None]:
    """Let the decoder blocks of a model run as `choice` says; returns what undoes it.

    A choice by name has been resolved (`resolve_layers`): here the model may still be on the CPU.

    Raises:
        ValueError: there is no such choice.
        UnsupportedModelError: the model has no blocks that are known as such.
    """
    if choice not in CHOICES or choice == "auto":
        choice = resolve_layers(choice, next(model.parameters()).device)
    if choice == "eager":
        return lambda: None
    if choice == "liger":
        return plug_liger(model)
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no blocks that transformers names as layers, so there "
            f"is nothing to {choice}; set layers to eager"
        )
    forwards = [_CompiledForward(block) for block in blocks]

    def unplug() -> None:
        for forward in forwards:
            forward.remove()

    return unplug


class _CompiledForward:
    """The forward of one block. Compiled code is shared: it takes the block as an argument."""

    def __init__(self, block: GradientCheckpointingLayer) -> None:
        self.block = block
        self.previous: Callable[..., Any] | None = block.__dict__.get("forward")
        if self.previous is not None:
            raise UnsupportedModelError(
                f"the forward of {type(block).__name__} has been replaced already, so it can't "
                "be compiled; set layers to eager"
            )
        self.active, self.asked, self.ran = True, False, False
        vars(block)["forward"] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._is_compiled(kwargs):
            self.asked = True
            return type(self.block).forward(self.block, *args, **kwargs)
        # The op reads the runs off cu_seqlens. A tuple of them would be compiled in as constants.
        run = partial(self._code(), self.block, **{**kwargs, "cu_seqlens_host": None})
        if _CHECKPOINTS_INSIDE and self.block.gradient_checkpointing and self.block.training:
            checkpoint: Any = self.block._gradient_checkpointing_func
            run = partial(checkpoint, run)
        if self.ran:
            return run(*args)
        self.ran = True
        # Sizes are to be symbols; the epsilon of a norm as one makes dynamo start over, which doubles the wait.
        with torch._dynamo.config.patch(specialize_float=True):
            return run(*args)

    def _is_compiled(self, kwargs: dict[str, Any]) -> bool:
        if not (self.active and self.asked and torch.is_grad_enabled()):
            return False
        if any(hasattr(parameter, "ds_id") for parameter in self.block.parameters()):
            raise UnsupportedModelError(
                f"{type(self.block).__name__} is compiled, and ZeRO-3 gathers its weights by "
                "hooks inside it; set layers to eager, or use ZeRO stage 2"
            )
        if self.block.gradient_checkpointing and not _CHECKPOINTS_INSIDE:
            raise UnsupportedModelError(
                "blocks that are compiled and checkpointed need transformers 5.23 or newer; "
                "set layers to eager, or turn activation checkpointing off"
            )
        # No pack: masks, perhaps a cache. A shared prefix is host ints of the op. Parts of a pack are exchanged.
        apart = kwargs.get("varlen_prefix") is None and kwargs.get("sequence_group") is None
        return apart and "varlen_backend" in kwargs

    def _code(self) -> Callable[..., Any]:
        function = type(self.block).forward
        function = getattr(function, "__wrapped__", function) if _CHECKPOINTS_INSIDE else function
        return _compile(function, BACKEND)

    def remove(self) -> None:
        self.active = False
        if self.block.__dict__.get("forward") is self:
            del vars(self.block)["forward"]
        else:
            _log.warning(
                "the forward of %s has been wrapped since its layers were compiled; the wrapper is left there",
                type(self.block).__name__,
            )


@cache
def _compile(function: Callable[..., Any], backend: Any) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True, backend=backend)
