"""Per-segment sums of the loss, on the device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from delib_fast.data import PackedBatch, Segment
from delib_fast.ops import LossOutput


class Meter:
    """Per-segment sums over micro-batches, on the device, without a host sync.

    Each segment has Σ nll, Σ weight·nll, the number of supervised tokens, the number of those that were predicted
    correctly, and Σ weight. A token whose nll is not finite is excluded, since it would make the sum of all others
    non-finite; the step guard reports it.
    """

    _COLUMNS = ("nll", "weighted_nll", "tokens", "correct", "weight")

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(len(Segment), len(self._COLUMNS), dtype=torch.float64, device=device)

    def add(self, batch: PackedBatch, output: LossOutput) -> None:
        """Add a micro-batch; both arguments are on the meter's device."""
        supervised = batch.loss_positions
        nll, weight = output.nll[supervised].double(), batch.loss_weights[supervised].double()
        finite = nll.isfinite()
        nll = nll.where(finite, 0.0)
        weight = weight.where(finite, 0.0)
        columns = torch.stack(
            [nll, nll * weight, finite.double(), (output.correct[supervised] & finite).double(), weight], dim=1
        )
        self._sums.index_add_(0, batch.segment_ids[supervised].long(), columns)

    @property
    def sums(self) -> Tensor:
        """The sums: (segments, 5) float64, on the device. The columns are those of the class docstring, in order."""
        return self._sums

    def reset(self) -> None:
        """Set all sums to 0."""
        self._sums.zero_()

    def restore(self, sums: list[list[float]]) -> None:
        """Continue from the sums that a checkpoint stores."""
        self._sums.copy_(torch.tensor(sums, dtype=self._sums.dtype))


def segment_report(sums: Tensor) -> dict[str, dict[str, float]]:
    """Mean nll (nats per token), accuracy and token count of each segment that has tokens, from `Meter.sums`."""
    report = {}
    for segment, (nll, _, tokens, correct, _) in zip(Segment, sums.tolist(), strict=True):
        if tokens:
            report[segment.name.lower()] = {"nll": nll / tokens, "accuracy": correct / tokens, "tokens": int(tokens)}
    return report


def weighted_loss(sums: Tensor) -> float | None:
    """The loss that is minimized: Σ weight·nll / Σ weight over `Meter.sums`; None if the total weight is 0."""
    weight = float(sums[:, 4].sum())
    return float(sums[:, 1].sum()) / weight if weight else None


def count_tokens(report: Mapping[str, Mapping[str, float]]) -> int:
    """Number of supervised tokens of all segments of a `segment_report`."""
    return int(sum(part["tokens"] for part in report.values()))
