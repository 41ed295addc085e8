"""How much of the training signal goes to the chain of thought."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from delib_fast.data import Example, Segment, evaluation_batches
from delib_fast.evals.intervals import Estimate, ratio
from delib_fast.evals.scoring import Scorer


@dataclass(frozen=True, slots=True)
class Dose:
    """How much of a stage's loss is on chains of thought."""

    weight_share: Estimate
    """Σ w over CoT targets ÷ Σ w over all targets, bootstrap by row."""
    cot_tokens: int
    """CoT targets with a weight above 0. Each counts once, even if the stage has several epochs."""
    tokens: int
    """All targets with a weight above 0."""


@dataclass(frozen=True, slots=True)
class GradientShare:
    """Norms of the gradients of each segment's loss at the current weights."""

    cot_norm: float
    rest_norm: float
    share: float
    """cot_norm ÷ (cot_norm + rest_norm)."""
    cosine: float
    """Cosine of the angle between the two gradients: whether CoT and response agree on the direction."""
    examples: int


def cot_dose(
    examples: Sequence[Example], segment_weights: Sequence[float], loss_average: Literal["token", "example"] = "token"
) -> Dose:
    """The share of the supervision that is on CoT tokens, under a stage's segment weights.

        dose = Σ_{t in CoT} w_t / Σ_t w_t         w_t = segment_weights[segment of t] · weight of t's row

    With `loss_average` "example", the weights of each example are first scaled so that they sum to its row's weight, as
    in `PackedDataLoader`. The figure is exact and needs no model.

    Limitations: the effect of that supervision. A CoT that the model already predicts contributes no gradient,
    whatever its weight (see `gradient_share`).
    """
    targets = [np.bincount(e.segments[1:], minlength=len(Segment)) for e in examples]
    weights = np.array(
        [counts * np.asarray(segment_weights) * e.weight for counts, e in zip(targets, examples, strict=True)]
    ).reshape(-1, len(Segment))
    if loss_average == "example":
        sums = np.maximum(weights.sum(1, keepdims=True), 1e-30)
        weights = weights / sums * np.array([[e.weight] for e in examples]).reshape(-1, 1)
    supervised = np.array(targets).reshape(-1, len(Segment)) * (np.asarray(segment_weights) > 0)
    share = ratio(weights[:, Segment.COT], weights.sum(1))
    return Dose(share, int(supervised[:, Segment.COT].sum()), int(supervised.sum()))


def gradient_share(scorer: Scorer, examples: Sequence[Example], segment_weights: Sequence[float]) -> GradientShare:
    """The share of the gradient norm that comes from CoT tokens, at the current weights.

        g_seg = ∇ Σ_{t in seg} w_t nll_t        share = ‖g_cot‖ / (‖g_cot‖ + ‖g_rest‖)

    Cost: two backward passes over the examples, and memory for two gradients; meant for a few dozen rows. Existing
    `.grad`s are unchanged. Norms are not additive; the cosine shows how much the gradients overlap.
    """
    parameters = [p for p in scorer.model.parameters() if p.requires_grad]
    of_cot, of_rest = list(segment_weights), list(segment_weights)
    of_cot[Segment.PROMPT] = of_cot[Segment.RESPONSE] = of_cot[Segment.DOCUMENT] = of_rest[Segment.COT] = 0.0
    cot, rest = (_gradient(scorer, examples, weights, parameters) for weights in (of_cot, of_rest))
    norms = [math.sqrt(sum(float(g.double().square().sum()) for g in grads)) for grads in (cot, rest)]
    dot = sum(float((a.double() * b.double()).sum()) for a, b in zip(cot, rest, strict=True))
    total, product = sum(norms), norms[0] * norms[1]
    return GradientShare(
        norms[0],
        norms[1],
        norms[0] / total if total else math.nan,
        dot / product if product else math.nan,
        len(examples),
    )


def _gradient(
    scorer: Scorer, examples: Sequence[Example], weights: Sequence[float], parameters: Sequence[torch.nn.Parameter]
) -> list[torch.Tensor]:
    sums = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
    longest = max(len(e) for e in examples)
    for batch in evaluation_batches(
        examples, pack_capacity=max(scorer.pack_capacity, longest), segment_weights=weights, rank=0, world_size=1
    ):
        if batch.num_supervised:
            loss = scorer.model(batch.to(scorer.device)).loss_sum
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            for total, gradient in zip(sums, found, strict=True):
                if gradient is not None:
                    total += gradient
    return sums
