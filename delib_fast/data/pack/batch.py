"""A pack as tensors.

Sizes: T tokens of a pack, N sequences in it, L supervised tokens.
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
    """Which shard of a pack's tokens a batch contains under sequence parallelism."""

    rank: int
    """Index of the shard."""
    size: int
    """Number of ranks that a pack is sharded across."""
    num_tokens: int
    """Tokens of this shard, without the padding at the end of the pack."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedBatch:
    """A pack: N concatenated sequences without padding between them.

    A sequence is an example. Where several replies share a prompt, the prompt is a sequence, and each reply is a
    sequence that continues it (shared_prompts.py).

    Under sequence parallelism (`shard` is set), every (T,) tensor and `loss_positions` contain this rank's tokens only;
    `cu_seqlens`, `max_seqlen`, `example_ids` and `prefix` describe the whole pack.
    """

    input_ids: Tensor
    """(T,) int64."""
    targets: Tensor
    """(T,) int64, already shifted; -100 at the last token of every sequence."""
    loss_weights: Tensor
    """(T,) float32, weight of the target's segment × weight of the example; 0 where there is no target."""
    segment_ids: Tensor
    """(T,) int8, `Segment` of the *target*; PROMPT where there is none."""
    position_ids: Tensor
    """(T,) int64, from 0 in every sequence, or continued from the prompt that it continues."""
    cu_seqlens: Tensor
    """(N+1,) int32, the boundaries of the sequences: [0, …, T]."""
    max_seqlen: int
    """Tokens of the longest sequence; a Python int, so that it needs no device synchronization."""
    loss_positions: Tensor
    """(L,) int64, ascending positions of targets with a weight above 0."""
    cu_seqlens_host: tuple[int, ...]
    """The values of `cu_seqlens` on the host, so that reading them needs no device synchronization."""
    example_ids: tuple[int, ...]
    """(N,) index of each sequence's example in its dataset, -1 for a shared prompt; () for an empty pack."""
    prefix: tuple[int, ...] | None = None
    """(N,) the sequence that each one continues, or -1, as in `ops.varlen_attention`; None without shared prompts."""
    shard: SequenceShard | None = None
    """None for a whole pack."""
    teacher: TeacherPack | None = None
    """What the stage's teacher reads; `loss_positions` are then those of `TeacherPack.rows`. None without a teacher."""

    @property
    def num_tokens(self) -> int:
        """Number of this rank's tokens, without padding."""
        return self.cu_seqlens_host[-1] if self.shard is None else self.shard.num_tokens

    @property
    def num_supervised(self) -> int:
        """Number of targets with a weight above 0."""
        return len(self.loss_positions)

    @property
    def is_empty(self) -> bool:
        """Whether this is an `empty_pack`, which only fills up a step."""
        return not self.example_ids

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> PackedBatch:
        """Copy the batch to a device. From pinned memory the copies overlap with computation."""
        moved = {name: getattr(self, name).to(device, non_blocking=non_blocking) for name in _TENSORS}
        teacher = None if self.teacher is None else self.teacher.to(device, non_blocking=non_blocking)
        return replace(self, **moved, teacher=teacher)

    def pin_memory(self) -> PackedBatch:
        """Copy the batch to pinned host memory."""
        teacher = None if self.teacher is None else self.teacher.pin_memory()
        return replace(self, **{name: getattr(self, name).pin_memory() for name in _TENSORS}, teacher=teacher)

    def shard_of(self, rank: int, size: int) -> PackedBatch:
        """Return shard `rank` of `size`: ⌈T / size⌉ consecutive tokens. The batch must be a whole pack on the host.

        If size does not divide T, up to size - 1 padding tokens without a target fill the last shards. They form a
        sequence of their own at the end of `cu_seqlens`.
        """
        assert self.shard is None, "the batch is already a shard"
        T = self.num_tokens
        shard_size = -(-T // size)
        start, end, padding = rank * shard_size, (rank + 1) * shard_size, size * shard_size - T

        def cut(tensor: Tensor, filler: Tensor) -> Tensor:
            return torch.cat([tensor[start:end], filler[max(0, start - T) : max(0, end - T)]])

        zeros = self.input_ids.new_zeros(padding)
        boundaries, prefix = self.cu_seqlens_host, self.prefix
        if padding:
            boundaries = (*boundaries, size * shard_size)
            prefix = None if prefix is None else (*prefix, -1)
        positions = self.loss_positions
        own = (positions >= start) & (positions < end)
        teacher = self.teacher
        if teacher is not None:
            teacher = TeacherPack(
                teacher.batch.shard_of(rank, size),
                teacher.rows[own],
                cut(teacher.divergence_weights, zeros.float()),
                cut(teacher.nll_weights, zeros.float()),
            )
        return replace(
            self,
            input_ids=cut(self.input_ids, zeros),
            targets=cut(self.targets, zeros + IGNORE_INDEX),
            loss_weights=cut(self.loss_weights, zeros.float()),
            segment_ids=cut(self.segment_ids, zeros.to(torch.int8)),
            position_ids=cut(self.position_ids, torch.arange(padding)),
            loss_positions=positions[own] - start,
            cu_seqlens=torch.tensor(boundaries, dtype=torch.int32),
            cu_seqlens_host=boundaries,
            max_seqlen=max(self.max_seqlen, padding),
            prefix=prefix,
            shard=SequenceShard(rank, size, max(0, min(end, T) - start)),
            teacher=teacher,
        )


@dataclass(frozen=True, slots=True)
class TeacherPack:
    """What the teacher of a pack reads, and the weights of what the student learns from it (teacher.py)."""

    batch: PackedBatch
    """The teacher's sequences, without targets. Under sequence parallelism, this rank's shard of them."""
    rows: Tensor
    """(L,) int64: for each of the student's `loss_positions`, the position in the teacher's whole pack whose hidden
    state predicts the same token; 0 in documents, which have no teacher."""
    divergence_weights: Tensor
    """(T,) float32: the weight of the divergence at each of the student's targets."""
    nll_weights: Tensor
    """(T,) float32: the weight of the nll of each of the student's targets."""

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> TeacherPack:
        """Copy the tensors to a device."""
        tensors = (self.rows, self.divergence_weights, self.nll_weights)
        moved = (tensor.to(device, non_blocking=non_blocking) for tensor in tensors)
        return TeacherPack(self.batch.to(device, non_blocking=non_blocking), *moved)

    def pin_memory(self) -> TeacherPack:
        """Copy the tensors to pinned host memory."""
        tensors = (self.rows, self.divergence_weights, self.nll_weights)
        return TeacherPack(self.batch.pin_memory(), *(tensor.pin_memory() for tensor in tensors))


def collate_pack(
    examples: TokenizedDataset,
    indices: NDArray[np.int64],
    segment_weights: NDArray[np.float32],
    example_weights: NDArray[np.float32],
    continues: NDArray[np.bool_] | None = None,
) -> PackedBatch:
    """Concatenate examples into one pack, on the host.

    Args:
        examples: the dataset.
        indices: (M,) indices of the examples of the pack.
        segment_weights: (4,) loss weight of a target, by its segment.
        example_weights: (number of examples in the dataset,) factor on the loss weight of each of an example's targets.
        continues: (M,) whether each example shares the prompt of the one before it.
    """
    sequences = sequences_of(examples, indices, continues)
    lengths = sequences.ends - sequences.begins
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    T = int(cu_seqlens[-1])
    positions = np.arange(T) - np.repeat(cu_seqlens[:-1] - sequences.begins, lengths)
    last = cu_seqlens[1:] - 1
    ids, own_segments = examples.gather(sequences.examples, sequences.begins, sequences.ends)
    input_ids = ids.astype(np.int64)
    targets, segments = np.empty_like(input_ids), np.empty_like(own_segments)
    targets[:-1], segments[:-1] = input_ids[1:], own_segments[1:]
    targets[last], segments[last] = IGNORE_INDEX, 0
    loss_weights = segment_weights[segments] * np.repeat(example_weights[sequences.examples], lengths)
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
        example_ids=tuple(sequences.example_ids.tolist()),
        prefix=sequences.prefix,
    )


def empty_pack() -> PackedBatch:
    """Return a pack of one token without a target. It takes part in collectives and adds nothing to the loss."""
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
