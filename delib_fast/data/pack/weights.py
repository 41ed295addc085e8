"""Loss weights by segment, and the normalizer of a step."""

from __future__ import annotations

from collections.abc import Iterable

from delib_fast.config import AFTConfig, StageBase
from delib_fast.data.pack.batch import PackedBatch
from delib_fast.data.rows import Segment


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
