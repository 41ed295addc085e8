"""What a layer keeps for the backward pass, and what it computes again there.

    none        everything
    selective   its input, and the output and log-sum-exp of its attention, whose cost grows with the square of a run
    full        its input
    offload     with selective or full: that input, in the host's memory
    tiles       a block's MLP in so many parts of the pack, one after another, each computed again

None changes what is computed: gradients are those of `none` but for the order of sums. Checkpoints are not re-entrant,
so frozen embeddings, and an adapter in place of trained weights, work too.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from delib_fast.config import ConfigError

# Parts of the names of what computes attention, of every backend: ours, torch's, flash-attn's.
_ATTENTION = ("varlen_attention", "varlen_attn", "_flash_attn_varlen", "_flash_attention", "scaled_dot_product")


def recompute(model: PreTrainedModel, mode: str, *, offload: bool = False, mlp_tiles: int = 1) -> None:
    """Set the model's layers to keep what `mode` says (none, selective, full).

    Raises ConfigError: the model or the installed transformers can't do it; says what to set.
    """
    name = type(model).__name__
    if mode != "none":
        if not model.supports_gradient_checkpointing:
            raise ConfigError(f"model.activation_checkpointing: {name} does not support it; set it to none")
        enable_activation_checkpointing(model, selective=mode == "selective", offload=offload)
    if mlp_tiles > 1:
        mlps: list[Any] = [
            layer.mlp
            for layer in model.modules()
            if isinstance(layer, GradientCheckpointingLayer) and _is_mlp(getattr(layer, "mlp", None))
        ]
        if not mlps:
            raise ConfigError(f"model.mlp_tiles: {name} has no layers with an MLP of plain matrices; set it to 1")
        for mlp in mlps:
            vars(mlp)["forward"] = partial(_tiled, mlp.forward, mlp_tiles)


def enable_activation_checkpointing(model: PreTrainedModel, *, selective: bool = False, offload: bool = False) -> None:
    """Recompute each layer in the backward pass."""
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
        raise ConfigError("model.activation_offload needs a newer transformers (5.24 has it); set it to false")
    enable(kwargs, **({"offload": True} if offload else {}))


def _keep_attention(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    if any(part in str(op) for part in _ATTENTION):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _is_mlp(module: nn.Module | None) -> bool:
    """An up- and a down-projection, token by token: no router that looks at all tokens."""
    return module is not None and all(
        isinstance(getattr(module, part, None), nn.Linear) or hasattr(getattr(module, part, None), "base_layer")
        for part in ("up_proj", "down_proj")
    )


def _tiled(forward: Any, tiles: int, hidden: Tensor) -> Tensor:
    """hidden (1, T, H): the MLP of T/tiles tokens at a time; only a tile's input is kept."""
    if not torch.is_grad_enabled() or not hidden.requires_grad:
        return torch.cat([forward(tile) for tile in hidden.chunk(tiles, dim=-2)], dim=-2)
    return torch.cat([checkpoint(forward, tile, use_reentrant=False) for tile in hidden.chunk(tiles, dim=-2)], dim=-2)
