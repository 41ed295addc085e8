"""The packs of a stage."""

from __future__ import annotations

from typing import TYPE_CHECKING

from delib_fast.config import StageConfig
from delib_fast.data import PackedDataLoader, TokenizedDataset, segment_weights, teacher_weights
from delib_fast.models import ModelShape
from delib_fast.training.sources import reraise_as_data_error

if TYPE_CHECKING:
    from delib_fast.checkpoint.format import SingleProcess
    from delib_fast.engine import Ranks


def pack_stage(
    stage: StageConfig,
    examples: TokenizedDataset,
    shape: ModelShape,
    *,
    seed: int,
    ranks: Ranks | SingleProcess,
    teacher_shares: bool = True,
) -> PackedDataLoader:
    """Pack the examples of a stage; each rank gets its own packs.

    Args:
        teacher_shares: whether the stage's teacher can compute once what several rows of a pack begin with.

    Raises:
        DataError: there are fewer steps than the stage's `min_steps`, or a step has nothing to train on.
    """
    with reraise_as_data_error(f"stage {stage.name!r}"):
        batches = PackedDataLoader(
            examples,
            pack_capacity=stage.pack_capacity,
            packs_per_step=stage.packs_per_step,
            segment_weights=segment_weights(stage),
            seed=seed,
            epochs=stage.epochs,
            rank=ranks.rank,
            world_size=ranks.world_size,
            sequence_parallel=ranks.sequence_parallel,
            max_steps=stage.max_steps,
            quadratic_cost=shape.quadratic_cost if stage.balance == "cost" else 0.0,
            loss_average=stage.loss_average,
            share_prompts=stage.share_prompts == "auto" and shape.no_shared_prompts is None,
            teacher=teacher_weights(stage, share=stage.share_prompts == "auto" and teacher_shares),
        )
        refuse_few_steps(stage, batches)
        batches.refuse_unsupervised_steps()
    return batches


def refuse_few_steps(stage: StageConfig, batches: PackedDataLoader) -> None:
    """Raise ValueError, with a tokens_per_step that works, if a stage has fewer steps than its `min_steps`."""
    if batches.num_steps < stage.min_steps:
        tokens = batches.tokens_per_epoch * stage.epochs
        fits = max(1, tokens // (stage.min_steps * stage.pack_capacity)) * stage.pack_capacity
        raise ValueError(
            f"{tokens:,} tokens at {stage.tokens_per_step:,} per step are only {batches.num_steps} steps, fewer than "
            f"min_steps ({stage.min_steps}); set tokens_per_step to about {fits:,}, or train more epochs"
        )
