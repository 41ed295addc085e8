"""Every causal LM of transformers, shrunk from its default config to a model that runs in milliseconds.

Sizes shrink, and everything that chooses a code path stays: kinds of layers, activations, scalings, caps, windows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VOCAB = 96
TOKENS = 88
"""Ids below this are text in every model: not special, and neither in the padding of a vocabulary."""


def _each(names: str, size: int) -> dict[str, int]:
    return dict.fromkeys(names.split(), size)


# Sizes by the names that configs give them. A config's own number remains where it is smaller.
_SIZES: dict[str, int] = {
    **_each(
        "vocab_size vocab_size_per_layer_input audio_vocab_size decoder_vocab_size ngram_vocab_size_base "
        "shape_vocab_size pronunciation_vocab_size n_words",
        VOCAB,
    ),
    **_each("unpadded_vocab_size", VOCAB - 6),
    **_each(
        "hidden_size d_model n_embd dim model_dim embedding_size attention_hidden_size input_embedding_size embed_dim "
        "emb_dim backbone_hidden_size hidden_size_global adapter_in_dim adapter_out_dim",
        32,
    ),
    **_each(
        "intermediate_size ffn_dim ffn_hidden_size decoder_ffn_dim encoder_ffn_dim d_ff dim_ff n_inner "
        "intermediate_size_mlp",
        48,
    ),
    **_each(
        "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size "
        "moe_shared_expert_intermediate_size shared_experts_intermediate_size",
        16,
    ),
    **_each(
        "num_attention_heads n_head num_heads n_heads decoder_attention_heads encoder_attention_heads attention_heads "
        "swa_num_attention_heads linear_num_heads linear_num_value_heads num_local_experts num_experts "
        "n_routed_experts moe_num_experts num_routed_experts index_topk",
        4,
    ),
    **_each(
        "num_key_value_heads swa_num_key_value_heads num_kv_heads linear_num_key_heads num_global_key_value_heads "
        "num_experts_per_tok num_experts_per_token moe_topk moe_k topk_group n_group num_expert_group",
        2,
    ),
    **_each(
        "head_dim swa_head_dim attention_head_dim d_kv dim_head kv_channels v_head_dim swa_v_head_dim "
        "linear_key_head_dim linear_value_head_dim mamba_d_head linear_head_dim mamba_head_dim mamba_headdim "
        "index_head_dim global_head_dim qk_nope_head_dim mamba_d_state state_size ssm_state_size mamba_n_heads "
        "mamba_num_heads",
        8,
    ),
    **_each("qk_rope_head_dim rotary_dim floor_scale log_scaling_n_floor attention_chunk_size mamba_chunk_size", 4),
    **_each("q_lora_rank kv_lora_rank o_lora_rank", 12),
    **_each("max_position_embeddings n_positions max_seq_len model_max_length max_target_positions", 128),
    **_each("sliding_window sliding_window_size window_size attention_window", 6),
    **_each("mamba_n_groups n_groups", 1),
}
NOT_BUILT = {
    "gemma3n": "transformers needs the package timm for its images",
    "gemma4_assistant": "transformers cannot create it from its default config; it drafts tokens for another model",
    "musicgen": "transformers cannot create it from its default config; it generates audio",
    "musicgen_melody": "transformers cannot create it from its default config; it generates audio",
}
"""Architectures that cannot be built here."""
# What the sizes above cannot express.
_EXTRA: dict[str, dict[str, Any]] = {
    # Defaults that are not a valid model.
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "xmod": {"default_language": "en_XX"},
    # Layers of each kind.
    "lfm2": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "dory": {
        "num_hidden_layers": 4,
        "n_input_layers": 1,
        "n_recurrent_layers": 2,
        "n_output_layers": 1,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
        "intermediate_size": [48] * 4,
    },
    # Sizes that depend on each other.
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "lsh"]},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "mamba2": {"num_heads": 8},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
        }
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_hidden_layers": 5,
        "layers_block_type": ["linear_attention", "hybrid"] * 2 + ["linear_attention"],
    },
    "zamba2": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "n_mamba_heads": 8,
    },
}
_EXTRA["dots3_note_text"] = {"head_dim": 16}
_EXTRA["dots3_note"] = {
    "text_config": _EXTRA["dots3_note_text"],
    "audio_config": {"adapter_input_size": 32},
}
_EXTRA["qwen4_exp"] = {"text_config": _EXTRA["qwen4_exp_text"]}


def small_config(model_type: str) -> Any:
    """The default config of the model type with small sizes, and without dropout."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    return config_class(**_shrunk(config_class(), _EXTRA.get(model_type, {})))


def build(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A new float32 model in training mode, with weights large enough that every layer matters."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(small_config(model_type), dtype=torch.float32)
    assert sum(parameter.numel() for parameter in model.parameters()) < 3e6, "not small"
    for name, parameter in model.named_parameters():
        if "A_log" in name:  # decay rates have a range of their own
            continue
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
        elif name.rpartition(".")[2] == "bias":
            torch.nn.init.normal_(parameter, std=0.1)
        else:  # all ones (or zeros) would hide a missing one
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.train()


def _shrunk(default: Any, extra: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the config's class that make it small."""
    from transformers import PreTrainedConfig

    keys = {key: value for key, value in default.to_dict().items() if not key.startswith("_")}
    changes: dict[str, Any] = {}
    for key, value in keys.items():
        part = vars(default).get(key)
        if isinstance(part, PreTrainedConfig):
            changes[key] = _shrunk(part, extra.get(key, {})) | (
                {"model_type": part.model_type} if part.model_type else {}
            )
        elif isinstance(value, int) and not isinstance(value, bool):
            if value > _SIZES.get(key, value):
                changes[key] = _SIZES[key]
            elif key.endswith(("_token_id", "_token_index")):
                changes[key] = VOCAB - 1
        elif isinstance(value, float) and any(word in key for word in ("drop", "jitter")):
            changes[key] = 0.0
    heads = "num_attention_heads"
    for kv in ("num_key_value_heads", "num_kv_heads"):
        if isinstance(keys.get(kv), int) and keys[kv] == keys.get(heads):
            changes[kv] = changes.get(heads, keys[heads])
    if keys.get("qk_rope_head_dim") and keys.get("head_dim") == keys["qk_rope_head_dim"]:
        changes["head_dim"] = changes["qk_rope_head_dim"]
    changes |= _layers(keys)
    if "per_layer_config" in changes:
        changes["per_layer_config"] = {
            index: {key: changes[key] * value // keys[key] if key in changes else value for key, value in layer.items()}
            for index, layer in changes["per_layer_config"].items()
        }
    return changes | {k: v for k, v in extra.items() if not isinstance(vars(default).get(k), PreTrainedConfig)}


_DEPTHS = _each(
    "num_hidden_layers n_layer num_layers n_layers decoder_layers encoder_layers num_decoder_layers num_blocks depth", 2
)


def _layers(keys: dict[str, Any]) -> dict[str, Any]:
    """The number of layers, and what the config lists for each layer: at least two, and one of each kind."""
    depth = next((keys[key] for key in _DEPTHS if isinstance(keys.get(key), int)), 0)
    lists = {key: value for key, value in keys.items() if isinstance(value, list) and len(value) == depth > 3}
    kinds = [str(kind) for kind in zip(*lists.values(), strict=True)]
    chosen = sorted(kinds.index(kind) for kind in set(kinds))[:6]
    chosen += [index for index in range(depth) if index not in chosen][: max(0, min(2, depth) - len(chosen))]
    chosen.sort()
    changes: dict[str, Any] = {key: len(chosen) for key in _DEPTHS if isinstance(keys.get(key), int)}
    if "per_layer_config" in keys:
        others = {int(index): layer for index, layer in keys["per_layer_config"].items()}
        changes["per_layer_config"] = {new: others[old] for new, old in enumerate(chosen) if old in others}
    return changes | {key: [value[index] for index in chosen] for key, value in lists.items()}
