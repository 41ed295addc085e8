"""Attention of packed runs inside a transformers model: one function for every architecture and backend.

transformers looks up its attention by name. Under the name `delib_fast_varlen` it finds `attend`, which
hands the pack to `ops.varlen_attention` with the `cu_seqlens` of the batch, and `no_mask`, so that no mask
is ever built. The names of transformers (`cu_seq_lens_q`, `max_length_q`, …) are translated here and nowhere
else.

What the op can't do is refused by name, before a step or in it. Nothing falls back to an attention that would
let one document read another.
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
from delib_fast.ops import varlen_attention

NAME = "delib_fast_varlen"

_KNOWN_LAYERS = {"full_attention", "sliding_attention"}
_DROPOUT_KEYS = ("attention_dropout", "attn_pdrop", "attn_dropout", "attention_probs_dropout_prob")
# What an attention layer may hand over that changes the maths and that the op does not do.
_CHANGES_THE_MATHS = {
    "softcap": "a cap on the attention scores (attn_logit_softcapping)",
    "s_aux": "attention sinks (s_aux)",
    "position_bias": "a bias on the attention scores (position_bias)",
    "alibi": "a bias on the attention scores (alibi)",
    "cache": "a paged cache",
}


class UnsupportedModelError(ValueError):
    """The model does something that training on packed runs can't do exactly: says what, and what to do."""


def packed_inputs(
    batch: PackedBatch, backend: str = "auto", sequence_group: dist.ProcessGroup | None = None
) -> dict[str, Any]:
    """The keyword arguments with which a transformers model runs a pack: the only place with transformers'
    names."""
    input_ids = batch.input_ids.unsqueeze(0)
    return {
        "input_ids": input_ids,
        "position_ids": batch.position_ids.unsqueeze(0),
        # All ones. It spares a sync: without a mask, transformers looks in the position ids, on the device,
        # for packed runs that we know already. `no_mask` makes nothing of it.
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
    """What in the model's class or config can't be trained on packed runs, with the remedy, or None."""
    config = model.config.get_text_config()
    name = type(model).__name__
    if not model._can_set_attn_implementation():
        return (
            f"{name} does not take its attention from transformers' AttentionInterface, so packed "
            "documents can't be kept apart in it; use an architecture that does, such as qwen3 or llama"
        )
    if getattr(config, "is_encoder_decoder", False):
        return f"{name} is an encoder-decoder; a causal language model is needed"
    if strange := sorted(set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYERS):
        return (
            f"{name} has layers of type {', '.join(strange)}; only full_attention and sliding_attention "
            "keep packed documents apart"
        )
    if getattr(config, "attention_chunk_size", None) is not None and not hasattr(config, "layer_types"):
        return f"{name} has chunked attention (attention_chunk_size), which is not supported"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return f"{name} caps its attention scores (attn_logit_softcapping), which is not supported"
    if getattr(config, "use_bidirectional_attention", None):
        return f"{name} attends in both directions (use_bidirectional_attention); only causal runs work"
    for key in _DROPOUT_KEYS:
        value = getattr(config, key, 0)
        if isinstance(value, int | float) and value > 0:
            return f"{name} has {key} {value}, and packed attention has no dropout; set {key} to 0"
    return None


def why_not_share_prompts(config: PreTrainedConfig, backend: str) -> str | None:
    """Why replies to one prompt can't share it in a pack (`PackedBatch.prefix`) at full speed, or None."""
    text = config.get_text_config()
    types = getattr(text, "layer_types", None)
    slides = "sliding_attention" in types if types else getattr(text, "sliding_window", None) is not None
    if slides:
        return "its attention has a sliding window, which only the slow reference backend takes across a shared prompt"
    if backend == "flash":
        return "model.attention: flash can't merge two attentions in its backward pass, which a shared prompt needs"
    return None


def _refuse(module: nn.Module, why: str) -> UnsupportedModelError:
    location = f"layer {getattr(module, 'layer_idx', '?')} ({type(module).__name__})"
    return UnsupportedModelError(f"{location}: {why}")


def _window(module: nn.Module, sliding_window: int | None) -> int | None:
    """The layer's window; refuses a layer whose config asks for one that does not arrive here.

    Some models (qwen2_moe, phimoe) put their window only into the mask that is not built.
    """
    if torch.compiler.is_compiling():  # asked in the pass before (layers.py); layer_idx would be compiled in
        return sliding_window
    config: PreTrainedConfig | None = getattr(module, "config", None)
    if sliding_window is None and config is not None:
        types, index = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
        if types is not None and index is not None:
            slides = types[index] == "sliding_attention"
        else:
            slides = getattr(config, "sliding_window", None) is not None
        if slides:
            raise _refuse(
                module,
                "its config asks for a sliding window, which this architecture does not "
                "hand to its attention function, so it would be ignored; turn the window "
                "off (use_sliding_window: false, or sliding_window: null)",
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
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    cu_seqlens_host: tuple[int, ...] | None = None,
    varlen_backend: str = "auto",
    varlen_prefix: Sequence[int] | None = None,
    sequence_group: dist.ProcessGroup | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature: (1, H, T, D) in, (1, T, H, D) out.

    sequence_group: ranks that share out the pack's tokens: then T are this rank's, and cu_seqlens the whole pack's.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        raise _refuse(
            module,
            "no cu_seqlens arrived at its attention function, so documents can't be kept "
            "apart. Call the model through delib_fast.models.TrainableLM, or set another "
            "attn_implementation for plain use (TrainableLM.unpatch does)",
        )
    if query.shape[0] != 1 or key.shape[2] != query.shape[2]:
        raise _refuse(
            module,
            f"a pack is one row whose keys are its queries' tokens; this is a batch of "
            f"{query.shape[0]} with {query.shape[2]} queries and {key.shape[2]} keys (a KV "
            "cache?)",
        )
    if attention_mask is not None:
        raise _refuse(module, "it brings an attention mask of its own, which packed attention has no use for")
    if is_causal is False or not getattr(module, "is_causal", True):
        raise _refuse(module, "it is not causal; only causal runs are supported")
    if dropout:
        raise _refuse(module, f"it has attention dropout {dropout}, and packed attention has none; set it to 0")
    for kwarg, what in _CHANGES_THE_MATHS.items():
        if others.get(kwarg) is not None:
            raise _refuse(module, f"it has {what}, which is not supported")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if sequence_group is not None:
        q, k, v = ulysses.to_heads(q, k, v, sequence_group)
    out = varlen_attention(
        q,
        k,
        v,
        cu_seq_lens_q,
        max_length_q,
        scale=scaling,
        window=_window(module, sliding_window),
        cu_seqlens_host=cu_seqlens_host,
        prefix=varlen_prefix,
        backend=varlen_backend,
    )
    if sequence_group is not None:
        out = ulysses.to_tokens(out, sequence_group)
    return out.unsqueeze(0), None


def no_mask(
    *_: Any, mask_function: Any = None, use_vmap: bool = False, config: PreTrainedConfig | None = None, **__: Any
) -> None:
    """transformers' mask signature. `use_vmap` says that the model lays a mask of its own over the causal
    one."""
    if use_vmap or getattr(mask_function, "__name__", "").startswith("bidirectional"):
        raise UnsupportedModelError(
            f"{getattr(config, 'model_type', 'this model')} lays a mask of its own over the causal one (for "
            "images, or attention in both directions), which packed attention does not do"
        )


# Idempotent, and the only thing that importing this module does to transformers: two names that it does not
# use.
AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, no_mask)
