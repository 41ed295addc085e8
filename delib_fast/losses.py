"""What a token weighs in the loss, what a step is divided by, and what is told of each segment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from delib_fast.config import AFTConfig, StageBase
from delib_fast.data import PackedBatch, Segment
from delib_fast.ops import LossOutput


def segment_weights(stage: StageBase) -> tuple[float, ...]:
    """Loss weight of a token by its segment, indexed by `Segment`: prompts never count.

    In MSM every document token weighs 1. In AFT a response token weighs `response_weight`, a CoT token
    `cot_weight` where the CoT is trained and 0 where it is context.
    """
    weights = [0.0] * len(Segment)
    if isinstance(stage, AFTConfig):
        weights[Segment.COT] = stage.cot_weight if stage.cot == "train" else 0.0
        weights[Segment.RESPONSE] = stage.response_weight
        # A general document among AFT rows is trained as a document.
        weights[Segment.DOCUMENT] = 1.0
    else:
        weights = [1.0] * len(Segment)
        weights[Segment.PROMPT] = 0.0
    return tuple(weights)


def loss_normalizer(micro_batches: Iterable[PackedBatch]) -> float:
    """Σ loss_weights over the targets of these micro-batches, on the host in float64.

    Summed over the ranks of a step it is what the step's gradient is divided by, once. Call it before the
    batches go to the device, so that it costs no sync.
    """
    return sum(float(batch.loss_weights[batch.loss_positions].double().sum()) for batch in micro_batches)


class Meter:
    """Per-segment sums over micro-batches, on the device: no host sync until `totals`.

    Keeps, for each segment, Σ nll, Σ weight·nll, how many supervised tokens, and how many were predicted right.
    """

    _COLUMNS = ("nll", "weighted_nll", "tokens", "correct")

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(len(Segment), len(self._COLUMNS), dtype=torch.float64, device=device)

    def add(self, batch: PackedBatch, output: LossOutput) -> None:
        at = batch.loss_positions
        nll = output.nll[at].double()
        columns = torch.stack([nll, nll * batch.loss_weights[at], torch.ones_like(nll),
                               output.correct[at].double()], dim=1)
        self._sums.index_add_(0, batch.segment_ids[at].long(), columns)

    @property
    def sums(self) -> Tensor:
        return self._sums

    def reset(self) -> None:
        self._sums.zero_()


def segment_report(sums: Tensor) -> dict[str, dict[str, float]]:
    """Mean nll (nats a token), accuracy and token count of each segment that has tokens, from `Meter.sums`."""
    report = {}
    for segment, (nll, _, tokens, correct) in zip(Segment, sums.tolist(), strict=True):
        if tokens:
            report[segment.name.lower()] = {
                "nll": nll / tokens, "accuracy": correct / tokens, "tokens": int(tokens)}
    return report


def weighted_loss(sums: Tensor, normalizer: float) -> float:
    """The loss that was minimised: Σ weight·nll / Σ weight."""
    return float(sums[:, 1].sum()) / normalizer


def tokens_of(report: Mapping[str, Mapping[str, float]]) -> int:
    return int(sum(part["tokens"] for part in report.values()))
