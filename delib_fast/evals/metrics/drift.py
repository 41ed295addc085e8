"""How far the model has moved from its base model on chains of thought and responses."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from delib_fast.data import Row, Segment
from delib_fast.evals.intervals import Estimate, ratio
from delib_fast.evals.scoring import Scorer, adapter_disabled
from delib_fast.models import TrainableLM, eval_mode
from delib_fast.ops import FusedLossHead

CHUNK_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Drift:
    """Distance from the base model on one segment, bootstrap by row."""

    segment: str
    kl: Estimate
    """Mean of KL(base ‖ model), nats per token."""
    base_nll: Estimate
    nll: Estimate
    tokens: int

    @property
    def base_perplexity(self) -> Estimate:
        """exp(base_nll): how unexpected the text is to the base model."""
        nll = self.base_nll
        return replace(nll, value=math.exp(nll.value), low=math.exp(nll.low), high=math.exp(nll.high))


def drift_from_base(
    scorer: Scorer, rows: Sequence[Row], base: TrainableLM | None, *, chunk_tokens: int = CHUNK_TOKENS
) -> list[Drift]:
    """KL divergence from the base model, and the base model's perplexity, on CoTs and responses of these rows.

        kl = mean_t Σ_v π0(v | before t) · (log π0(v | before t) − log π(v | before t))

    Args:
        scorer: the scorer of π, the trained model.
        rows: held-out chats. On rows whose chain of thought the base model wrote, the figure is the drift from the
            base's own reasoning; on other rows it is the distance along the reasoning of those rows.
        base: π0, with the same vocabulary. None for a model with a LoRA adapter: its base is the same model with the
            adapter turned off (one more forward pass, no second model).
        chunk_tokens: number of tokens whose (V,) logits are in memory at a time, for each of the two models.
    Numerics: exact over the vocabulary; log-softmax in float32 (float64 for float64 weights).
    Limitations: whether the text became easier or harder to monitor.
    Raises:
        ValueError: the vocabularies differ; `base` is None and the model has no adapter.
    """
    examples = scorer.encode([row for row in rows if row.kind == "chat"])
    segments = [s for s in (Segment.COT, Segment.RESPONSE) if any((e.segments[1:] == s).any() for e in examples)]
    sums = np.zeros((len(examples), len(Segment), 4))
    models = [scorer.model] if base is None else [scorer.model, base]
    with eval_mode(*models):
        for batch, hidden in scorer.batched_hidden(examples, segments):
            with adapter_disabled(scorer.model) if base is None else contextlib.nullcontext():
                base_hidden = (scorer.model if base is None else base).hidden(batch)
            at = batch.loss_positions
            figures = _compare(
                hidden[at],
                scorer.model.head,
                base_hidden[at],
                (scorer.model if base is None else base).head,
                batch.targets[at],
                chunk_tokens,
            )
            owner = np.searchsorted(np.array(batch.cu_seqlens_host), at.cpu().numpy(), side="right") - 1
            index = np.array(batch.example_ids)[owner], batch.segment_ids[at].cpu().numpy()
            np.add.at(sums, index, np.column_stack([figures, np.ones(len(figures))]))
    return [_figures(segment, sums[:, segment]) for segment in segments]


def _figures(segment: Segment, sums: NDArray[np.float64]) -> Drift:
    kl, base_nll, nll, tokens = sums.T
    return Drift(
        segment.name.lower(), ratio(kl, tokens), ratio(base_nll, tokens), ratio(nll, tokens), int(tokens.sum())
    )


def _compare(
    hidden: Tensor,
    head: FusedLossHead,
    base_hidden: Tensor,
    base_head: FusedLossHead,
    targets: Tensor,
    chunk_tokens: int,
) -> NDArray[np.float64]:
    """(L, 3): for each position KL(base ‖ model), nll under the base, and nll under the model."""
    if head.vocabulary != base_head.vocabulary:
        raise ValueError(
            f"the model has a vocabulary of {head.vocabulary} tokens and the base one of {base_head.vocabulary}; their "
            "predictions cannot be compared"
        )
    parts = []
    for start in range(0, len(hidden), chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        log_p = torch.log_softmax(head.logits(hidden[rows]), dim=-1)
        log_p0 = torch.log_softmax(base_head.logits(base_hidden[rows]), dim=-1)
        target = targets[rows].unsqueeze(1)
        nll, base_nll = -log_p.gather(1, target).squeeze(1), -log_p0.gather(1, target).squeeze(1)
        kl = (log_p0.exp() * log_p.neg_().add_(log_p0)).sum(1)
        parts.append(torch.stack([kl, base_nll, nll], 1))
    return torch.cat(parts).double().cpu().numpy() if parts else np.zeros((0, 3))
