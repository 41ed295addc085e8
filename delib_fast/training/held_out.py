"""Losses of held-out rows, row by row: sums by segment, and of the opening of the think block.

They are stored in RUN/held_out.jsonl, one sealed line per evaluation, so that two evaluations can be compared row by
row: `delib-fast report` shows the paired differences.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from delib_fast.data import PackedBatch, Row, Segment, TokenizedDataset
from delib_fast.digests import append_json_line, read_json_lines
from delib_fast.ops import LossOutput
from delib_fast.training.meter import segment_report

HELD_OUT_FILE = "held_out.jsonl"
_OPENING = len(Segment)


@dataclass(frozen=True)
class EvaluationSet:
    """Held-out rows that are evaluated in one way."""

    prefix: str
    """What the names of its segments begin with: "" or "no CoT: "."""
    examples: TokenizedDataset
    batches: list[PackedBatch]
    """This rank's packs."""
    opening_ids: tuple[int, ...]
    """`Encoder.thought.opening_ids`."""
    key: str
    """Identifies the rows and their order."""


def rows_key(rows: Sequence[Row], examples: TokenizedDataset, prefix: str) -> str:
    """Identify the evaluated rows by their content. Rows that are too long for a pack are not evaluated."""
    kept = [examples.location(i) for i in range(len(examples))] if len(examples) < len(rows) else []
    facts = json.dumps([prefix, [row.digest for row in rows], kept])
    return hashlib.blake2b(facts.encode(), digest_size=8).hexdigest()


class RowMeter:
    """Sums of Σ nll, tokens and correct tokens of each row and segment, on the device, without a host sync.

    The first tokens of a chain of thought, which open the think block, are also summed on their own. A token whose nll
    is not finite is excluded.
    """

    def __init__(self, device: torch.device, evaluated: EvaluationSet) -> None:
        self._device = device
        self._opening_ends = torch.tensor(_opening_ends(evaluated.examples, evaluated.opening_ids), device=device)
        rows = len(evaluated.examples)
        self.sums = torch.zeros((rows, _OPENING + 1, 3), dtype=torch.float64, device=device)
        """(rows, segments + 1, 3): Σ nll, tokens and correct tokens of each segment, then of the opening."""

    def add(self, batch: PackedBatch, output: LossOutput) -> None:
        """Add a pack; both arguments are on the meter's device."""
        supervised = batch.loss_positions
        row = _row_of_each_token(batch).to(self._device)[supervised]
        nll, segment = output.nll[supervised].double(), batch.segment_ids[supervised].long()
        finite = nll.isfinite()
        columns = torch.stack(
            [nll.where(finite, 0.0), finite.double(), (output.correct[supervised] & finite).double()], dim=1
        )
        flat = self.sums.view(-1, 3)
        flat.index_add_(0, row * (_OPENING + 1) + segment, columns)
        target = batch.position_ids[supervised] + 1
        opens = ((segment == Segment.COT) & (target < self._opening_ends[row])).double()[:, None]
        flat.index_add_(0, row * (_OPENING + 1) + _OPENING, columns * opens)


def _opening_ends(examples: TokenizedDataset, opening_ids: Sequence[int]) -> list[int]:
    """For each example, the index of the first token after the opening of its think block; 0 without one."""
    ends = []
    for example in examples if opening_ids else ():
        cot = np.flatnonzero(example.segments == Segment.COT)
        end = int(cot[0]) + len(opening_ids) if len(cot) else 0
        ends.append(end if end and example.input_ids[end - len(opening_ids) : end].tolist() == [*opening_ids] else 0)
    return ends or [0] * len(examples)


def _row_of_each_token(batch: PackedBatch) -> Tensor:
    """(T,) int64 on the host: the index of the example of each of this rank's tokens; 0 where there is none."""
    ids = [max(0, i) for i in batch.example_ids]
    lengths = [end - start for start, end in pairwise(batch.cu_seqlens_host)]
    ids += [0] * (len(lengths) - len(ids))  # the padding of a sharded pack
    rows = torch.repeat_interleave(torch.tensor(ids), torch.tensor(lengths))
    if batch.shard is None:
        return rows
    size = len(batch.input_ids)
    return rows[batch.shard.rank * size : (batch.shard.rank + 1) * size]


def segments_of(sums: Tensor) -> dict[str, dict[str, float]]:
    """Mean nll, accuracy and token count of each segment over all rows, from `RowMeter.sums` on the host."""
    nll, tokens, correct = sums[:, :_OPENING].sum(0).unbind(1)
    return segment_report(torch.stack([nll, nll, tokens, correct, tokens], dim=1))


def opening_of(sums: Tensor) -> dict[str, float] | None:
    """The mean over rows of log p of the opening of the think block; None if no row has one that the model writes."""
    nll = sums[:, _OPENING, 0][sums[:, _OPENING, 1] > 0]
    return {"log_p": -float(nll.mean()), "rows": len(nll)} if len(nll) else None


def describe_rows(sums: Tensor) -> dict[str, list[list[float]]]:
    """For RUN/held_out.jsonl: [Σ nll, tokens] of each row, for each segment that has tokens, and for "opens_cot"."""
    names = [*(segment.name.lower() for segment in Segment), "opens_cot"]
    return {
        name: [[round(nll, 6), int(tokens)] for nll, tokens in sums[:, k, :2].tolist()]
        for k, name in enumerate(names)
        if float(sums[:, k, 1].sum())
    }


def append_rows(run_dir: Path, moment: str, sets: Mapping[str, Mapping[str, Any]]) -> None:
    """Append the rows of an evaluation to RUN/held_out.jsonl.

    Args:
        sets: for each prefix, "key" (`rows_key`) and "segments" (`describe_rows`).
    """
    append_json_line(run_dir / HELD_OUT_FILE, {"moment": moment, "sets": sets})


def read_rows(run_dir: Path) -> tuple[dict[str, dict[str, Any]], list[int]]:
    """What `append_rows` wrote, by moment, and the numbers of damaged lines. Empty for a run of an earlier version."""
    try:
        records, damaged = read_json_lines(run_dir / HELD_OUT_FILE)
    except OSError:
        return {}, []
    return {record["moment"]: record["sets"] for record in records}, damaged
