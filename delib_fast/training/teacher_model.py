"""The model of a stage's teacher: its weights, which are identified by their hash, and the loaded model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from delib_fast.config import AFTConfig, Config, StageConfig
from delib_fast.training.artifacts import Weights, user_weights
from delib_fast.training.distillation import naming, other_teacher, teacher_key

if TYPE_CHECKING:
    from delib_fast.models import Teacher
    from delib_fast.training.context import RunContext


def teacher_model(run: RunContext, stage: StageConfig) -> Weights | None:
    """The weights of another model that is a stage's teacher; None without one. A collective.

    Raises ConfigError if they are the export of a run, and were changed since, or cannot be converted.
    """
    teacher = other_teacher(run.config, stage)
    return None if teacher is None else user_weights(run, teacher.path, key=teacher_key(stage))


def build_teacher(run: RunContext, config: Config, stage: StageConfig, **options: Any) -> Teacher | None:
    """The teacher of a stage; None if it has none. Each rank builds another model for itself, without a collective.

    Args:
        config: the run's configuration with `engine.precision` resolved.
        options: those of the `TrainableLM` that is trained.
    """
    from delib_fast.models import Teacher, TrainableLM, build_model

    if not isinstance(stage, AFTConfig) or stage.teacher is None:
        return None
    direction, other = stage.teacher.direction, other_teacher(config, stage)
    if other is None:
        return Teacher("base" if stage.teacher.model == "base" else "self", direction)
    with naming(teacher_key(stage)):
        model = build_model(other, run.dataset.tokenizer, dtype=config.engine.precision)
    model.requires_grad_(False)
    return Teacher(TrainableLM(model.to(run.ranks.device), **options).eval(), direction)  # type: ignore[arg-type]
