"""What follows from a configuration and the number of ranks: who computes which packs, and the ZeRO stage.

`ranks_text` is how messages list ranks.
"""

from __future__ import annotations

from collections.abc import Iterable

from delib_fast.config.base import ConfigError
from delib_fast.config.schema import Config, StageBase

REDUCE_BUCKET = 200_000_000
"""Elements of each of the two buffers in which ZeRO 2 on GPUs collects gradients before it sums them over the ranks."""


def effective_zero_stage(config: Config, stage: StageBase, ranks: int, precision: str, *, gpu: bool) -> int:
    """The ZeRO stage that DeepSpeed gets: `engine.zero_stage`, or 1 or 2 if that is 0 in half precision.

    DeepSpeed's half-precision wrapper for stage 0 accumulates gradients in bf16. Stages 1 and 2 accumulate them in
    fp32, and keep fp32 master weights, sharded over the ranks. In bf16, stage 1 holds the whole fp32 gradient on each
    rank, and sums it over the ranks after the backward pass: 4 bytes per parameter, once per step. Stage 2 sums 2 bytes
    per parameter in every micro-batch, on a GPU during the backward pass. It is the default on several GPUs, and
    elsewhere if a rank has at most two micro-batches per step, so that it moves no more bytes.

    Args:
        ranks: the number of ranks.
        precision: the resolved `engine.precision`.
        gpu: whether the ranks compute on GPUs.
    """
    if config.engine.zero_stage > 0 or precision == "fp32":
        return config.engine.zero_stage
    if precision != "bf16" or ranks == 1:
        return 1
    micro_batches = stage.packs_per_step * config.engine.sequence_parallel / ranks
    return 2 if gpu or micro_batches <= 2 else 1


def rank_groups(world_size: int, sequence_parallel: int) -> int:
    """The number of sequence-parallel groups. Raises ConfigError if `sequence_parallel` does not divide the ranks."""
    if world_size % sequence_parallel:
        raise ConfigError(
            f"engine.sequence_parallel is {sequence_parallel}, which does not divide the number of ranks "
            f"({world_size}); start a multiple of {sequence_parallel} ranks, or set it to a divisor of {world_size}"
        )
    return world_size // sequence_parallel


def packs_per_rank(stage: StageBase, world_size: int, sequence_parallel: int = 1) -> int:
    """Packs (or shards of packs) that one rank computes in a step.

    Raises ConfigError if a step's packs cannot be divided evenly among the groups of ranks.
    """
    groups = rank_groups(world_size, sequence_parallel)
    if stage.packs_per_step % groups:
        step = stage.pack_capacity * groups
        nearest_valid = max(1, round(stage.tokens_per_step / step)) * step
        groups_text = f"{groups} ranks" if sequence_parallel == 1 else f"{groups} groups of {sequence_parallel} ranks"
        raise ConfigError(
            f"stage {stage.name!r}: tokens_per_step {stage.tokens_per_step} makes {stage.packs_per_step} packs of "
            f"{stage.pack_capacity} tokens, which cannot be divided evenly among {groups_text}; "
            f"the nearest valid tokens_per_step is {nearest_valid}"
        )
    return stage.packs_per_step // groups


def ranks_text(ranks: Iterable[int]) -> str:
    """Ranks as messages list them: `rank 3`, `ranks 0-2, 5`, or `ranks 0-63`; at most eight runs of them."""
    runs: list[list[int]] = []
    for number in sorted(ranks):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs[:8]) + (", …" if len(runs) > 8 else "")
    return f"rank {text}" if text.isdigit() else f"ranks {text}"
