"""The cost of a pack: the FLOPs of its loss and gradients, from the model's sizes and the real sequence lengths.

Only what the mathematics needs is counted, whatever a backend does: not recomputation, padding, or rows of the head
that a slower loss would compute.

    matrix products    per weight and token: 2 FLOPs forward, 2 for the gradient of the input, and 2 for the gradient of
                       the weight if it is trained; the head on supervised tokens only; of the experts, those that a
                       token is routed to
    attention          per layer: 6 · heads · (head dim of queries and keys + of values) · (pairs of tokens of which one
                       attends to the other)
    not counted        norms, rotary positions, softmax
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import nn

from delib_fast.data import PackedBatch
from delib_fast.models.hf_utils import expert_share
from delib_fast.models.lm import TrainableLM
from delib_fast.models.shape import head_dims


@dataclass(frozen=True, slots=True)
class StepCost:
    """Coefficients of the FLOPs of a model's forward and backward pass."""

    per_token: float
    """FLOPs of all matrix products except the head, for a token."""
    per_supervised_token: float
    """FLOPs of the head, for a token that is a target."""
    per_pair: float
    """FLOPs of one layer's attention, for a pair of tokens."""
    windows: tuple[int | None, ...]
    """For each layer, how many tokens a token attends to; None for all."""
    forward_per_token: float = 0.0
    """FLOPs of the forward pass of all matrix products except the head, for a token."""
    forward_per_supervised_token: float = 0.0
    """FLOPs of the forward pass of the head, for a token that is a target."""
    teacher: StepCost | None = None
    """The coefficients of another model that is the teacher; None if the model is its own teacher, or has none."""

    @staticmethod
    def of(trainable: TrainableLM) -> StepCost:
        """The coefficients of this model. Weights that are frozen now are assumed to be frozen in every step."""
        config: Any = trainable.model.config.get_text_config()
        head, embedding = trainable.head.weight, trainable.model.get_input_embeddings()
        shared = {id(head), id(getattr(embedding, "weight", None))}
        active = expert_share(config)
        body = forward = 0.0
        for name, parameter in trainable.model.named_parameters():
            if id(parameter) not in shared and _ndim(parameter) >= 2:
                share = active if ".experts." in name else 1
                body += _flops_of(parameter) * share
                forward += 2.0 * _weights_of(parameter) * share
        layers = config.num_hidden_layers
        heads = config.num_attention_heads
        width = heads * sum(head_dims(config))
        other = None if trainable.teacher is None else trainable.teacher.model
        return StepCost(
            body,
            _flops_of(head),
            6.0 * width,
            tuple(_window(config, i) for i in range(layers)),
            forward,
            2.0 * _weights_of(head),
            StepCost.of(other) if isinstance(other, TrainableLM) else None,
        )

    def flops(self, batches: Iterable[PackedBatch]) -> float:
        """The FLOPs of these packs, with those of the teacher's forward passes.

        For a shard of a pack, its share of the pack's attention counts.
        """
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
            if batch.teacher is not None:
                total += (self.teacher or self)._forward_flops(batch.teacher.batch, batch.num_supervised)
        return total

    def _forward_flops(self, batch: PackedBatch, num_supervised: int) -> float:
        share = 1 if batch.shard is None else batch.shard.size
        pairs = sum(_pairs(batch, window) for window in self.windows)
        return (
            self.forward_per_token * batch.num_tokens
            + self.forward_per_supervised_token * num_supervised
            + self.per_pair / 3 * pairs / share
        )


def _pairs(batch: PackedBatch, window: int | None) -> float:
    """The number of pairs (token, token that it attends to) of a pack."""
    lengths = [end - start for start, end in pairwise(batch.cu_seqlens_host)]
    prefix = batch.prefix or (-1,) * len(lengths)
    prefix_lengths: list[int] = []  # length of the prefix that each sequence continues
    for parent in prefix:
        prefix_lengths.append(prefix_lengths[parent] + lengths[parent] if parent >= 0 else 0)
    total = 0.0
    for length, prefix_length in zip(lengths, prefix_lengths, strict=True):
        total += _causal_pairs(prefix_length + length, window) - _causal_pairs(prefix_length, window)
    return total


def _causal_pairs(n: int, window: int | None) -> float:
    """The number of pairs in one sequence of n tokens, in which a token attends to itself and to earlier ones."""
    if window is None or n <= window:
        return n * (n + 1) / 2
    return window * (window + 1) / 2 + (n - window) * window


def _window(config: Any, layer: int) -> int | None:
    window, types = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    has_window = types[layer] == "sliding_attention" if types else getattr(config, "use_sliding_window", True)
    return window if has_window else None


def _flops_of(parameter: nn.Parameter) -> float:
    """The FLOPs of a matrix for a token, forward and backward: a frozen one has no gradient of its own."""
    return (6.0 if parameter.requires_grad else 4.0) * _weights_of(parameter)


def _weights_of(parameter: nn.Parameter) -> int:
    # An element of a 4-bit matrix's tensor packs several weights.
    quantized: Any = getattr(parameter, "quant_state", None)
    weights: int = (
        quantized.shape.numel() if quantized is not None else getattr(parameter, "ds_numel", parameter.numel())
    )
    return weights


def _ndim(parameter: nn.Parameter) -> int:
    return len(getattr(parameter, "ds_shape", parameter.shape))
