"""Small models of several architectures, packs, and the ground truth: transformers alone, one document at a time.

Heavy packages are imported inside the functions, so that collecting the tests does not import them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from delib_fast.data import PackedBatch


def tiny_qwen3(**changes: Any) -> dict[str, Any]:
    """The architecture of the smallest model that runs, evaluations and studies use in tests."""
    return {
        "model_type": "qwen3",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        **changes,
    }


VOCAB = 96
# Weights large enough that attention and MLP matter: with the default 0.02 a tiny model is almost linear.
_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [3.0, 4.0, 6.0, 8.0],
    "original_max_position_embeddings": 12,
    "factor": 8.0,
}
ARCHITECTURES = {
    "qwen2": {"model_type": "qwen2"},
    "qwen2 tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "qwen3 tied, one kv head": {
        "model_type": "qwen3",
        "head_dim": 16,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    },
    "qwen3 sliding": {
        "model_type": "qwen3",
        "head_dim": 16,
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
    },
    "llama": {"model_type": "llama"},
    "llama long rope": {
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "mistral sliding": {"model_type": "mistral", "sliding_window": 5, "head_dim": 8},
    "qwen3 moe": {
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
    },
    # These change the logits after the head; caps and factors are strong enough to matter.
    "gemma2, capped logits": {
        "model_type": "gemma2",
        "head_dim": 16,
        "attn_logit_softcapping": 1.5,
        "sliding_window": 6,
        "final_logit_softcapping": 2.0,
        "query_pre_attn_scalar": 8,
    },
    "cohere, scaled logits": {"model_type": "cohere", "logit_scale": 0.3},
    "granite, divided logits": {"model_type": "granite", "logits_scaling": 3.0},
    "phi, a head with a bias": {"model_type": "phi", "num_key_value_heads": 4},
    "gemma3 text": {
        "model_type": "gemma3_text",
        "head_dim": 8,
        "sliding_window": 6,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "gpt-oss, sinks": {
        "model_type": "gpt_oss",
        "head_dim": 16,
        "sliding_window": 6,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "mimo, sinks and small values": {
        "model_type": "mimo_v2_flash",
        "head_dim": 16,
        "v_head_dim": 8,
        "swa_head_dim": 16,
        "swa_v_head_dim": 8,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "sliding_window": 6,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
    },
    "deepseek v3, small values": {
        "model_type": "deepseek_v3",
        "kv_lora_rank": 8,
        "q_lora_rank": 12,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    # The rotary frequencies of these change within the lengths of the documents below.
    "phi3, longrope": {
        "model_type": "phi3",
        "original_max_position_embeddings": 12,
        "rope_parameters": LONGROPE,
    },
    "phimoe, longrope": {
        "model_type": "phimoe",
        "num_local_experts": 4,
        "sliding_window": None,
        "router_jitter_noise": 0.0,
        "input_jitter_noise": 0.0,
        "rope_parameters": LONGROPE | {"short_mscale": 1.1, "long_mscale": 1.3},
    },
    "llama, dynamic rope": {
        "model_type": "llama",
        "max_position_embeddings": 10,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    },
    "gemma3, dynamic rope in some layers": {
        "model_type": "gemma3_text",
        "head_dim": 8,
        "sliding_window": 6,
        "query_pre_attn_scalar": 8,
        "max_position_embeddings": 10,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        },
    },
}
LENGTHS = (13, 1, 7, 30, 2, 11)


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """A new float32 model of one of `ARCHITECTURES`, in training mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    keys = dict(_SMALL, **ARCHITECTURES[name])
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**keys), dtype=torch.float32)
    for module_name, parameter in model.named_parameters():
        if "norm" in module_name or module_name == "lm_head.bias":  # all ones (or zeros) would hide a missing one
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def documents(lengths: Sequence[int] = LENGTHS, seed: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(tokens, loss weight of each token as a target) of each document: soft weights, with zeros at the beginning."""
    draw = torch.Generator().manual_seed(seed)
    drawn = []
    for length in lengths:
        weights = torch.rand(length, generator=draw)
        weights[: length // 3] = 0
        drawn.append((torch.randint(0, VOCAB, (length,), generator=draw), weights))
    return drawn


def pack(docs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> PackedBatch:
    """The documents as one pack without padding."""
    from delib_fast.data import PackedBatch

    lengths = [len(tokens) for tokens, _ in docs]
    bounds = tuple(accumulate(lengths, initial=0))
    ends = torch.tensor(bounds[1:]) - 1
    input_ids = torch.cat([tokens for tokens, _ in docs])
    targets, weights = input_ids.roll(-1), torch.cat([w for _, w in docs]).roll(-1)
    targets[ends], weights[ends] = -100, 0.0
    return PackedBatch(
        input_ids=input_ids,
        targets=targets,
        loss_weights=weights,
        segment_ids=torch.full_like(input_ids, 2, dtype=torch.int8),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        max_seqlen=max(lengths),
        loss_positions=(weights > 0).nonzero().squeeze(-1),
        cu_seqlens_host=bounds,
        example_ids=tuple(range(len(docs))),
    )


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The gradient of each parameter by name; None for one that has none."""
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def ground_truth(model: PreTrainedModel, docs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """nll of every target and gradients of the weighted sum: transformers' eager attention, unpacked, full logits.

    Every document gets a new model, because some rotary embeddings remember the longest text that they have seen.
    """
    nlls = []
    grads: dict[str, torch.Tensor] = dict.fromkeys(gradients(model))
    for tokens, weights in docs:
        alone = copy.deepcopy(model)
        alone.set_attn_implementation("eager")
        nll = torch.zeros(len(tokens))
        if len(tokens) > 1:
            logits = alone(input_ids=tokens[None], use_cache=False).logits[0, :-1]
            nll[:-1] = F.cross_entropy(logits, tokens[1:], reduction="none")
            (nll[:-1] * weights[1:]).sum().backward()
        nlls.append(nll.detach())
        for name, grad in gradients(alone).items():
            if grad is not None:
                grads[name] = grad if grads[name] is None else grads[name] + grad
    return torch.cat(nlls), grads


def ours(model: PreTrainedModel, batches: Sequence[PackedBatch], **kwargs):
    """nll and gradients of TrainableLM over some packs, under the names of the unwrapped model."""
    from delib_fast.models import TrainableLM

    trainable = TrainableLM(copy.deepcopy(model), **kwargs)
    trainable.train()
    nlls = []
    for batch in batches:
        output = trainable(batch)
        output.loss_sum.backward()
        nlls.append(output.nll)
    return torch.cat(nlls), gradients(trainable.model)


def largest_deviation(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest relative difference of a gradient, and the name of its parameter."""
    assert ours.keys() == theirs.keys()
    deviations = []
    for name, a in ours.items():
        b = theirs[name]
        if b is None or not b.any():  # an expert that no token is routed to
            assert a is None or not a.any(), name
            continue
        deviations.append((((a - b).abs().max() / b.abs().max()).item(), name))
    return max(deviations)
