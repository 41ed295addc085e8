"""Attention for models that run packs and other calls: packs use `ops.varlen_attention`, all other calls the model's
own attention.

The attention `attention.NAME` raises an error for a call that is not a pack, which is right for a model that only
trains. In other trainers, a model also evaluates, and generates with a cache. Such a model gets the attention
`delib_fast_or_sdpa` (or `delib_fast_or_` with the name of its own attention). The caller marks a pack by `in_a_pack`
while masks are built, and by the keyword `varlen_backend` in each layer, which is also present when a checkpointed
layer is recomputed. A layer that drops the keyword would run its own attention without a mask, so it raises an error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from delib_fast.models.active_pack import active_pack
from delib_fast.models.attention import attend, no_mask

_PREFIX = "delib_fast_or_"


def switching_name(original: str | None) -> str:
    """Register and name the attention that runs packs by `varlen_attention`, and other calls by `original`."""
    original = original or "eager"
    if original.startswith(_PREFIX):
        return original
    name = _PREFIX + original
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, _attention(original))
        AttentionMaskInterface.register(name, _mask(original))
    return name


def _attention(original: str) -> Callable[..., Any]:
    def attend_or_original(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        # In a pack no mask was built. If the layer dropped the pack's arguments, `attend` raises an error. Layers
        # without a vocabulary (of images) never get them.
        config = getattr(module, "config", None)
        is_text = config is None or hasattr(config, "vocab_size")
        if "varlen_backend" in kwargs or (active_pack() is not None and is_text):
            return attend(module, query, key, value, attention_mask, **kwargs)
        return _original_attention(original, module)(module, query, key, value, attention_mask, **kwargs)

    return attend_or_original


def _original_attention(original: str, module: nn.Module) -> Callable[..., Any]:
    # Every modeling file has its own eager attention, which is not registered with the interface.
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attention: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(original, eager)
    return attention


def _mask(original: str) -> Callable[..., Any]:
    def mask_or_none(*args: Any, **kwargs: Any) -> Any:
        if active_pack() is not None:
            return no_mask(*args, **kwargs)
        return ALL_MASK_ATTENTION_FUNCTIONS[original](*args, **kwargs)

    return mask_or_none
