"""Packed batches of every step of a stage, for one rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from delib_fast.data.encode.tokenized_dataset import NUM_SEGMENTS, Example, TokenizedDataset
from delib_fast.data.pack.batch import PackedBatch, collate_pack, empty_pack
from delib_fast.data.pack.epochs import EpochPlanner, PromptSharing, Seen
from delib_fast.data.pack.packing import PackPlan, plan_packs
from delib_fast.data.pack.shared_prompts import bundle, plan_bundles
from delib_fast.data.prefetch import prefetch
from delib_fast.data.rows import Segment


class PackedDataLoader:
    """The steps of a stage: which packs each has, and this rank's share of them.

    An epoch packs every example exactly once; its packs come in an order drawn from seed and epoch, cut into
    steps of `packs_per_step`. The last step of an epoch may be short and is filled up with empty packs, so
    that no step mixes epochs. Rank r takes packs r, r + world_size, … of each step: the steps themselves do
    not depend on the world size, and a run goes on with more or fewer ranks. With sequence parallelism, groups
    of neighbouring ranks take the place of ranks, and those of a group share out each of its packs.

    Args:
        examples: encoded examples, each at most pack_capacity long.
        pack_capacity: tokens a pack may hold.
        packs_per_step: packs of a global step, a multiple of world_size.
        segment_weights: (4,) loss weight of a target by its `Segment`.
        seed: the order is a pure function of (lengths, seed, epoch, packs_per_step).
        epochs: how often every example is seen.
        rank, world_size: this process and how many there are.
        sequence_parallel: ranks that share out a pack's tokens; divides world_size.
        max_steps: end after this many steps.
        quadratic_cost: q, where an example of n tokens costs n + q·n² (for a transformer about
            layers × attention width / parameters). Above 0, packs of like cost share a step (where costs
            differ by more than 2 %), so that no rank
            waits for another one's long attention; the order of the steps stays shuffled.
        loss_average: over the "token"s of a step, or over its "example"s: then the weights of each example are
            scaled so that all examples of the set weigh the same (but for their rows' own weights), however
            long they are; the set's total weight stays.
        share_prompts: let replies to one prompt share it in a pack, where that makes no more packs.
    Raises:
        ValueError: packs_per_step can't be shared out over the ranks; an example is longer than the capacity;
            or no example of the whole set has a target with a weight above 0.
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
    ) -> None:
        self._share = _Share(rank, world_size, sequence_parallel)
        self._share.check(packs_per_step)
        self.examples = _encoded(examples)
        self.rank, self.world_size = rank, world_size
        self.packs_per_step, self.pack_capacity = packs_per_step, pack_capacity
        self._weight_of = _weight_table(segment_weights)
        _check_something_supervised(self.examples, self._weight_of)
        self._weights = self.examples.weights
        if loss_average == "example":
            self._weights = _example_weights(self.examples, self._weight_of)
        elif loss_average != "token":
            raise ValueError(f"loss_average is {loss_average!r}; it must be 'token' or 'example'")
        self._epochs = EpochPlanner(
            self.examples,
            pack_capacity=pack_capacity,
            packs_per_step=packs_per_step,
            seed=seed,
            quadratic_cost=quadratic_cost,
            share_prompts=share_prompts and self._weight_of[Segment.PROMPT] == 0,
        )
        first = self._epochs.plan(0)[0]
        self.fill = first.fill
        self.packs_per_epoch = first.num_packs
        self.tokens_per_epoch = first.num_tokens
        self.steps_per_epoch = self._epochs.steps_per_epoch
        steps = epochs * self.steps_per_epoch
        self.num_steps = steps if max_steps is None else min(steps, max_steps)

    def __len__(self) -> int:
        return self.num_steps

    def step(self, index: int) -> list[PackedBatch]:
        """This rank's packs (or parts of packs) of a global step, packs_per_step / groups of ranks of them."""
        plan, locations = self._packs(index)
        return self._share.of(
            [
                partial(
                    collate_pack, self.examples, plan.pack(p), self._weight_of, self._weights, plan.pack_continues(p)
                )
                for p in locations
            ],
            self.packs_per_step // self._share.groups,
        )

    def from_step(self, first: int, *, pin: bool = False) -> Iterator[list[PackedBatch]]:
        """This rank's packs of each step from `first` on, the next step's made in a thread of its own while the one at
        hand is trained on. `pin` puts them into pinned memory there."""
        made = (self.step(index) for index in range(first, self.num_steps))
        return prefetch([pack.pin_memory() for pack in packs] if pin else packs for packs in made)

    def step_example_ids(self, index: int) -> list[int]:
        """The examples of a global step, over all ranks."""
        plan, locations = self._packs(index)
        return [int(i) for p in locations for i in plan.pack(p)]

    @property
    def shares_prompts(self) -> bool:
        return self._epochs.shares_prompts

    @property
    def prompt_sharing(self) -> PromptSharing | None:
        """None where no prompt is shared."""
        return self._epochs.prompt_sharing()

    def seen(self) -> Seen:
        """What all the steps together see."""
        return self._epochs.seen(self.num_steps)

    def first_step_without(self, wanted: NDArray[np.bool_]) -> int | None:
        """The first step that holds no example of those wanted (N,), or None."""
        return self._epochs.first_step_without(wanted, self.num_steps)

    @property
    def example_weights(self) -> NDArray[np.float32]:
        """(N,) factor on the loss weight of each target of an example: its row's, and that of `loss_average`."""
        return self._weights

    def cost_of_ranks(self, index: int, world_size: int, quadratic_cost: float) -> NDArray[np.float64]:
        """(world_size,) Σ n + q·n² over the packs that each rank takes of a global step."""
        locations = self._packs(index)[1]
        costs = self._epochs.costs(self.epoch_of(index), quadratic_cost)[locations]
        return np.bincount(np.arange(len(locations)) % world_size, weights=costs, minlength=world_size).astype(
            np.float64
        )

    def cost_of_epoch(self, quadratic_cost: float) -> float:
        """Σ n + q·n² over the packs of an epoch."""
        return float(self._epochs.costs(0, quadratic_cost).sum())

    def epoch_of(self, index: int) -> int:
        return index // self.steps_per_epoch

    def _packs(self, index: int) -> tuple[PackPlan, NDArray[np.int64]]:
        """The plan of a step's epoch, and which of its packs are the step's."""
        if not 0 <= index < self.num_steps:
            raise IndexError(f"step {index} of {self.num_steps}")
        return self._epochs.step(index)


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
    """This rank's share of all examples, each once; equally many packs on every rank (empty ones fill up)."""
    share = _Share(rank, world_size, sequence_parallel)
    encoded = _encoded(examples)
    weight_of = _weight_table(segment_weights)
    shares = share_prompts and weight_of[Segment.PROMPT] == 0
    bundles = bundle(encoded, pack_capacity) if shares else None
    plan = (
        plan_packs(encoded.lengths, pack_capacity) if bundles is None else plan_bundles(bundles, pack_capacity, seed=0)
    )
    return share.of(
        [
            partial(collate_pack, encoded, plan.pack(p), weight_of, encoded.weights, plan.pack_continues(p))
            for p in range(plan.num_packs)
        ],
        -(-plan.num_packs // share.groups),
    )


def _encoded(examples: Sequence[Example] | TokenizedDataset) -> TokenizedDataset:
    return examples if isinstance(examples, TokenizedDataset) else TokenizedDataset(examples)


class _Share:
    """Which packs a rank takes, and which part of them: neighbouring ranks form a group that shares out a pack."""

    def __init__(self, rank: int, world_size: int, sequence_parallel: int) -> None:
        if world_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of world_size {world_size} does not exist")
        if sequence_parallel < 1 or world_size % sequence_parallel:
            raise ValueError(f"sequence_parallel {sequence_parallel} does not divide world_size {world_size}")
        self._size = sequence_parallel
        self.groups = world_size // sequence_parallel
        self._group, self._rank = divmod(rank, sequence_parallel)

    def check(self, packs_per_step: int) -> None:
        if packs_per_step < 1 or packs_per_step % self.groups:
            nearest = max(1, round(packs_per_step / self.groups)) * self.groups
            what = "ranks" if self._size == 1 else f"groups of {self._size} ranks"
            raise ValueError(
                f"{packs_per_step} packs a step can't be shared out evenly over {self.groups} {what}: "
                f"set tokens_per_step to a multiple of pack_capacity × {self.groups} (the nearest is "
                f"{nearest} packs)"
            )

    def of(self, packs: Sequence[Callable[[], PackedBatch]], number: int) -> list[PackedBatch]:
        """`number` packs for this rank; only those that it takes are made, and empty ones fill up."""
        mine = [make() for make in packs[self._group :: self.groups]]
        mine += [empty_pack() for _ in range(number - len(mine))]
        return mine if self._size == 1 else [pack.shard_of(self._rank, self._size) for pack in mine]


def _weight_table(segment_weights: Sequence[float]) -> NDArray[np.float32]:
    table = np.asarray(segment_weights, np.float32)
    if table.shape != (NUM_SEGMENTS,) or not np.isfinite(table).all() or (table < 0).any():
        raise ValueError(
            f"segment_weights is {list(segment_weights)}: four finite numbers ≥ 0 are needed, for "
            "PROMPT, COT, RESPONSE and DOCUMENT"
        )
    return table


def _example_weights(examples: TokenizedDataset, weight_of: NDArray[np.float32]) -> NDArray[np.float32]:
    """Row weights times a factor that makes Σ weight over the targets of each example the same."""
    totals = examples.target_counts @ weight_of.astype(np.float64)
    learnt = totals > 0
    factor = np.zeros(len(totals))
    factor[learnt] = totals[learnt].mean() / totals[learnt]
    return (examples.weights * factor).astype(np.float32)


def _check_something_supervised(examples: TokenizedDataset, weight_of: NDArray[np.float32]) -> None:
    targets = examples.target_counts.sum(0)
    if not (targets[weight_of > 0] > 0).any():
        present = np.flatnonzero(targets).tolist()
        raise ValueError(
            f"no token is supervised: segment_weights is {weight_of.tolist()} and the data has "
            f"only segments {present} (0 prompt, 1 CoT, 2 response, 3 document)"
        )
