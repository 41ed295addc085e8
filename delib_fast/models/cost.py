"""What a pack costs: the FLOPs that its loss and gradients take, from the model's sizes and the runs' real lengths.

What is counted is what the mathematics needs, whatever a backend does: recomputation, padding and rows of the head
that a slower loss would compute are not in it.

    matrix products    2 a weight and token forward, 2 for the gradient of the input, 2 for that of the weight if it is
                       trained; the head on supervised tokens alone; of experts, those that a token is sent to
    attention          12 · heads · head_dim · (pairs of tokens that see each other), a layer
    nothing else       norms, rotary positions, softmax: not counted
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import nn

from delib_fast.data import PackedBatch
from delib_fast.models.lm import TrainableLM


@dataclass(frozen=True, slots=True)
class StepCost:
    """Coefficients of a model's FLOPs, forward and backward."""

    per_token: float
    per_supervised_token: float
    per_pair: float
    """of one layer"""
    windows: tuple[int | None, ...]
    """tokens that one token sees, a layer; None for all"""

    @staticmethod
    def of(trainable: TrainableLM) -> StepCost:
        config: Any = trainable.model.config.get_text_config()
        head, embedding = trainable.head.weight, trainable.model.get_input_embeddings()
        shared = {id(head), id(getattr(embedding, "weight", None))}
        chosen = getattr(config, "num_experts_per_tok", None) or 1
        experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or chosen
        body = 0.0
        for name, parameter in trainable.model.named_parameters():
            if id(parameter) not in shared and _ndim(parameter) >= 2:
                body += _flops_of(parameter) * (chosen / experts if ".experts." in name else 1)
        layers = config.num_hidden_layers
        heads = config.num_attention_heads
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
        return StepCost(body, _flops_of(head), 12.0 * width, tuple(_window(config, i) for i in range(layers)))

    def flops(self, batches: Iterable[PackedBatch]) -> float:
        """Of these packs; of a part of a pack, its share."""
        total = 0.0
        for batch in batches:
            if batch.is_empty:
                continue
            share = 1 if batch.shard is None else batch.shard.size
            pairs = sum(_pairs(batch, window) for window in self.windows)
            total += (
                self.per_token * batch.num_tokens
                + self.per_supervised_token * batch.num_supervised
                + self.per_pair * pairs / share
            )
        return total


def _pairs(batch: PackedBatch, window: int | None) -> float:
    """Pairs (token, token that it sees) of a pack."""
    lengths = [end - start for start, end in pairwise(batch.cu_seqlens_host)]
    prefix = batch.prefix or (-1,) * len(lengths)
    before: list[int] = []  # tokens that each run continues
    for parent in prefix:
        before.append(before[parent] + lengths[parent] if parent >= 0 else 0)
    total = 0.0
    for n, seen in zip(lengths, before, strict=True):
        last = n + seen
        total += _causal(last, window) - _causal(seen, window)
    return total


def _causal(n: int, window: int | None) -> float:
    if window is None or n <= window:
        return n * (n + 1) / 2
    return window * (window + 1) / 2 + (n - window) * window


def _window(config: Any, layer: int) -> int | None:
    window, types = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    slides = types[layer] == "sliding_attention" if types else getattr(config, "use_sliding_window", True)
    return window if slides else None


def _flops_of(parameter: nn.Parameter) -> float:
    packed: Any = getattr(parameter, "quant_state", None)  # a matrix in 4 bits: its tensor holds several to a number
    numbers = packed.shape.numel() if packed is not None else getattr(parameter, "ds_numel", parameter.numel())
    return (6.0 if parameter.requires_grad else 4.0) * numbers


def _ndim(parameter: nn.Parameter) -> int:
    return len(getattr(parameter, "ds_shape", parameter.shape))
