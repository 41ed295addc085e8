"""Packs as tensors, and the steps of a stage as packs.

Sizes: T tokens of a pack, N examples in it, L supervised tokens; P packs of an epoch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from delib_fast.data.encode.tokenized_dataset import TokenizedDataset
from delib_fast.data.pack.shared_prompts import sequences_of

IGNORE_INDEX = -100
_TENSORS = ("input_ids", "targets", "loss_weights", "segment_ids", "position_ids", "cu_seqlens", "loss_positions")


@dataclass(frozen=True, slots=True)
class SequenceShard:
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
    shard: SequenceShard | None = None
    """None: the whole pack"""

    @property
    def num_tokens(self) -> int:
        """Tokens that this rank holds (padding of a shared pack not counted)."""
        return self.cu_seqlens_host[-1] if self.shard is None else self.shard.num_tokens

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

    def shard_of(self, rank: int, size: int) -> PackedBatch:
        """The part of a whole pack on the host that rank `rank` of `size` holds: ⌈T / size⌉ tokens, one after another.

        Where size does not divide T, up to size - 1 tokens without a target fill up the last parts: an example of its
        own at the end of `cu_seqlens`, which no other sees.
        """
        assert self.shard is None, "a pack is shared out once"
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
            shard=SequenceShard(rank, size, max(0, min(end, T) - start)),
        )


def collate_pack(
    examples: TokenizedDataset,
    members: NDArray[np.int64],
    weight_of: NDArray[np.float32],
    weights: NDArray[np.float32],
    continues: NDArray[np.bool_] | None = None,
) -> PackedBatch:
    """Put examples into one pack. `weight_of` (4,) is the loss weight of a target by segment, `weights` (N of the
    set,) that of an example; `continues` says of each member whether it shares the prompt of the one before it."""
    runs = sequences_of(examples, members, continues)
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
