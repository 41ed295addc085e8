"""What a stage will do, found by doing all of it but the arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from delib_fast.config import Config, ConfigError, StageConfig, packs_per_rank
from delib_fast.data import PromptSharing, SourceShare
from delib_fast.models import ModelShape, ulysses
from delib_fast.training.dataset import RunDataset
from delib_fast.training.memory import GIB, MemoryBudget, MemoryPart, memory_parts, resolve_activation_checkpointing

_BARS = 10
_BAR_WIDTH = 30
_STEPS_WEIGHED = 500


@dataclass(frozen=True)
class StagePlan:
    """A stage before it is run."""

    stage: StageConfig
    rows: int
    left_out: dict[str, int]
    """rows by reason"""
    shares: list[SourceShare]
    targets: dict[str, int]
    """tokens of an epoch that can be predicted, by segment"""
    lengths: np.ndarray
    packs: int
    fill: float
    tokens_per_epoch: int
    """that packs hold"""
    steps_per_epoch: int
    updates: int
    ranks: int
    sharing: PromptSharing | None
    """what shared prompts save"""
    not_shared: str | None
    """why prompts can't be shared, if the model is why"""
    sequence_parallel: int
    packs_of_a_rank: int
    """packs of a step that a rank (or a group of ranks that share them out) computes"""
    balance: float
    """Σ over steps of the slowest rank's cost / Σ of the mean rank's"""
    flops_per_epoch: float
    """of the model, forward and backward, recomputation not counted"""
    attention_share: float
    """of those FLOPs"""
    memory: list[MemoryPart]
    longest: int | None
    """tokens of the longest pack that fits the card, by the estimate; None where not even a short one does"""


def plan_stage(
    corpus: RunDataset, config: Config, stage: StageConfig, *, ranks: int, precision: str, card_gib: float = 80.0
) -> StagePlan:
    """Read, encode and pack a stage's data. Raises what training would raise about it, and ConfigError where
    the ranks can't share out a step."""
    parallel = config.engine.sequence_parallel
    packs_of_a_rank = packs_per_rank(stage, ranks, parallel)
    if reason := ulysses.why_not(corpus.shape.heads, corpus.shape.kv_heads, parallel):
        raise ConfigError(f"engine.sequence_parallel: {reason}")
    batches = corpus.batches(stage)
    encoded, shares = corpus.mixed(stage)
    q = corpus.shape.quadratic_cost
    steps = (
        range(batches.num_steps)
        if batches.num_steps <= _STEPS_WEIGHED
        else np.linspace(0, batches.num_steps - 1, _STEPS_WEIGHED).astype(int).tolist()
    )
    costs = np.array([batches.cost_of_ranks(step, ranks // parallel, q) for step in steps])
    left_out, counts = corpus.left_out(stage), corpus.encoded(stage).counts
    cost = batches.cost_of_epoch(q)
    products = corpus.shape.layers * corpus.shape.attention_width / q
    return StagePlan(
        stage=stage,
        rows=counts.rows + sum(n for why, n in left_out.items() if why != "over-long"),
        left_out=left_out,
        shares=shares,
        targets=dict(zip(counts.targets, encoded.target_counts.sum(0).tolist(), strict=True)),
        lengths=encoded.lengths,
        packs=batches.packs_per_epoch,
        fill=batches.fill,
        tokens_per_epoch=batches.tokens_per_epoch,
        steps_per_epoch=batches.steps_per_epoch,
        updates=batches.num_steps,
        sharing=batches.prompt_sharing,
        not_shared=corpus.shape.no_shared_prompts,
        ranks=ranks,
        sequence_parallel=parallel,
        packs_of_a_rank=packs_of_a_rank,
        balance=float(costs.max(1).sum() / costs.mean(1).sum()),
        flops_per_epoch=6 * products * cost,
        attention_share=1 - batches.tokens_per_epoch / cost,
        memory=memory_parts(
            resolve_activation_checkpointing(config, stage, corpus.shape, MemoryBudget(ranks, precision, card_gib)),
            stage,
            corpus.shape,
            ranks,
            precision,
        ),
        longest=longest_pack(config, stage, corpus.shape, ranks, precision, card_gib),
    )


def longest_pack(
    config: Config, stage: StageConfig, shape: ModelShape, ranks: int, precision: str, card_gib: float
) -> int | None:
    """Tokens, in multiples of 1,024, of the longest pack whose estimated memory fits a card; None if none does."""

    budget = MemoryBudget(ranks, precision, card_gib)

    def fits(thousands: int) -> bool:
        longer = stage.model_copy(update={"pack_capacity": 1024 * thousands, "tokens_per_step": 1024 * thousands})
        return (
            budget.needs_gib(resolve_activation_checkpointing(config, longer, shape, budget), longer, shape) <= card_gib
        )

    low, high = 0, 1
    while fits(high) and high < 1 << 20:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return 1024 * low or None


# --- telling ------------------------------------------------------------------------------------------------


def render_plan(plan: StagePlan, card_gib: float, tflops: float | None = None) -> RenderableType:
    """The plan in 80 columns; with `tflops` of a rank, also hours."""
    stage = plan.stage
    return Group(
        Text(f"\n{stage.name} ({stage.kind})", "bold"),
        _facts(plan, tflops),
        *_mix(plan),
        Text("lengths of the examples"),
        _histogram(plan),
        Text(f"memory of a rank, estimated, of {card_gib:g} GiB"),
        _memory(plan, card_gib),
    )


def _grid() -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="left", style="dim", width=12)
    table.add_column(justify="left", max_width=64)
    return table


def _facts(plan: StagePlan, tflops: float | None) -> Table:
    stage, table = plan.stage, _grid()
    out = ", ".join(f"{n:,} {why}" for why, n in plan.left_out.items())
    share = sum(plan.left_out.values()) / plan.rows
    table.add_row("rows", f"{plan.rows:,}" + (f"; left out {out} ({share:.1%})" if out else "; none left out"))
    table.add_row(
        "tokens",
        f"{int(plan.lengths.sum()):,} an epoch, as targets: "
        + ", ".join(f"{n:,} {name}" for name, n in plan.targets.items() if n),
    )
    table.add_row("packs", f"{plan.packs:,} of {stage.pack_capacity:,} tokens, filled to {plan.fill:.2%}")
    if plan.sharing is not None:
        saved = plan.sharing
        table.add_row(
            "prompts",
            f"{saved.prompts:,} computed once for {saved.examples:,} replies: {saved.tokens:,} "
            f"tokens fewer ({saved.share:.1%})",
        )
    elif plan.not_shared is not None and stage.share_prompts == "auto":
        table.add_row("prompts", f"not shared between replies: {plan.not_shared}")
    epochs = f"{stage.epochs} epoch{'s' if stage.epochs > 1 else ''}"
    table.add_row(
        "updates", f"{plan.updates:,} in {epochs}, {plan.steps_per_epoch:,} each, of {stage.tokens_per_step:,} tokens"
    )
    each = ""
    if (parallel := plan.sequence_parallel) > 1:
        each = (
            f", {parallel} to a pack" if plan.ranks == parallel else f" in groups of {parallel} that share out a pack"
        )
    table.add_row(
        "ranks",
        f"{plan.ranks}{each}; packs of each a step: {plan.packs_of_a_rank}; the slowest "
        f"costs {plan.balance:.3f} × the mean",
    )
    hours = "" if tflops is None else f"; at {tflops:g} TFLOP/s a rank {_hours(plan, tflops):,.1f} hours in all"
    table.add_row(
        "compute", f"{plan.flops_per_epoch:.2e} FLOPs an epoch, {plan.attention_share:.0%} of them in attention{hours}"
    )
    return table


def _hours(plan: StagePlan, tflops: float) -> float:
    """Of all updates, by the slowest rank; recomputation, if there is any, lowers the rate that is reached."""
    epochs = plan.updates / plan.steps_per_epoch
    return plan.flops_per_epoch * epochs * plan.balance / (plan.ranks * tflops * 1e12) / 3600


def _mix(plan: StagePlan) -> list[RenderableType]:
    if not plan.shares or (len(plan.shares) == 1 and plan.shares[0].times == 1):
        return []
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("source", "examples", "tokens", "shown", "share", "wanted"):
        table.add_column(name, justify="left" if name == "source" else "right", header_style="dim")
    for s in plan.shares:
        table.add_row(
            s.name,
            f"{s.examples:,}",
            f"{s.tokens:,}",
            f"{s.times:.3f}×",
            f"{s.share:.2%}",
            "" if s.wanted is None else f"{s.wanted:.2%}",
        )
    return [Text("an epoch's mix"), table]


def _histogram(plan: StagePlan) -> Table:
    """Ten bars on a logarithmic axis: examples, and how many of the tokens they hold."""
    low, high = int(plan.lengths.min()), int(plan.lengths.max())
    edges = np.unique(np.round(np.geomspace(low, high + 1, _BARS + 1)).astype(int))
    examples, _ = np.histogram(plan.lengths, edges)
    tokens, _ = np.histogram(plan.lengths, edges, weights=plan.lengths)
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(justify="right", width=15)
    table.add_column(width=_BAR_WIDTH)
    table.add_column(justify="right", width=9)
    table.add_column(justify="right", style="dim")
    for k, n in enumerate(examples.tolist()):
        bar = "█" * max(round(_BAR_WIDTH * n / examples.max()), 1 if n else 0)
        table.add_row(f"{edges[k]:,}–{edges[k + 1] - 1:,}", bar, f"{n:,}", f"{tokens[k] / tokens.sum():.0%} of tokens")
    return table


def _memory(plan: StagePlan, card_gib: float) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(width=12)
    table.add_column(justify="right", width=10)
    table.add_column(max_width=50)
    for part in plan.memory:
        table.add_row(part.name, _gib(part.bytes), Text(part.why, "dim"))
    total = sum(part.bytes for part in plan.memory) / GIB
    fits = (
        f"{total / card_gib:.0%} of the card"
        if total <= card_gib
        else f"does NOT fit in {card_gib:g} GiB: training says which setting would"
    )
    table.add_row(Text("in all", "bold"), Text(_gib(total * GIB), "bold"), fits)
    if plan.longest is not None:
        table.add_row("longest pack", f"{plan.longest:,}", Text("tokens that would fit with these settings", "dim"))
    return table


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f} GiB" if size >= GIB / 10 else f"{size / (1 << 20):,.1f} MiB"
