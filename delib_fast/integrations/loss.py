"""Targets, weights and the denominator of a loss, from what a trainer passes to a model."""

from __future__ import annotations

import torch
from torch import Tensor


def shifted_targets(
    labels: Tensor | None, shifted: Tensor | None, weights: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(targets, weights), both shifted: position t holds the target that it predicts, and its weight.

    Weights are passed aligned with the labels. Raises ValueError if their shapes differ.
    """
    given = shifted if shifted is not None else labels
    assert given is not None
    if weights is not None and weights.shape != given.shape:
        raise ValueError(
            f"loss_weights must have the shape of the labels, {tuple(given.shape)}; it is {tuple(weights.shape)}"
        )
    if shifted is not None:
        return shifted, weights
    targets = torch.full_like(given, -100)
    targets[..., :-1] = given[..., 1:]
    if weights is not None:
        weights = torch.nn.functional.pad(weights[..., 1:], (0, 1))
    return targets, weights


def denominator(
    targets: Tensor, weights: Tensor | None, normalizer: Tensor | float | None, count: Tensor | int | None
) -> Tensor | float:
    """What the sum of losses is divided by: the sum over the whole step if the trainer passes it, else over this call.

    Weights with only num_items_in_batch raise a ValueError, because num_items_in_batch counts labels. Divided by it, a
    loss with weights below 1 would be too small, by a factor that changes from step to step with the share of weighted
    tokens. Divided by the sum of weights of this call alone, it would be too large by the number of accumulated
    batches, since a trainer that passes num_items_in_batch does not divide by that number.
    """
    if normalizer is not None:
        return normalizer.to(targets.device) if isinstance(normalizer, Tensor) else normalizer
    if weights is not None:
        if count is not None:
            raise ValueError(
                "loss_weights were passed with num_items_in_batch, which counts labels and is not the sum of their "
                "weights; also pass loss_normalizer, the sum of loss_weights over all labels of the step on all ranks "
                "(delib_fast.integrations.hf.prepare(trainer) makes a Trainer do so)"
            )
        total = weights.masked_fill(targets == -100, 0).sum()
        return torch.where(total > 0, total, 1)
    if count is not None:
        return count.to(targets.device) if isinstance(count, Tensor) else count
    return (targets != -100).sum().clamp(min=1)
