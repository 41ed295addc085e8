"""Per-segment sums of the loss, on the device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from delib_fast.data import PackedBatch, Segment
from delib_fast.ops import DivergenceOutput, LossOutput


class Meter:
    """Per-segment sums over micro-batches, on the device, without a host sync.

    Each segment has Σ nll, the sum of the weighted losses, the number of supervised tokens, the number of those that
    were predicted correctly (0 with a teacher, whose loss does not count them), and Σ weight; with a teacher also
    Σ divergence and Σ nll of the teacher. A token whose loss is not finite is excluded, since it would make the sum of
    all others non-finite; the step guard reports it.

    Args:
        has_teacher: whether the stage has a teacher.
    """

    _COLUMNS = ("nll", "weighted_loss", "tokens", "correct", "weight")
    _OF_TEACHER = ("divergence", "teacher_nll")

    def __init__(self, device: torch.device, *, has_teacher: bool = False) -> None:
        columns = len(self._COLUMNS) + (len(self._OF_TEACHER) if has_teacher else 0)
        self._sums = torch.zeros(len(Segment), columns, dtype=torch.float64, device=device)

    def add(self, batch: PackedBatch, output: LossOutput | DivergenceOutput) -> None:
        """Add a micro-batch; both arguments are on the meter's device."""
        if isinstance(output, DivergenceOutput):
            self._add_taught(batch, output)
            return
        supervised = batch.loss_positions
        nll, weight = output.nll[supervised].double(), batch.loss_weights[supervised].double()
        finite = nll.isfinite()
        nll = nll.where(finite, 0.0)
        weight = weight.where(finite, 0.0)
        columns = torch.stack(
            [nll, nll * weight, finite.double(), (output.correct[supervised] & finite).double(), weight], dim=1
        )
        self._sums.index_add_(0, batch.segment_ids[supervised].long(), columns)

    def _add_taught(self, batch: PackedBatch, output: DivergenceOutput) -> None:
        assert batch.teacher is not None
        supervised = batch.loss_positions
        nll, divergence, teacher_nll, nll_weight, weight = (
            values[supervised].double()
            for values in (
                output.nll,
                output.divergence,
                output.teacher_nll,
                batch.teacher.nll_weights,
                batch.teacher.divergence_weights,
            )
        )
        finite = nll.isfinite() & divergence.isfinite()
        loss = nll * nll_weight + divergence * weight
        columns = [nll, loss, torch.ones_like(nll), torch.zeros_like(nll), torch.zeros_like(nll), divergence]
        rows = torch.stack([*columns, teacher_nll.nan_to_num()], dim=1).where(finite[:, None], 0.0)
        self._sums.index_add_(0, batch.segment_ids[supervised].long(), rows)
        # The normalizer has the stage's weights of all targets, whether they have a loss or not.
        self._sums[:, 4].index_add_(0, batch.segment_ids.long(), batch.loss_weights.double())

    @property
    def sums(self) -> Tensor:
        """The sums: (segments, 5) float64, or (segments, 7) with a teacher, on the device.

        The columns are those of the class docstring, in order."""
        return self._sums

    def reset(self) -> None:
        """Set all sums to 0."""
        self._sums.zero_()

    def restore(self, sums: list[list[float]]) -> None:
        """Continue from the sums that a checkpoint stores."""
        self._sums.copy_(torch.tensor(sums, dtype=self._sums.dtype))


def segment_report(sums: Tensor) -> dict[str, dict[str, float]]:
    """Mean nll (nats per token), accuracy and token count of each segment that has tokens, from `Meter.sums`.

    With a teacher, the mean divergence from it and its mean nll (nats per token) take the place of the accuracy; a
    document has neither.
    """
    report = {}
    for segment, (nll, _, tokens, correct, _, *of_teacher) in zip(Segment, sums.tolist(), strict=True):
        if tokens:
            part = {"nll": nll / tokens, "tokens": int(tokens)}
            if not of_teacher:
                part = {"nll": nll / tokens, "accuracy": correct / tokens, "tokens": int(tokens)}
            elif segment != Segment.DOCUMENT:
                part |= {"divergence": of_teacher[0] / tokens, "teacher_nll": of_teacher[1] / tokens}
            report[segment.name.lower()] = part
    return report


def weighted_loss(sums: Tensor) -> float | None:
    """The loss that is minimized: Σ weighted losses / Σ weight over `Meter.sums`; None if the total weight is 0."""
    weight = float(sums[:, 4].sum())
    return float(sums[:, 1].sum()) / weight if weight else None


def count_tokens(report: Mapping[str, Mapping[str, float]]) -> int:
    """Number of supervised tokens of all segments of a `segment_report`."""
    return int(sum(part["tokens"] for part in report.values()))
