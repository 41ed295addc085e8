"""Packed attention inside a transformers model: one function for every architecture and backend.

transformers looks up attention functions by name. Under the name `delib_fast_varlen` it finds `attend`, which passes
the pack to `ops.varlen_attention` with the batch's `cu_seqlens`, and `no_mask`, so that no mask is ever built. Only
this module and `integrations/unpadding.py` use transformers' names (`cu_seq_lens_q`, `max_length_q`, …).

Anything that the op does not support raises an error that names it, either before training or in the first forward
pass. Nothing falls back to an attention function in which one document could attend to another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from delib_fast.data import PackedBatch
from delib_fast.models import ulysses
from delib_fast.models.active_pack import active_pack
from delib_fast.models.errors import UnsupportedModelError
from delib_fast.models.rope import rope_that_depends_on_length, unsupported_rope
from delib_fast.ops import varlen_attention

__all__ = [
    "NAME",
    "UnsupportedModelError",
    "attend",
    "no_mask",
    "packed_inputs",
    "unsupported",
    "why_not_share_prompts",
]

NAME = "delib_fast_varlen"

# Kinds of layers that run packed attention, or whose other mixing of tokens `models.separation` finds by running them.
_KNOWN_LAYERS = frozenset(
    ["full_attention", "sliding_attention", "linear_attention", "conv", "mamba", "hybrid", "mlp", "moe"]
)
_DROPOUT_KEYS = ("attention_dropout", "attn_pdrop", "attn_dropout", "attention_probs_dropout_prob")
# What some arguments of attention layers do that the op does not support.
_CHANGES_THE_MATHS = {
    "position_bias": "a bias on the attention scores",
    "alibi": "a bias on the attention scores",
    "cache": "a paged cache",
    "sinks": "attention sinks of each token",
    "indices": "a selection of the keys that each token attends to",
    "block_indices": "a selection of the keys that each token attends to",
}
# Arguments that layers add to those of the model's call, and that do not change the result of packed attention.
_IGNORED = {"cache_position", "deterministic", "output_attentions", "position_embeddings", "position_ids", "use_cache"}


def packed_inputs(
    batch: PackedBatch, backend: str = "auto", sequence_group: dist.ProcessGroup | None = None
) -> dict[str, Any]:
    """The keyword arguments with which a transformers model runs a pack of T tokens as one row, (1, T).

    Args:
        backend: the backend of `ops.varlen_attention`.
        sequence_group: the ranks across which each pack is sharded; `batch` is then this rank's shard.
    """
    input_ids = batch.input_ids.unsqueeze(0)
    return {
        "input_ids": input_ids,
        "position_ids": batch.position_ids.unsqueeze(0),
        # All ones, to avoid a device sync: without a mask, transformers searches the position ids for packed
        # sequences, which are known already. `no_mask` ignores it.
        "attention_mask": torch.ones_like(input_ids, dtype=torch.bool),
        "use_cache": False,
        "cu_seq_lens_q": batch.cu_seqlens,
        "cu_seq_lens_k": batch.cu_seqlens,
        "max_length_q": batch.max_seqlen,
        "max_length_k": batch.max_seqlen,
        "cu_seqlens_host": batch.cu_seqlens_host,
        "varlen_backend": backend,
        "varlen_prefix": batch.prefix,
        "sequence_group": sequence_group,
    }


def unsupported(model: PreTrainedModel) -> str | None:
    """Why the model cannot be trained on packs, judged by its class and config, with the remedy; or None."""
    config = model.config.get_text_config()
    name = type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        return f"{name} is an encoder-decoder; a causal language model is needed"
    if getattr(config, "use_bidirectional_attention", None):
        return f"{name} attends in both directions (use_bidirectional_attention); only causal attention is supported"
    for key in _DROPOUT_KEYS:
        value = getattr(config, key, 0)
        if isinstance(value, int | float) and value > 0:
            return f"{name} has {key} {value}, and packed attention has no dropout; set {key} to 0"
    return unsupported_rope(model)


def why_not_packed(model: PreTrainedModel) -> str | None:
    """Why the model's class and config do not allow packed attention in every layer, or None."""
    if not model._can_set_attn_implementation():
        return "it does not take its attention from transformers' AttentionInterface"
    config = model.config.get_text_config()
    if unknown := sorted(set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYERS):
        return f"it has layers of type {', '.join(unknown)}"
    if getattr(config, "attention_chunk_size", None) is not None and not hasattr(config, "layer_types"):
        return "it has chunked attention (attention_chunk_size)"
    return None


def why_not_share_prompts(config: PreTrainedConfig, backend: str) -> str | None:
    """Why replies to one prompt cannot share it in a pack (`PackedBatch.prefix`) at full speed, or None."""
    text = config.get_text_config()
    types = getattr(text, "layer_types", None)
    has_window = "sliding_attention" in types if types else getattr(text, "sliding_window", None) is not None
    if has_window:
        return (
            "its attention has a sliding window, which across a shared prompt only the slow reference backend supports"
        )
    if kind := rope_that_depends_on_length(config):
        return f"its rotary frequencies depend on the length of prompt and reply (rope_type {kind})"
    if getattr(text, "attn_logit_softcapping", None) is not None:
        return "its attention caps its scores, which across a shared prompt only the slow reference backend supports"
    if backend == "flash":
        return "model.attention: flash cannot merge two attentions in its backward pass, which a shared prompt needs"
    return None


def _unsupported_layer(module: nn.Module, why: str) -> UnsupportedModelError:
    location = f"layer {getattr(module, 'layer_idx', '?')} ({type(module).__name__})"
    return UnsupportedModelError(f"{location}: {why}")


def _window(module: nn.Module, sliding_window: int | None) -> int | None:
    """The layer's window. Raises UnsupportedModelError if the layer's config has a window that was not passed here.

    Some models (qwen2_moe, phimoe) apply their window only in the mask, which is not built.
    """
    if torch.compiler.is_compiling():  # the eager first pass has checked it (layers.py); layer_idx would be a constant
        return sliding_window
    config: PreTrainedConfig | None = getattr(module, "config", None)
    if sliding_window is None and config is not None:
        types, index = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
        if types is not None and index is not None:
            has_window = types[index] == "sliding_attention"
        else:
            has_window = getattr(config, "sliding_window", None) is not None
        if has_window:
            raise _unsupported_layer(
                module,
                "its config has a sliding window, which this architecture does not pass to its attention function, so "
                "it would be ignored; turn the window off (use_sliding_window: false, or sliding_window: null)",
            )
    return sliding_window


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    cu_seqlens_host: tuple[int, ...] | None = None,
    varlen_backend: str = "auto",
    varlen_prefix: Sequence[int] | None = None,
    sequence_group: dist.ProcessGroup | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Packed attention as transformers calls it: q and k (1, heads, T, D), v (1, heads, T, Dv) to (1, T, heads, Dv).

    Args:
        softcap: bound of the scores (attn_logit_softcapping).
        s_aux: (heads,), the attention sinks.
        sequence_group: the ranks across which the pack's tokens are sharded. T is then the length of this rank's
            shard, while cu_seq_lens_q describes the whole pack.
    Raises:
        UnsupportedModelError: the layer does something that packed attention does not support.
    """
    _check_call(module, query, key, attention_mask, cu_seq_lens_q, max_length_q, is_causal, dropout, others)
    assert cu_seq_lens_q is not None
    assert max_length_q is not None
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if sequence_group is not None:
        q, k, v = ulysses.to_heads(q, k, v, sequence_group)
        s_aux = None if s_aux is None else ulysses.own_heads(s_aux, sequence_group)
    out = varlen_attention(
        q,
        k,
        v,
        cu_seq_lens_q,
        max_length_q,
        scale=scaling,
        window=_window(module, sliding_window),
        softcap=softcap,
        sinks=s_aux,
        cu_seqlens_host=cu_seqlens_host,
        prefix=varlen_prefix,
        backend=varlen_backend,
    )
    if sequence_group is not None:
        out = ulysses.to_tokens(out, sequence_group)
    return out.unsqueeze(0), None


def _check_call(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    cu_seq_lens_q: Tensor | None,
    max_length_q: int | None,
    is_causal: bool | None,
    dropout: float,
    others: dict[str, Any],
) -> None:
    """Raise UnsupportedModelError if this call of `attend` is not plain causal attention over a pack."""
    if cu_seq_lens_q is None or max_length_q is None:
        raise _unsupported_layer(
            module,
            "its attention function received no cu_seqlens, so documents cannot be isolated from each other. Either the"
            " layer does not pass its keyword arguments on, and this architecture cannot be trained on packs, or the "
            "model was called without a pack: call it through delib_fast.models.TrainableLM, or set a different "
            "attn_implementation to use it without packs (TrainableLM.unpatch does)",
        )
    if query.shape[0] != 1 or key.shape[2] != query.shape[2]:
        raise _unsupported_layer(
            module,
            f"a pack is one row with as many keys as queries; this is a batch of {query.shape[0]} with "
            f"{query.shape[2]} queries and {key.shape[2]} keys (a KV cache?)",
        )
    if attention_mask is not None:
        raise _unsupported_layer(
            module, "it passes an attention mask of its own, which packed attention does not apply"
        )
    if is_causal is False or not getattr(module, "is_causal", True):
        raise _unsupported_layer(module, "it is not causal; only causal attention is supported")
    if dropout:
        raise _unsupported_layer(
            module, f"it has attention dropout {dropout}, and packed attention has none; set it to 0"
        )
    for kwarg, what in _CHANGES_THE_MATHS.items():
        if others.get(kwarg) is not None:
            raise _unsupported_layer(module, f"it has {what} ({kwarg}), which is not supported")
    if torch.compiler.is_compiling():  # the eager first pass has checked it (layers.py)
        return
    pack = active_pack()  # None if a checkpointed layer is recomputed
    for kwarg in () if pack is None else others.keys() - pack.arguments - _IGNORED:
        if others[kwarg] is not None and others[kwarg] is not False:
            raise _unsupported_layer(
                module, f"it passes {kwarg} to its attention function, which packed attention does not support"
            )


def no_mask(
    *_: Any, mask_function: Any = None, use_vmap: bool = False, config: PreTrainedConfig | None = None, **__: Any
) -> None:
    """Build no mask, with transformers' signature.

    Raises UnsupportedModelError if the model adds a mask of its own to the causal one (`use_vmap`, or a bidirectional
    mask function).
    """
    if use_vmap or getattr(mask_function, "__name__", "").startswith("bidirectional"):
        raise UnsupportedModelError(
            f"{getattr(config, 'model_type', 'this model')} adds a mask of its own to the causal one (for images, or "
            "attention in both directions), which packed attention does not support"
        )


# Importing this module changes nothing else in transformers. Registering is idempotent, and the names are new.
AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, no_mask)
