"""The data loader: packed batches of every step of a stage, for one rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from delib_fast.data.encode.tokenized_dataset import NUM_SEGMENTS, Example, TokenizedDataset
from delib_fast.data.pack.batch import PackedBatch, collate_pack, empty_pack
from delib_fast.data.pack.epochs import EpochPlanner, PromptSharing, StageTotals
from delib_fast.data.pack.packing import PackPlan, plan_packs
from delib_fast.data.pack.shared_prompts import bundle, plan_bundles
from delib_fast.data.pack.teacher import TeacherWeights, with_teacher
from delib_fast.data.prefetch import prefetch
from delib_fast.data.rows import Segment


class PackedDataLoader:
    """The packed batches of every step of a stage, for one rank.

    In each epoch every example is in exactly one pack. The packs come in a random order given by the seed and the
    epoch, and `packs_per_step` of them form a step. The last step of an epoch is filled up with empty packs if
    necessary, so that no step mixes epochs. Rank r takes packs r, r + world_size, … of each step. The steps do not
    depend on the world size, so a run can resume with another number of ranks. Under sequence parallelism, a group of
    neighbouring ranks takes the packs that one rank would take, and each pack is sharded across the group.

    Args:
        examples: encoded examples, each at most pack_capacity tokens long.
        pack_capacity: maximum number of tokens of a pack.
        packs_per_step: packs of a global step, a multiple of world_size ÷ sequence_parallel.
        segment_weights: (4,) loss weight of a target, by its `Segment`.
        seed: the order is a pure function of (lengths, seed, epoch, packs_per_step).
        epochs: number of passes over the examples.
        rank: index of this process.
        world_size: number of processes.
        sequence_parallel: number of ranks that a pack is sharded across; divides world_size.
        max_steps: maximum number of steps.
        quadratic_cost: q, where an example of n tokens costs n + q·n² (for a transformer, q is about
            layers × attention width ÷ parameters). If it is above 0 and the costs of packs differ by more than 2 %,
            packs of similar cost share a step, so that no rank waits for the long attention of another. The steps are
            still in random order.
        loss_average: "token" averages the loss over the tokens of a step. "example" scales the weights of each example
            so that all examples of the dataset have the same total weight regardless of their length, times their
            rows' own weights. The total weight of the dataset does not change.
        share_prompts: pack replies to one prompt with the prompt only once, unless that would need more packs.
        teacher: give each pack what its teacher reads (`TokenizedDataset.teacher`), with these loss weights.
    Raises:
        ValueError: packs_per_step cannot be divided evenly among the ranks, an example is longer than the capacity, or
            no target of the dataset has a weight above 0.
    """

    def __init__(
        self,
        examples: Sequence[Example] | TokenizedDataset,
        *,
        pack_capacity: int,
        packs_per_step: int,
        segment_weights: Sequence[float],
        seed: int,
        epochs: int,
        rank: int,
        world_size: int,
        sequence_parallel: int = 1,
        max_steps: int | None = None,
        quadratic_cost: float = 0.0,
        loss_average: Literal["token", "example"] = "token",
        share_prompts: bool = False,
        teacher: TeacherWeights | None = None,
    ) -> None:
        self._teacher = teacher
        self._assignment = _RankAssignment(rank, world_size, sequence_parallel)
        self._assignment.check(packs_per_step)
        self.examples = _tokenized(examples)
        self.rank, self.world_size = rank, world_size
        self.packs_per_step, self.pack_capacity = packs_per_step, pack_capacity
        self._segment_weights = _checked_weights(segment_weights)
        _refuse_nothing_supervised(self.examples, self._segment_weights)
        self.example_weights = self.examples.weights
        """(N,) factor on the loss weight of each target of an example: its row's weight × that of `loss_average`."""
        if loss_average == "example":
            self.example_weights = _equal_example_weights(self.examples, self._segment_weights)
        elif loss_average != "token":
            raise ValueError(f"loss_average is {loss_average!r}; it must be 'token' or 'example'")
        self._planner = EpochPlanner(
            self.examples,
            pack_capacity=pack_capacity,
            packs_per_step=packs_per_step,
            seed=seed,
            quadratic_cost=quadratic_cost,
            share_prompts=share_prompts and self._segment_weights[Segment.PROMPT] == 0,
        )
        first = self._planner.plan(0)[0]
        self.fill = first.fill
        """Share of the packs' capacity that is used."""
        self.packs_per_epoch = first.num_packs
        self.tokens_per_epoch = first.num_tokens
        self.steps_per_epoch = self._planner.steps_per_epoch
        steps = epochs * self.steps_per_epoch
        self.num_steps = steps if max_steps is None else min(steps, max_steps)

    def __len__(self) -> int:
        return self.num_steps

    def step(self, index: int) -> list[PackedBatch]:
        """Collate this rank's packs, or shards of packs, of a global step. Raises IndexError after the last step."""
        plan, packs = self._packs(index)
        return self._assignment.select(
            [partial(self._collate, plan, p) for p in packs],
            self.packs_per_step // self._assignment.num_groups,
            self._taught(empty_pack()),
        )

    def _collate(self, plan: PackPlan, pack: int) -> PackedBatch:
        weights = self._segment_weights, self.example_weights
        return self._taught(collate_pack(self.examples, plan.pack(pack), *weights, plan.pack_continues(pack)))

    def _taught(self, batch: PackedBatch) -> PackedBatch:
        if self._teacher is None:
            return batch
        return with_teacher(batch, self.examples, self.example_weights, self._teacher)

    def from_step(self, first: int, *, pin: bool = False) -> Iterator[list[PackedBatch]]:
        """Yield this rank's packs of each step from `first` on.

        A thread collates the next step while the current one is used, and copies it to pinned memory if `pin` is true.
        """
        steps = (self.step(index) for index in range(first, self.num_steps))
        return prefetch([pack.pin_memory() for pack in packs] if pin else packs for packs in steps)

    def step_example_ids(self, index: int) -> list[int]:
        """Return the indices of the examples of a global step, over all ranks."""
        plan, packs = self._packs(index)
        return [int(i) for p in packs for i in plan.pack(p)]

    @property
    def shares_prompts(self) -> bool:
        """Whether packs share prompts."""
        return self._planner.shares_prompts

    @property
    def teacher_shares(self) -> bool:
        """Whether the stage has a teacher that computes once what several rows of a pack begin with."""
        return self._teacher is not None and self._teacher.share

    @property
    def prompt_sharing(self) -> PromptSharing | None:
        """What prompt sharing saves in an epoch; None without shared prompts."""
        return self._planner.prompt_sharing()

    def totals(self) -> StageTotals:
        """Totals over all steps."""
        return self._planner.totals(self.num_steps)

    def refuse_unsupervised_steps(self) -> None:
        """Raise ValueError if a step has no target with a weight above 0, since its loss would be 0/0.

        A row without a response cannot be encoded, so this only happens if responses or whole rows have weight 0.
        """
        if self._segment_weights[Segment.RESPONSE] > 0 and float(self.examples.weights.min()) > 0:
            return
        targets = self.examples.target_counts[:, self._segment_weights > 0].sum(1)
        step = self._planner.first_step_without((self.examples.weights > 0) & (targets > 0), self.num_steps)
        if step is not None:
            rows = ", ".join(self.examples.location(i) for i in self.step_example_ids(step)[:4])
            raise ValueError(
                f"no token of step {step} is supervised (rows {rows}); give those rows a weight, or raise "
                "tokens_per_step or the weights of the stage"
            )

    def cost_of_ranks(self, index: int, world_size: int, quadratic_cost: float) -> NDArray[np.float64]:
        """Return (world_size,) the cost Σ n + q·n² of the packs of each rank in a global step."""
        packs = self._packs(index)[1]
        costs = self._planner.costs(self.epoch_of(index), quadratic_cost)[packs]
        return np.bincount(np.arange(len(packs)) % world_size, weights=costs, minlength=world_size).astype(np.float64)

    def cost_of_epoch(self, quadratic_cost: float) -> float:
        """Return the cost Σ n + q·n² of all packs of an epoch."""
        return float(self._planner.costs(0, quadratic_cost).sum())

    def epoch_of(self, index: int) -> int:
        """The epoch of a step, from 0."""
        return index // self.steps_per_epoch

    def _packs(self, index: int) -> tuple[PackPlan, NDArray[np.int64]]:
        """Return (the plan of the step's epoch, the indices of the step's packs in it)."""
        if not 0 <= index < self.num_steps:
            raise IndexError(f"step {index} of {self.num_steps}")
        return self._planner.step(index)


def evaluation_batches(
    examples: Sequence[Example] | TokenizedDataset,
    *,
    pack_capacity: int,
    segment_weights: Sequence[float],
    rank: int,
    world_size: int,
    sequence_parallel: int = 1,
    share_prompts: bool = False,
) -> list[PackedBatch]:
    """Collate this rank's packs of all examples, each example once.

    Every rank has the same number of packs, some of which may be empty. The arguments are those of `PackedDataLoader`.
    """
    assignment = _RankAssignment(rank, world_size, sequence_parallel)
    dataset, weights = _tokenized(examples), _checked_weights(segment_weights)
    bundles = bundle(dataset, pack_capacity) if share_prompts and weights[Segment.PROMPT] == 0 else None
    plan = (
        plan_packs(dataset.lengths, pack_capacity) if bundles is None else plan_bundles(bundles, pack_capacity, seed=0)
    )
    return assignment.select(
        [
            partial(collate_pack, dataset, plan.pack(p), weights, dataset.weights, plan.pack_continues(p))
            for p in range(plan.num_packs)
        ],
        -(-plan.num_packs // assignment.num_groups),
        empty_pack(),
    )


def _tokenized(examples: Sequence[Example] | TokenizedDataset) -> TokenizedDataset:
    return examples if isinstance(examples, TokenizedDataset) else TokenizedDataset(examples)


@dataclass(frozen=True)
class _RankAssignment:
    """Which packs of a step a rank takes, and which shard of them: a group of neighbouring ranks shares a pack."""

    rank: int
    world_size: int
    sequence_parallel: int

    def __post_init__(self) -> None:
        if self.world_size < 1 or not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} of world_size {self.world_size} does not exist")
        if self.sequence_parallel < 1 or self.world_size % self.sequence_parallel:
            raise ValueError(f"sequence_parallel {self.sequence_parallel} does not divide world_size {self.world_size}")

    @property
    def num_groups(self) -> int:
        return self.world_size // self.sequence_parallel

    def check(self, packs_per_step: int) -> None:
        """Raise ValueError if the packs of a step cannot be divided evenly among the groups."""
        groups = self.num_groups
        if packs_per_step < 1 or packs_per_step % groups:
            nearest = max(1, round(packs_per_step / groups)) * groups
            what = "ranks" if self.sequence_parallel == 1 else f"groups of {self.sequence_parallel} ranks"
            raise ValueError(
                f"{packs_per_step} packs per step cannot be divided evenly among {groups} {what}: "
                f"set tokens_per_step to a multiple of pack_capacity × {groups} (the nearest is "
                f"{nearest} packs)"
            )

    def select(self, packs: Sequence[Callable[[], PackedBatch]], count: int, empty: PackedBatch) -> list[PackedBatch]:
        """Collate the packs that this rank takes, and append empty packs until there are `count`."""
        group, shard = divmod(self.rank, self.sequence_parallel)
        mine = [collate() for collate in packs[group :: self.num_groups]]
        mine += [empty] * (count - len(mine))
        return mine if self.sequence_parallel == 1 else [pack.shard_of(shard, self.sequence_parallel) for pack in mine]


def _checked_weights(segment_weights: Sequence[float]) -> NDArray[np.float32]:
    weights = np.asarray(segment_weights, np.float32)
    if weights.shape != (NUM_SEGMENTS,) or not np.isfinite(weights).all() or (weights < 0).any():
        raise ValueError(
            f"segment_weights is {list(segment_weights)}; it must be four finite numbers ≥ 0, for "
            "PROMPT, COT, RESPONSE and DOCUMENT"
        )
    return weights


def _equal_example_weights(examples: TokenizedDataset, segment_weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return (N,) row weights × the factor that equalizes the summed weight of the targets of each example."""
    totals = examples.target_counts @ segment_weights.astype(np.float64)
    supervised = totals > 0
    factor = np.zeros(len(totals))
    factor[supervised] = totals[supervised].mean() / totals[supervised]
    return (examples.weights * factor).astype(np.float32)


def _refuse_nothing_supervised(examples: TokenizedDataset, segment_weights: NDArray[np.float32]) -> None:
    targets = examples.target_counts.sum(0)
    if not (targets[segment_weights > 0] > 0).any():
        present = ", ".join(Segment(int(k)).name for k in np.flatnonzero(targets)) or "none"
        raise ValueError(
            f"no token is supervised: segment_weights is {segment_weights.tolist()} (for PROMPT, COT, RESPONSE and "
            f"DOCUMENT), and the segments in the data are {present}"
        )
