"""Small models and rows for trainers, and the reference loss that ours must equal."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from helpers import small_models
from helpers.small_models import VOCAB

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODELS = ("qwen3", "qwen2 tied", "llama", "mistral sliding", "gemma2, capped logits", "gemma3 text")


def build(name: str = "qwen3") -> PreTrainedModel:
    """A new float32 model in training mode."""
    return small_models.build(name).train()


def rows(lengths=(13, 2, 7, 30, 3, 11), seed: int = 1) -> list[dict[str, list]]:
    """Rows of input_ids, labels with a masked beginning, and soft weights."""
    draw = torch.Generator().manual_seed(seed)
    drawn = []
    for length in lengths:
        ids = torch.randint(0, VOCAB, (length,), generator=draw)
        labels = ids.clone()
        labels[: length // 3] = -100
        drawn.append(
            {
                "input_ids": ids.tolist(),
                "labels": labels.tolist(),
                "loss_weights": torch.rand(length, generator=draw).tolist(),
            }
        )
    return drawn


def padded(some, side: str = "right") -> dict[str, torch.Tensor]:
    """A padded batch. The first token of a row is not a target, because nothing predicts it."""
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
    """Loss over all rows and gradients by transformers alone: eager attention, one row at a time, all logits."""
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
    """The gradient of each parameter that has one, by name."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, theirs, allowed: float = 1e-5) -> None:
    """Compare gradients by name, relative to the largest entry of each."""
    assert ours.keys() == theirs.keys()
    for name, a in ours.items():
        b = theirs[name]
        off = ((a - b).abs().max() / b.abs().max().clamp_min(1e-9)).item()
        assert off <= allowed, f"{name} is off by {off:.1e}"
