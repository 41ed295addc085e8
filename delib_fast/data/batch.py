"""Packs as tensors, and the steps of a stage as packs.

Sizes: T tokens of a pack, N examples in it, L supervised tokens; P packs of an epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from delib_fast.data.ahead import ahead
from delib_fast.data.encoded_set import NUM_SEGMENTS, EncodedSet, Example
from delib_fast.data.epochs import Epochs, PromptSharing, Seen
from delib_fast.data.packing import PackPlan, plan_packs
from delib_fast.data.rows import Segment
from delib_fast.data.shared_prompts import bundle, plan_bundles, runs_of

IGNORE_INDEX = -100
_TENSORS = ("input_ids", "targets", "loss_weights", "segment_ids", "position_ids", "cu_seqlens", "loss_positions")


@dataclass(frozen=True, slots=True)
class Part:
    """Which part of a pack a batch holds, where several ranks share out its tokens."""

    rank: int
    size: int
    """ranks that share the pack"""
    num_tokens: int
    """tokens of this part, the padding at the end of the pack not counted"""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedBatch:
    """One pack: N runs one after another, no padding between them. A run is an example; or, where several replies
    share a prompt, the prompt, and behind it a run a reply (shared_prompts.py).

    Where sequence parallelism shares a pack out (`part`), every (T,) tensor and `loss_positions` are this rank's
    tokens alone; `cu_seqlens`, `max_seqlen`, `example_ids` and `prefix` stay those of the whole pack.
    """

    input_ids: Tensor
    """(T,) int64"""
    targets: Tensor
    """(T,) int64, already shifted; -100 on the last token of every run"""
    loss_weights: Tensor
    """(T,) float32, by segment of the target × weight of its row; 0 where there is no target"""
    segment_ids: Tensor
    """(T,) int8, `Segment` of the *target* (PROMPT where there is none)"""
    position_ids: Tensor
    """(T,) int64, restarts with every run, or goes on from the prompt that it continues"""
    cu_seqlens: Tensor
    """(N+1,) int32, [0, …, T]"""
    max_seqlen: int
    """longest run, a Python int: no device sync"""
    loss_positions: Tensor
    """(L,) int64, rising: where there is a target and its weight is above 0; found on the host"""
    cu_seqlens_host: tuple[int, ...]
    """cu_seqlens again, where it costs no sync"""
    example_ids: tuple[int, ...]
    """(N,) index of each run's example in its set, -1 for a shared prompt; empty in a pack that only fills up a step"""
    prefix: tuple[int, ...] | None = None
    """(N,) the run that each run continues, or -1, as of `ops.varlen_attention`; None where no prompt is shared"""
    part: Part | None = None
    """None: the whole pack"""

    @property
    def num_tokens(self) -> int:
        """Tokens that this rank holds (padding of a shared pack not counted)."""
        return self.cu_seqlens_host[-1] if self.part is None else self.part.num_tokens

    @property
    def num_supervised(self) -> int:
        return len(self.loss_positions)

    @property
    def is_empty(self) -> bool:
        """A pack that only fills up a step: one token, nothing to learn."""
        return not self.example_ids

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> PackedBatch:
        """The batch on a device; the copies overlap with compute if the batch is in pinned memory."""
        moved = {name: getattr(self, name).to(device, non_blocking=non_blocking) for name in _TENSORS}
        return replace(self, **moved)

    def pin_memory(self) -> PackedBatch:
        return replace(self, **{name: getattr(self, name).pin_memory() for name in _TENSORS})

    def part_of(self, rank: int, size: int) -> PackedBatch:
        """The part of a whole pack on the host that rank `rank` of `size` holds: ⌈T / size⌉ tokens, one after another.

        Where size does not divide T, up to size - 1 tokens without a target fill up the last parts: an example of its
        own at the end of `cu_seqlens`, which no other sees.
        """
        assert self.part is None, "a pack is shared out once"
        T = self.num_tokens
        share = -(-T // size)
        start, end, padding = rank * share, (rank + 1) * share, size * share - T

        def cut(tensor: Tensor, filler: Tensor) -> Tensor:
            return torch.cat([tensor[start:end], filler[max(0, start - T) : max(0, end - T)]])

        zeros, borders, prefix = self.input_ids.new_zeros(padding), self.cu_seqlens_host, self.prefix
        if padding:
            borders, prefix = (*borders, size * share), None if prefix is None else (*prefix, -1)
        at = self.loss_positions
        return replace(
            self,
            input_ids=cut(self.input_ids, zeros),
            targets=cut(self.targets, zeros + IGNORE_INDEX),
            loss_weights=cut(self.loss_weights, zeros.float()),
            segment_ids=cut(self.segment_ids, zeros.char()),
            position_ids=cut(self.position_ids, torch.arange(padding)),
            loss_positions=at[(at >= start) & (at < end)] - start,
            cu_seqlens=torch.tensor(borders, dtype=torch.int32),
            cu_seqlens_host=borders,
            max_seqlen=max(self.max_seqlen, padding),
            prefix=prefix,
            part=Part(rank, size, max(0, min(end, T) - start)),
        )


def assemble(
    examples: EncodedSet,
    members: NDArray[np.int64],
    weight_of: NDArray[np.float32],
    weights: NDArray[np.float32],
    continues: NDArray[np.bool_] | None = None,
) -> PackedBatch:
    """Put examples into one pack. `weight_of` (4,) is the loss weight of a target by segment, `weights` (N of the
    set,) that of an example; `continues` says of each member whether it shares the prompt of the one before it."""
    runs = runs_of(examples, members, continues)
    lengths = runs.ends - runs.begins
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    T = int(cu_seqlens[-1])
    positions = np.arange(T) - np.repeat(cu_seqlens[:-1] - runs.begins, lengths)
    last = cu_seqlens[1:] - 1
    ids, own_segments = examples.gather(runs.examples, runs.begins, runs.ends)
    input_ids = ids.astype(np.int64)
    targets, segments = np.empty_like(input_ids), np.empty_like(own_segments)
    targets[:-1], segments[:-1] = input_ids[1:], own_segments[1:]
    targets[last], segments[last] = IGNORE_INDEX, 0
    loss_weights = weight_of[segments] * np.repeat(weights[runs.examples], lengths)
    loss_weights[last] = 0
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids),
        targets=torch.from_numpy(targets),
        loss_weights=torch.from_numpy(loss_weights),
        segment_ids=torch.from_numpy(segments),
        position_ids=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        max_seqlen=int(lengths.max()),
        loss_positions=torch.from_numpy(np.flatnonzero(loss_weights)),
        cu_seqlens_host=tuple(cu_seqlens.tolist()),
        example_ids=tuple(runs.ids.tolist()),
        prefix=runs.prefix,
    )


def empty_pack() -> PackedBatch:
    """One run of one token without a target: it takes part in collectives and adds nothing to the loss."""
    return PackedBatch(
        input_ids=torch.zeros(1, dtype=torch.int64),
        targets=torch.full((1,), IGNORE_INDEX, dtype=torch.int64),
        loss_weights=torch.zeros(1),
        segment_ids=torch.zeros(1, dtype=torch.int8),
        position_ids=torch.zeros(1, dtype=torch.int64),
        cu_seqlens=torch.tensor([0, 1], dtype=torch.int32),
        max_seqlen=1,
        loss_positions=torch.zeros(0, dtype=torch.int64),
        cu_seqlens_host=(0, 1),
        example_ids=(),
    )


class PackedBatches:
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
        examples: Sequence[Example] | EncodedSet,
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
        self._epochs = Epochs(
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
        plan, places = self._packs(index)
        return self._share.of(
            [
                partial(assemble, self.examples, plan.pack(p), self._weight_of, self._weights, plan.pack_continues(p))
                for p in places
            ],
            self.packs_per_step // self._share.groups,
        )

    def from_step(self, first: int, *, pin: bool = False) -> Iterator[list[PackedBatch]]:
        """This rank's packs of each step from `first` on, the next step's made in a thread of its own while the one at
        hand is trained on. `pin` puts them into pinned memory there."""
        made = (self.step(index) for index in range(first, self.num_steps))
        return ahead([pack.pin_memory() for pack in packs] if pin else packs for packs in made)

    def step_example_ids(self, index: int) -> list[int]:
        """The examples of a global step, over all ranks."""
        plan, places = self._packs(index)
        return [int(i) for p in places for i in plan.pack(p)]

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
        places = self._packs(index)[1]
        costs = self._epochs.costs(self.epoch_of(index), quadratic_cost)[places]
        return np.bincount(np.arange(len(places)) % world_size, weights=costs, minlength=world_size).astype(np.float64)

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
    examples: Sequence[Example] | EncodedSet,
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
            partial(assemble, encoded, plan.pack(p), weight_of, encoded.weights, plan.pack_continues(p))
            for p in range(plan.num_packs)
        ],
        -(-plan.num_packs // share.groups),
    )


def _encoded(examples: Sequence[Example] | EncodedSet) -> EncodedSet:
    return examples if isinstance(examples, EncodedSet) else EncodedSet(examples)


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
        return mine if self._size == 1 else [pack.part_of(self._rank, self._size) for pack in mine]


def _weight_table(segment_weights: Sequence[float]) -> NDArray[np.float32]:
    table = np.asarray(segment_weights, np.float32)
    if table.shape != (NUM_SEGMENTS,) or not np.isfinite(table).all() or (table < 0).any():
        raise ValueError(
            f"segment_weights is {list(segment_weights)}: four finite numbers ≥ 0 are needed, for "
            "PROMPT, COT, RESPONSE and DOCUMENT"
        )
    return table


def _example_weights(examples: EncodedSet, weight_of: NDArray[np.float32]) -> NDArray[np.float32]:
    """Row weights times a factor that makes Σ weight over the targets of each example the same."""
    totals = examples.target_counts @ weight_of.astype(np.float64)
    learnt = totals > 0
    factor = np.zeros(len(totals))
    factor[learnt] = totals[learnt].mean() / totals[learnt]
    return (examples.weights * factor).astype(np.float32)


def _check_something_supervised(examples: EncodedSet, weight_of: NDArray[np.float32]) -> None:
    targets = examples.target_counts.sum(0)
    if not (targets[weight_of > 0] > 0).any():
        present = np.flatnonzero(targets).tolist()
        raise ValueError(
            f"no token is supervised: segment_weights is {weight_of.tolist()} and the data has "
            f"only segments {present} (0 prompt, 1 CoT, 2 response, 3 document)"
        )
