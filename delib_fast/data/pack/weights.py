"""Loss weights of segments, and the normalizer of a step."""

from __future__ import annotations

from collections.abc import Iterable

from delib_fast.config import AFTConfig, StageBase
from delib_fast.data.pack.batch import PackedBatch
from delib_fast.data.rows import Segment


def segment_weights(stage: StageBase) -> tuple[float, ...]:
    """Return the loss weight of a target in each `Segment`. Prompts always have weight 0.

    In MSM every other token has weight 1. In AFT a response token has `response_weight`; a CoT token has `cot_weight`
    if the CoT is trained on, and 0 if it is context.
    """
    weights = [0.0] * len(Segment)
    if isinstance(stage, AFTConfig):
        weights[Segment.COT] = stage.cot_weight if stage.cot == "train" else 0.0
        weights[Segment.RESPONSE] = stage.response_weight
        # A general document among AFT rows is trained on as a document.
        weights[Segment.DOCUMENT] = 1.0
    else:
        weights = [1.0] * len(Segment)
        weights[Segment.PROMPT] = 0.0
    return tuple(weights)


def loss_normalizer(micro_batches: Iterable[PackedBatch]) -> float:
    """Sum the loss weights of all targets of these micro-batches, on the host in float64.

    The gradient of a step is divided once by the sum of this over the ranks. Call it before the batches are copied to
    the device, so that it needs no device synchronization.
    """
    return sum(float(batch.loss_weights[batch.loss_positions].double().sum()) for batch in micro_batches)
