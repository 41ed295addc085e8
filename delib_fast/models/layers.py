"""How a decoder block computes everything except attention and matrix products: RMSNorm and residual, rotary
positions with QK-norm, SwiGLU.

    eager      transformers' own code
    compile    torch.compile of each block (regional: all blocks of a kind share one compiled function)
    liger      Liger's Triton kernels for the norms and SwiGLU (models/liger.py; optional, needs a GPU)
    auto       on a GPU the first of compile, liger and eager that supports the model; on a CPU eager (`choose_layers`)

A compiled block contains the packed attention as one opaque op, so there is no graph break. The sizes of a pack are
symbols in the graph: packs with other lengths or another number of sequences do not recompile it. Only passes that
compute gradients are compiled. Evaluation and generation run eagerly, and so does the first pass of each block, in
which packed attention raises its errors about unsupported layers.

With activation checkpointing, the checkpoint surrounds the compiled function. A pass that ran eagerly is recomputed
eagerly, because a checkpoint compares what the two passes save. Packs with a shared prompt, and packs that are split
across ranks, run eagerly. At ZeRO 3 the weights of a whole block are gathered around the compiled function.
"""

from __future__ import annotations

import os
import shutil
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
from delib_fast.models.hf_utils import expert_share
from delib_fast.models.liger import computes_with_liger, patch_liger, why_not_liger
from delib_fast.models.separation import has_weights

APPLICABLE = ("eager", "compile", "liger")
CHOICES = ("auto", *APPLICABLE)
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
    _check_choice(choice)
    if choice == "liger" and (reason := why_not_liger(device)):
        raise UnsupportedModelError(f"layers is liger: {reason}; set it to eager or compile")


def _check_choice(choice: str) -> None:
    if choice not in CHOICES:
        raise ValueError(f"layers={choice!r} does not exist; choose from {', '.join(CHOICES)}")


def choose_layers(model: PreTrainedModel, device: torch.device, *, why_eager: str | None = None) -> tuple[str, str]:
    """What `auto` selects for a model that trains on the device: (eager, compile or liger; the reason).

    The choice depends only on the device, the installed packages, and the structure and settings of the model, so it is
    the same on every rank.

    Args:
        why_eager: why compiled code would never run, if that is known.
    """
    if device.type != "cuda":
        return "eager", "on a CPU, compiling pays off only in runs longer than a few minutes"
    reason = why_eager or _why_not_compile(model)
    if reason is None:
        return "compile", "torch.compile fuses norms, rotary positions and SwiGLU"
    why_not = why_not_liger(device)
    if why_not is None and not has_weights(model):
        why_not = "Liger's layers are recognized by their results, and the weights are not loaded yet"
    if why_not is None and not computes_with_liger(model):
        why_not = "the model has no RMSNorm and no SwiGLU that Liger computes"
    if why_not is None:
        return "liger", f"the blocks are not compiled: {reason}"
    return "eager", f"the blocks are not compiled: {reason}; and {why_not}"


def _why_not_compile(model: PreTrainedModel) -> str | None:
    """Why `auto` does not compile the blocks of a model on a GPU, or None."""
    blocks: list[Any] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        return f"{type(model).__name__} has no blocks that transformers marks as layers"
    if any("forward" in vars(module) for block in blocks for module in block.modules()):
        return "a forward inside them was replaced"
    if any(
        "context_fn" in getattr(block._gradient_checkpointing_func, "keywords", {}) for block in _checkpointed(blocks)
    ):
        return "selective activation checkpointing cannot see inside a compiled block"
    if expert_share(model.config.get_text_config()) < 1:
        return "the number of tokens of each expert changes with every pack"
    if any(hasattr(parameter, "quant_state") for parameter in model.parameters()):
        return "their weights are in 4 bits"
    if not torch.utils._triton.has_triton():
        return "triton is not installed, or does not support this GPU"
    if not (os.environ.get("CC") or any(map(shutil.which, ("cc", "gcc", "clang")))):
        return "triton needs a C compiler, and cc, gcc and clang are not found"
    return None


def _checkpointed(blocks: list[Any]) -> list[Any]:
    return [block for block in blocks if block.gradient_checkpointing]


def why_one_pass(choice: str) -> str | None:
    """Why every pack must run in one pass through the model, with the remedy, or None."""
    return "Compiled layers need one pass: set layers to eager" if choice == "compile" else None


def patch_layers(model: PreTrainedModel, choice: str = "eager") -> list[ForwardPatch]:
    """Make the decoder blocks of a model run as `choice` ("eager", "compile" or "liger") says.

    The device is not checked here (see `check_layers`), because the model may still be on the CPU.

    Returns:
        The installed patches, for `remove_patches`; empty for "eager".
    Raises:
        ValueError: the choice does not exist.
        UnsupportedModelError: the model has no blocks of a known kind, or the forward of one was replaced already.
    """
    _check_choice(choice)
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
        # ZeRO 3 then gathers the weights of the whole block by hooks of the block, outside the compiled function.
        # DeepSpeed's name for this is a leaf module; it reads the flag when it wraps the model.
        self.module._z3_leaf = True
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
