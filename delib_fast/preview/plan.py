"""Plan stages by reading, encoding and packing their data, without running the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.console import Group, RenderableType
from rich.table import Table

from delib_fast.checkpoint.format import SingleProcess
from delib_fast.config import AFTConfig, Config, ConfigError, StageConfig, packs_per_rank
from delib_fast.data import PackedDataLoader, PromptSharing, SourceShare, TokenizedDataset
from delib_fast.models import ModelShape, model_shape, ulysses
from delib_fast.preview.dry_run import dry_run
from delib_fast.preview.step_time import mean_work, time_table
from delib_fast.preview.synthetic_lengths import Lengths, parse_lengths, synthetic_examples
from delib_fast.terminal import plain
from delib_fast.training.dataset import RunDataset
from delib_fast.training.memory import GIB, MemoryBudget, MemoryPart, resolve_activation_checkpointing
from delib_fast.training.packs import pack_stage
from delib_fast.training.roofline import Device, TimePart, step_parts

_BARS = 10
_BAR_WIDTH = 30
_MAX_BALANCE_STEPS = 500  # the balance of a stage with more steps is computed from a sample of them


@dataclass(frozen=True)
class StageData:
    """The packed data of a stage."""

    examples: TokenizedDataset
    """The examples of an epoch."""
    batches: PackedDataLoader
    rows: int
    """Rows that were read, including the skipped ones."""
    skipped: dict[str, int]
    """Rows that are not trained on, by reason."""
    first_skipped: dict[str, str]
    """The message about the first of them that is bad, by reason."""
    shares: list[SourceShare]


@dataclass(frozen=True)
class StagePlan:
    """The plan of a stage."""

    stage: StageConfig
    rows: int
    skipped: dict[str, int]
    """Rows that are not trained on, by reason."""
    first_skipped: dict[str, str]
    """The message about the first of them that is bad, by reason."""
    shares: list[SourceShare]
    targets: dict[str, int]
    """Tokens of an epoch that the model predicts, by segment."""
    lengths: NDArray[np.int64]
    """(N,) tokens of each example of an epoch."""
    packs: int
    fill: float
    tokens_per_epoch: int
    """Tokens that the packs of an epoch contain; a shared prompt counts once."""
    steps_per_epoch: int
    steps: int
    ranks: int
    sharing: PromptSharing | None
    """What shared prompts save."""
    no_sharing: str | None
    """Why the model does not allow shared prompts."""
    sequence_parallel: int
    packs_per_rank: int
    """Packs of a step for each rank, or for each group of ranks that splits packs."""
    balance: float
    """Σ over steps of the cost of the slowest rank / Σ of the mean cost of a rank."""
    flops_per_epoch: float
    """FLOPs of forward and backward, without recomputation."""
    attention_share: float
    """Share of these FLOPs in attention."""
    memory: list[MemoryPart]
    time: list[TimePart]
    """Estimated seconds of a step, by part, on a rank with a mean share of the tokens; empty without a device."""
    longest: int | None
    """Estimated tokens of the longest pack that fits in memory; None if not even a short one does."""
    positions: int | None
    """Maximum length of an example that the model is made for (`ModelShape.positions`)."""


def plan_run(
    config: Config,
    lengths: Sequence[str] = (),
    *,
    ranks: int,
    precision: str,
    card_gib: float,
    device: Device | None = None,
) -> tuple[ModelShape, list[StagePlan]]:
    """Plan every stage of a run.

    Args:
        lengths: `--lengths` options. The data of the stages that they name is not read.
        ranks, precision, card_gib, device: see `plan_stage`.
    Raises:
        ConfigError, DataError: see `plan_stage` and `parse_lengths`.
    """
    synthetic = parse_lengths(lengths, config)
    for stage in config.stages:
        packs_per_rank(stage, ranks, config.engine.sequence_parallel)  # raises before any data is read
    with dry_run(config) as dataset:
        reads_data = any(stage.name not in synthetic for stage in config.stages)
        shape = dataset.shape if reads_data else model_shape(config.model, None)
        plans = []
        for stage in config.stages:
            known = synthetic.get(stage.name)
            data = read_stage(dataset, stage) if known is None else synthetic_stage(known, stage, shape, config.seed)
            own = dataset.stage_shape(stage) if known is None else shape
            plans.append(
                plan_stage(data, own, config, stage, ranks=ranks, precision=precision, card_gib=card_gib, device=device)
            )
    return shape, plans


def read_stage(dataset: RunDataset, stage: StageConfig) -> StageData:
    """Read, encode and pack the data of a stage. Raises what training would raise about it."""
    batches = dataset.batches(stage)
    examples, shares = dataset.mixed(stage)
    skipped = dataset.left_out(stage)
    rows = dataset.encoded(stage).counts.rows + sum(n for reason, n in skipped.items() if reason != "over-long")
    return StageData(examples, batches, rows, skipped, dataset.first_left_out(stage), shares)


def synthetic_stage(lengths: Lengths, stage: StageConfig, shape: ModelShape, seed: int) -> StageData:
    """Pack examples of given lengths. Raises what training would raise about them."""
    examples = synthetic_examples(lengths, stage)
    own_prompts = stage.model_copy(update={"share_prompts": "never"})
    batches = pack_stage(own_prompts, examples, shape, seed=seed, ranks=SingleProcess())
    dropped = examples.counts.dropped_over_long
    return StageData(examples, batches, examples.counts.rows, {"over-long": dropped} if dropped else {}, {}, [])


def plan_stage(
    data: StageData,
    shape: ModelShape,
    config: Config,
    stage: StageConfig,
    *,
    ranks: int,
    precision: str,
    card_gib: float = 80.0,
    device: Device | None = None,
) -> StagePlan:
    """Plan a stage.

    Args:
        ranks: number of ranks.
        precision: the resolved `engine.precision`: fp32, bf16 or fp16.
        card_gib: memory of each rank's device in GiB.
        device: the rates of each rank's device, to estimate the time of a step.
    Raises:
        ConfigError: the packs of a step cannot be divided evenly among the ranks, or the attention heads cannot be
            split by `engine.sequence_parallel`.
    """
    parallel = config.engine.sequence_parallel
    step_packs = packs_per_rank(stage, ranks, parallel)
    if reason := ulysses.why_not(shape.heads, shape.kv_heads, parallel):
        raise ConfigError(f"engine.sequence_parallel: {reason}")
    examples, batches, q = data.examples, data.batches, shape.quadratic_cost
    cost = batches.cost_of_epoch(q)
    budget = MemoryBudget(ranks, precision, card_gib)
    resolved = resolve_activation_checkpointing(config, stage, shape, budget)
    work = mean_work(batches, examples, stage, q, ranks=ranks, micro_batches=step_packs)
    return StagePlan(
        stage=stage,
        rows=data.rows,
        skipped=data.skipped,
        first_skipped=data.first_skipped,
        shares=data.shares,
        targets=dict(zip(examples.counts.targets, examples.target_counts.sum(0).tolist(), strict=True)),
        lengths=examples.lengths,
        packs=batches.packs_per_epoch,
        fill=batches.fill,
        tokens_per_epoch=batches.tokens_per_epoch,
        steps_per_epoch=batches.steps_per_epoch,
        steps=batches.num_steps,
        sharing=batches.prompt_sharing,
        no_sharing=shape.no_shared_prompts,
        ranks=ranks,
        sequence_parallel=parallel,
        packs_per_rank=step_packs,
        balance=_balance(batches, ranks // parallel, q),
        flops_per_epoch=6 * shape.layers * shape.attention_width / q * cost,
        attention_share=1 - batches.tokens_per_epoch / cost,
        memory=budget.parts(resolved, stage, shape),
        time=[] if device is None else step_parts(resolved, stage, shape, work, device, ranks, precision),
        longest=longest_pack(config, stage, shape, ranks, precision, card_gib),
        positions=shape.positions,
    )


def _balance(batches: PackedDataLoader, groups: int, quadratic_cost: float) -> float:
    steps = np.arange(batches.num_steps)
    if len(steps) > _MAX_BALANCE_STEPS:
        steps = np.linspace(0, batches.num_steps - 1, _MAX_BALANCE_STEPS).astype(int)
    costs = np.array([batches.cost_of_ranks(step, groups, quadratic_cost) for step in steps.tolist()])
    return float(costs.max(1).sum() / costs.mean(1).sum())


def longest_pack(
    config: Config, stage: StageConfig, shape: ModelShape, ranks: int, precision: str, card_gib: float
) -> int | None:
    """Tokens, in multiples of 1,024, of the longest pack whose estimated memory fits; None if none does."""
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


# --- printing -----------------------------------------------------------------------------------------------


def render_plan(
    plan: StagePlan, card_gib: float, tflops: float | None = None, device: Device | None = None
) -> RenderableType:
    """The plan for a terminal of 80 columns.

    Args:
        card_gib: memory of each rank's device in GiB.
        tflops: TFLOP/s of a rank, from which the hours of training are estimated.
        device: the device of `plan.time`, from which they are estimated instead.
    """
    stage = plan.stage
    return Group(
        plain(f"\n{stage.name} ({stage.kind})", "bold"),
        _facts(plan, tflops),
        *_mix(plan),
        plain(_lengths_title(plan)),
        _histogram(plan),
        plain(f"estimated memory of a rank, of {card_gib:g} GiB"),
        _memory(plan, card_gib),
        *([] if device is None else _time(plan, device)),
    )


def _time(plan: StagePlan, device: Device) -> list[RenderableType]:
    tokens = plan.tokens_per_epoch / plan.steps_per_epoch
    table = time_table(plan.time, tokens=tokens, steps=plan.steps, balance=plan.balance)
    title = f"estimated time of a step on {device.name}, not yet compared with a GPU"
    if isinstance(plan.stage, AFTConfig) and plan.stage.teacher is not None:
        title += "; the teacher's forward pass is not counted"
    return [plain(title), table]


def _grid() -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="left", style="dim", width=12)
    table.add_column(justify="left", max_width=64)
    return table


def _facts(plan: StagePlan, tflops: float | None) -> Table:
    stage, table = plan.stage, _grid()
    out = ", ".join(f"{n:,} {why}" for why, n in plan.skipped.items())
    share = sum(plan.skipped.values()) / plan.rows
    table.add_row("rows", f"{plan.rows:,}" + (f"; skipped {out} ({share:.1%})" if out else "; none skipped"))
    for reason, message in plan.first_skipped.items():
        table.add_row("", plain(f"the first {reason}: {message}"))
    table.add_row(
        "tokens",
        f"{int(plan.lengths.sum()):,} per epoch; targets: "
        + ", ".join(f"{n:,} {name}" for name, n in plan.targets.items() if n),
    )
    table.add_row("packs", f"{plan.packs:,} of {stage.pack_capacity:,} tokens, filled to {plan.fill:.2%}")
    if plan.sharing is not None:
        saved = plan.sharing
        table.add_row(
            "prompts",
            f"{saved.prompts:,} computed once for {saved.examples:,} replies, which saves {saved.tokens:,} "
            f"tokens ({saved.share:.1%})",
        )
    elif plan.no_sharing is not None and stage.share_prompts == "auto":
        table.add_row("prompts", f"not shared between replies: {plan.no_sharing}")
    epochs = f"{stage.epochs} epoch{'s' if stage.epochs > 1 else ''}"
    table.add_row(
        "steps", f"{plan.steps:,} in {epochs}, {plan.steps_per_epoch:,} each, of {stage.tokens_per_step:,} tokens"
    )
    each = ""
    if (parallel := plan.sequence_parallel) > 1:
        each = f", {parallel} per pack" if plan.ranks == parallel else f" in groups of {parallel} that split packs"
    table.add_row(
        "ranks",
        f"{plan.ranks}{each}; packs of each per step: {plan.packs_per_rank}; cost of the slowest: "
        f"{plan.balance:.3f} × the mean",
    )
    hours = "" if tflops is None else f"; {_hours(plan, tflops):,.1f} hours at {tflops:g} TFLOP/s per rank"
    table.add_row(
        "compute", f"{plan.flops_per_epoch:.2e} FLOPs per epoch, {plan.attention_share:.0%} of them in attention{hours}"
    )
    return table


def _hours(plan: StagePlan, tflops: float) -> float:
    """Hours of all steps on the slowest rank. Recomputation is not counted, so `tflops` must account for it."""
    epochs = plan.steps / plan.steps_per_epoch
    return plan.flops_per_epoch * epochs * plan.balance / (plan.ranks * tflops * 1e12) / 3600


def _mix(plan: StagePlan) -> list[RenderableType]:
    if not plan.shares or (len(plan.shares) == 1 and plan.shares[0].times == 1):
        return []
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("source", "examples", "tokens", "times", "share", "requested"):
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
    return [plain("sources of an epoch"), table]


def _lengths_title(plan: StagePlan) -> str:
    longer = 0 if plan.positions is None else int((plan.lengths > plan.positions).sum())
    if not longer:
        return "lengths of the examples"
    which = "1 is longer" if longer == 1 else f"{longer:,} are longer"
    return f"lengths of the examples; {which} than the {plan.positions:,} positions of the model"


def _histogram(plan: StagePlan) -> Table:
    """Ten bars on a logarithmic axis: the number of examples, and their share of the tokens."""
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
        table.add_row(part.name, _gib(part.bytes), plain(part.why, "dim"))
    total = sum(part.bytes for part in plan.memory) / GIB
    fits = (
        f"{total / card_gib:.0%} of the memory"
        if total <= card_gib
        else f"does NOT fit in {card_gib:g} GiB; the error of training suggests a setting"
    )
    table.add_row(plain("total", "bold"), plain(_gib(total * GIB), "bold"), fits)
    if plan.longest is not None:
        longest = "tokens that fit with these settings"
        if plan.positions is not None and plan.positions < plan.longest:
            longest += f"; the model has {plan.positions:,} positions for each example"
        table.add_row("longest pack", f"{plan.longest:,}", plain(longest, "dim"))
    return table


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f} GiB" if size >= GIB / 10 else f"{size / (1 << 20):,.1f} MiB"
