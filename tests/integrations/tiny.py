"""Tiny models and rows for trainers, and the stock loss that ours must equal."""

from __future__ import annotations

import copy

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 96
_KEYS = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
MODELS = {
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "qwen2 tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "llama": {"model_type": "llama"},
    "mistral sliding": {"model_type": "mistral", "sliding_window": 5, "head_dim": 8},
    "gemma2 capped": {
        "model_type": "gemma2",
        "head_dim": 8,
        "attn_logit_softcapping": None,
        "sliding_window": 6,
        "final_logit_softcapping": 2.0,
        "query_pre_attn_scalar": 8,
    },
    "gemma3 text": {
        "model_type": "gemma3_text",
        "head_dim": 8,
        "sliding_window": 6,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


def build(name: str = "qwen3", **keys) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**_KEYS, **MODELS[name], **keys})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()


def rows(lengths=(13, 2, 7, 30, 3, 11), seed: int = 1) -> list[dict[str, list]]:
    """input_ids, labels with a masked beginning, soft weights."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for length in lengths:
        ids = torch.randint(0, VOCAB, (length,), generator=draw)
        labels = ids.clone()
        labels[: length // 3] = -100
        found.append(
            {
                "input_ids": ids.tolist(),
                "labels": labels.tolist(),
                "loss_weights": torch.rand(length, generator=draw).tolist(),
            }
        )
    return found


def padded(some, side: str = "right") -> dict[str, torch.Tensor]:
    """One row each; the first token of a row is no target, as wherever it has nothing before it."""
    S = max(len(row["input_ids"]) for row in some)
    batch = {
        "input_ids": torch.zeros(len(some), S, dtype=torch.int64),
        "labels": torch.full((len(some), S), -100),
        "attention_mask": torch.zeros(len(some), S, dtype=torch.int64),
        "loss_weights": torch.zeros(len(some), S),
    }
    for i, row in enumerate(some):
        n = len(row["input_ids"])
        at = slice(0, n) if side == "right" else slice(S - n, S)
        batch["attention_mask"][i, at] = 1
        for key in ("input_ids", "labels", "loss_weights"):
            batch[key][i, at] = torch.tensor(row[key])
        batch["labels"][i, at.start] = -100
    return batch


def alone(model: PreTrainedModel, some, weighted: bool = False) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss over all rows and its gradients: stock model, eager attention, one row at a time, all logits."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    total, norm = torch.zeros(()), 0.0
    for row in some:
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])[1:]
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        nll = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
        weights = torch.tensor(row["loss_weights"])[1:] if weighted else torch.ones(len(labels))
        total = total + (nll * weights).sum()
        norm += weights[labels != -100].sum().item()
    (total / norm).backward()
    return (total / norm).detach(), gradients(model)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, theirs, allowed: float = 1e-5) -> None:
    """Gradients by name, relative to the largest of each."""
    assert ours.keys() == theirs.keys()
    for name, a in ours.items():
        b = theirs[name]
        off = ((a - b).abs().max() / b.abs().max().clamp_min(1e-9)).item()
        assert off <= allowed, f"{name} is off by {off:.1e}"
