"""Activation checkpointing: what a layer keeps for the backward pass, and what it recomputes there.

    none        keep everything
    selective   keep the layer's input, and the output and log-sum-exp of its attention, whose cost grows with the
                square of a sequence's length
    full        keep the layer's input
    offload     with selective or full: keep that input in host memory
    tiles       compute a block's MLP on one tile of tokens at a time, and recompute each tile in the backward pass

None of these changes what is computed: the gradients are those of `none`, except for the order of sums. Checkpoints
are not re-entrant, so frozen embeddings, and an adapter next to frozen weights, work too.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from delib_fast.config import ConfigError
from delib_fast.models.forward_patch import ForwardPatch

# Parts of the names of the ops that compute attention: delib_fast's, torch's and flash-attn's.
_ATTENTION_OPS = ("varlen_attention", "varlen_attn", "_flash_attn_varlen", "_flash_attention", "scaled_dot_product")


def recompute(
    model: PreTrainedModel, mode: str, *, layers: int | None = None, offload: bool = False, mlp_tiles: int = 1
) -> list[ForwardPatch]:
    """Set what the model's layers keep for the backward pass.

    Args:
        mode: "none", "selective" or "full".
        layers: apply `mode` to this number of layers, the first ones, and keep everything in the others; None for all.
            The backward pass frees what the last layers keep before it recomputes one of the first, so that both are
            never in memory together.
        offload: keep the layers' inputs in host memory.
        mlp_tiles: number of tiles that the tokens of a pack are split into for each MLP; 1 disables tiling.
    Returns:
        The patches of tiled MLPs, for `remove_patches`. `model.gradient_checkpointing_disable()` undoes the rest.
    Raises:
        ConfigError: the model or the installed transformers does not support it; the message says what to set.
    """
    name = type(model).__name__
    if mode != "none":
        if not model.supports_gradient_checkpointing:
            raise ConfigError(f"model.activation_checkpointing: {name} does not support it; set it to none")
        enable_activation_checkpointing(model, selective=mode == "selective", offload=offload)
        if layers is not None:
            _keep_the_last(model, layers)
    if mlp_tiles == 1:
        return []
    mlps: list[Any] = [
        layer.mlp
        for layer in model.modules()
        if isinstance(layer, GradientCheckpointingLayer) and _is_mlp(getattr(layer, "mlp", None))
    ]
    if not mlps:
        raise ConfigError(f"model.mlp_tiles: {name} has no layers with an MLP of plain matrices; set it to 1")
    patches: list[ForwardPatch] = [_TiledMLP(mlp, mlp_tiles) for mlp in mlps]
    for patch in patches:
        patch.install()
    return patches


def checkpointed_blocks(model: nn.Module) -> list[nn.Module]:
    """The modules that activation checkpointing recomputes one by one, in their order: usually the decoder layers."""
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and id(module) not in inside:
            found.append(module)
            inside.update(id(child) for child in module.modules())
    return found


def _keep_the_last(model: PreTrainedModel, layers: int) -> None:
    """Recompute only the first `layers` layers. Raises ConfigError if the model has another number of blocks."""
    blocks: list[Any] = checkpointed_blocks(model)
    expected = model.config.get_text_config().num_hidden_layers
    if len(blocks) != expected:
        raise ConfigError(
            f"model.checkpointed_layers: {type(model).__name__} has {expected} layers, but {len(blocks)} modules that "
            "can be recomputed one by one; set it to null"
        )
    if layers > len(blocks):
        raise ConfigError(
            f"model.checkpointed_layers is {layers}, but {type(model).__name__} has {len(blocks)} layers; set it to at "
            f"most {len(blocks)}, or to null for all"
        )
    for block in blocks[layers:]:
        for module in block.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.gradient_checkpointing = False


def enable_activation_checkpointing(model: PreTrainedModel, *, selective: bool = False, offload: bool = False) -> None:
    """Recompute each layer in the backward pass, or with `selective` everything in it except attention.

    Raises ConfigError if `offload` is requested and there is no GPU, or transformers is too old for it.
    """
    kwargs: dict[str, Any] = {"use_reentrant": False}
    if selective:
        kwargs["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_attention)
    enable: Any = getattr(model, "activation_checkpointing_enable", None)  # the name since transformers 5.23
    if enable is None:
        enable = model.gradient_checkpointing_enable
    if offload and not torch.cuda.is_available():
        raise ConfigError(
            "model.activation_offload moves activations from a GPU to the host, and torch sees no GPU; set it to false"
        )
    if offload and "offload" not in inspect.signature(enable).parameters:
        raise ConfigError(
            f"model.activation_offload: transformers {transformers.__version__} cannot offload (5.17 can); upgrade it, "
            "or set it to false"
        )
    enable(kwargs, **({"offload": True} if offload else {}))


def _keep_attention(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    if any(part in str(op) for part in _ATTENTION_OPS):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _is_mlp(module: nn.Module | None) -> bool:
    """Whether the module is an up- and a down-projection, applied to each token independently (not to a router)."""
    return module is not None and all(
        isinstance(getattr(module, part, None), nn.Linear) or hasattr(getattr(module, part, None), "base_layer")
        for part in ("up_proj", "down_proj")
    )


class _TiledMLP(ForwardPatch):
    """An MLP on T/tiles tokens at a time; only a tile's input is kept for the backward pass."""

    def __init__(self, mlp: nn.Module, tiles: int) -> None:
        super().__init__(mlp)
        self._tiles = tiles

    def patched(self, hidden: Tensor) -> Tensor:
        """hidden and result: (1, T, H)."""
        tiles = hidden.chunk(self._tiles, dim=-2)
        if not torch.is_grad_enabled() or not hidden.requires_grad:
            return torch.cat([self.original(tile) for tile in tiles], dim=-2)
        return torch.cat([checkpoint(self.original, tile, use_reentrant=False) for tile in tiles], dim=-2)
