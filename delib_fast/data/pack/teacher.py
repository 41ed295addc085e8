"""What the teacher of a pack reads: its rows with the spec, in which each shared beginning is computed once.

The rows of a pack form a tree. Its root is what all of them begin with (the spec); below it are the beginnings that
some of them share (a prompt with several replies), and at the leaves what each row has alone. Each node is a sequence
of the teacher's pack that continues its parent. The hidden state of a shared token serves every row that has it, so no
token is copied, and k rows of n tokens after a spec of s tokens take s + k·n tokens instead of k·(s + n).

Sizes: M rows of a pack, n tokens of a row, T tokens of the student's pack, L of them with a loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from delib_fast.data.encode.tokenized_dataset import TokenizedDataset
from delib_fast.data.pack.batch import IGNORE_INDEX, PackedBatch, TeacherPack, empty_pack
from delib_fast.data.pack.shared_prompts import MIN_SHARED_TOKENS
from delib_fast.data.rows import Segment

_Int64 = NDArray[np.int64]
# A node below the root is another call of attention, which reads all of its ancestors' keys again. It must save this
# share of their number of tokens.
_MIN_SAVED_SHARE = 1 / 32


@dataclass(frozen=True, slots=True)
class TeacherWeights:
    """The loss weights of a stage with a teacher, and how its teacher's packs are made."""

    divergence: tuple[float, ...]
    """(4,) weight of the divergence at a target, by its `Segment`."""
    nll: tuple[float, ...]
    """(4,) weight of the nll of a target, by its `Segment`."""
    share: bool
    """Whether beginnings that rows share are computed once."""


def with_teacher(
    batch: PackedBatch, examples: TokenizedDataset, example_weights: NDArray[np.float32], weights: TeacherWeights
) -> PackedBatch:
    """Return a pack of `collate_pack`, or an `empty_pack`, with its teacher. `loss_weights` do not change.

    Args:
        examples: the dataset of the pack, with its `teacher`.
        example_weights: (number of examples,) factor on the loss weights of each example's targets.
    """
    assert examples.teacher is not None, "the stage has a teacher, and its dataset has none"
    if batch.is_empty:
        none = torch.zeros(0, dtype=torch.int64)
        return replace(batch, teacher=TeacherPack(empty_pack(), none, torch.zeros(1), torch.zeros(1)))
    example = np.repeat(np.array(batch.example_ids, np.int64), np.diff(batch.cu_seqlens_host))  # of each token, or -1
    factor = np.where((example >= 0) & (batch.targets.numpy() != IGNORE_INDEX), example_weights[example], 0)
    segments = batch.segment_ids.numpy()
    divergence = np.asarray(weights.divergence, np.float32)[segments] * factor.astype(np.float32)
    nll = np.asarray(weights.nll, np.float32)[segments] * factor.astype(np.float32)
    positions = np.flatnonzero((divergence > 0) | (nll > 0))
    # Also where the divergence has no weight: the metrics report it.
    is_taught = np.isin(segments[positions], (Segment.COT, Segment.RESPONSE))
    taught = np.unique(example[positions][is_taught])
    pack, where = _pack(examples.teacher, taught, share=weights.share)
    rows = np.zeros(len(positions), np.int64)
    offset = examples.teacher.prompt_keys[:, 0] - examples.prompt_keys[:, 0]  # by how much its prompt is longer
    own = batch.position_ids.numpy()
    for k, index in enumerate(taught.tolist()):
        of_row = example[positions] == index
        rows[of_row] = where[k][own[positions[of_row]] + offset[index]]
    return replace(
        batch,
        loss_positions=torch.from_numpy(positions),
        teacher=TeacherPack(pack, torch.from_numpy(rows), torch.from_numpy(divergence), torch.from_numpy(nll)),
    )


def _pack(examples: TokenizedDataset, indices: _Int64, *, share: bool) -> tuple[PackedBatch, list[_Int64]]:
    """The teacher's pack of these examples; and for each of them, (n,) the position in it of each of its tokens."""
    if not len(indices):
        return empty_pack(), []
    tokens = [examples.tokens(i) for i in indices.tolist()]
    nodes = _tree(tokens) if share else [_Node((k,), 0, len(ids), -1) for k, ids in enumerate(tokens)]
    bounds = list(accumulate((node.end - node.begin for node in nodes), initial=0))
    where = [np.zeros(len(ids), np.int64) for ids in tokens]
    for node, start in zip(nodes, bounds, strict=False):
        for k in node.rows:
            where[k][node.begin : node.end] = np.arange(start, start + node.end - node.begin)
    ids = np.concatenate([tokens[node.rows[0]][node.begin : node.end] for node in nodes]).astype(np.int64)
    parents = tuple(node.parent for node in nodes)
    T = len(ids)
    pack = PackedBatch(
        input_ids=torch.from_numpy(ids),
        targets=torch.full((T,), IGNORE_INDEX, dtype=torch.int64),
        loss_weights=torch.zeros(T),
        segment_ids=torch.full((T,), Segment.PROMPT, dtype=torch.int8),
        position_ids=torch.from_numpy(np.concatenate([np.arange(node.begin, node.end) for node in nodes])),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        max_seqlen=max(node.end - node.begin for node in nodes),
        loss_positions=torch.zeros(0, dtype=torch.int64),
        cu_seqlens_host=tuple(bounds),
        example_ids=tuple(int(indices[node.rows[0]]) if len(node.rows) == 1 else -1 for node in nodes),
        prefix=None if max(parents) < 0 else parents,
    )
    return pack, where


@dataclass(frozen=True, slots=True)
class _Node:
    """A sequence of the teacher's pack: the tokens from `begin` to `end` of each of these rows, which are the same."""

    rows: tuple[int, ...]
    begin: int
    end: int
    parent: int


def _tree(tokens: Sequence[NDArray[np.int32]]) -> list[_Node]:
    """The nodes of the tree of these rows, parents first. Every token of a row is in exactly one node of that row.

    A beginning that several rows share is a node of its own if that saves enough tokens.
    """
    order = sorted(range(len(tokens)), key=lambda k: tokens[k].astype(">u4").tobytes())
    common = [0, *(_common(tokens[a], tokens[b]) for a, b in pairwise(order))]
    nodes: list[_Node] = []
    groups = [(0, len(order), 0, -1)]  # rows order[first:last], all of whose tokens before `depth` are in `parent`
    while groups:
        first, last, depth, parent = groups.pop()
        if last - first == 1:
            if depth < len(tokens[order[first]]):
                nodes.append(_Node((order[first],), depth, len(tokens[order[first]]), parent))
            continue
        shared = min(common[first + 1 : last])
        if (shared - depth) * (last - first - 1) >= max(MIN_SHARED_TOKENS, _MIN_SAVED_SHARE * depth):
            nodes.append(_Node(tuple(order[first:last]), depth, shared, parent))
            depth, parent = shared, len(nodes) - 1
        cuts = [first, *(i for i in range(first + 1, last) if common[i] == shared), last]
        groups += [(a, b, depth, parent) for a, b in pairwise(cuts)][::-1]
    return nodes


def _common(one: NDArray[np.int32], other: NDArray[np.int32]) -> int:
    """The number of tokens with which both begin."""
    n = min(len(one), len(other))
    differ = np.flatnonzero(one[:n] != other[:n])
    return int(differ[0]) if len(differ) else n
