"""Loss weights of segments, and the normalizer of a step."""

from __future__ import annotations

from collections.abc import Iterable

from delib_fast.config import AFTConfig, StageBase
from delib_fast.data.pack.batch import PackedBatch
from delib_fast.data.pack.teacher import TeacherWeights
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


def teacher_weights(stage: StageBase, *, share: bool) -> TeacherWeights | None:
    """Return the loss weights of a stage's divergence and nll; None if it has no teacher.

    A document has no divergence, and keeps the weight of its nll.

    Args:
        share: whether the teacher computes once what several rows of a pack begin with.
    """
    if not isinstance(stage, AFTConfig) or stage.teacher is None:
        return None
    divergence = [0.0] * len(Segment)
    divergence[Segment.COT] = stage.teacher.weight * stage.teacher.cot_weight
    divergence[Segment.RESPONSE] = stage.teacher.weight
    nll = [weight * stage.teacher.nll_weight for weight in segment_weights(stage)]
    nll[Segment.DOCUMENT] = segment_weights(stage)[Segment.DOCUMENT]
    return TeacherWeights(tuple(divergence), tuple(nll), share)


def total_weights(stage: StageBase) -> tuple[float, ...]:
    """Return the weight of all losses of a target in each `Segment`: of its nll, and of the divergence."""
    teacher = teacher_weights(stage, share=False)
    if teacher is None:
        return segment_weights(stage)
    return tuple(a + b for a, b in zip(teacher.nll, teacher.divergence, strict=True))


def cot_under_pressure(stage: AFTConfig) -> str:
    """Return what trains the tokens of the chain of thought: "no", "SFT", "distillation" or "SFT and distillation"."""
    weights, teacher = segment_weights(stage), stage.teacher
    has_nll = weights[Segment.COT] > 0 and (teacher is None or teacher.nll_weight > 0)
    kinds = {"SFT": has_nll, "distillation": teacher is not None and teacher.cot_weight > 0}
    return " and ".join(kind for kind, is_used in kinds.items() if is_used) or "no"


def loss_normalizer(micro_batches: Iterable[PackedBatch]) -> float:
    """Sum the loss weights of all targets of these micro-batches, on the host in float64.

    With a teacher, these are the stage's weights (`segment_weights`), not those of its divergence. So the loss is a sum
    per supervised token, whatever is packed together.

    The gradient of a step is divided once by the sum of this over the ranks. Call it before the batches are copied to
    the device, so that it needs no device synchronization.
    """
    weights = (b.loss_weights[b.loss_positions] if b.teacher is None else b.loss_weights for b in micro_batches)
    return sum(float(w.double().sum()) for w in weights)
