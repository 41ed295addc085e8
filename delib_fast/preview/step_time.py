"""The estimated time of a planned step: what a rank computes in it, and its table."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.table import Table

from delib_fast.config import StageConfig
from delib_fast.data import PackedDataLoader, TokenizedDataset
from delib_fast.data.pack.weights import segment_weights
from delib_fast.terminal import plain
from delib_fast.training.roofline import StepWork, TimePart


def mean_work(
    batches: PackedDataLoader,
    examples: TokenizedDataset,
    stage: StageConfig,
    quadratic_cost: float,
    *,
    ranks: int,
    micro_batches: int,
) -> StepWork:
    """What a rank computes in a step, on average over an epoch."""
    weights = np.array(segment_weights(stage))
    share = 1 / (batches.steps_per_epoch * ranks)
    quadratic = (batches.cost_of_epoch(quadratic_cost) - batches.tokens_per_epoch) / quadratic_cost
    return StepWork(
        tokens=batches.tokens_per_epoch * share,
        supervised=float(examples.target_counts.sum(0)[weights > 0].sum()) * share,
        pairs=quadratic / 2 * share,
        micro_batches=micro_batches,
    )


def time_table(parts: Sequence[TimePart], *, tokens: float, steps: int, balance: float) -> Table:
    """The share of each part of a step, and the time of a step and of all steps.

    Args:
        tokens: tokens of a step over all ranks.
        balance: cost of the slowest rank / the mean cost.
    """
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(width=12)
    table.add_column(justify="right", width=10)
    table.add_column(max_width=50)
    total = sum(part.seconds for part in parts) * balance
    for part in parts:
        table.add_row(part.name, f"{part.seconds * balance / total:.1%}", plain(part.why, "dim"))
    table.add_row(
        plain("total", "bold"),
        plain(f"{total:,.2f} s" if total >= 1 else f"{total * 1e3:,.1f} ms", "bold"),
        plain(f"{tokens / total:,.0f} tokens/s over all ranks, {total * steps / 3600:,.1f} h in all", "dim"),
    )
    return table
