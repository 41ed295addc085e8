"""Held-out losses by row: exact sums in every kind of pack, and their file."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from delib_fast.data import Example, Row, Segment, TokenizedDataset, evaluation_batches
from delib_fast.ops import LossOutput
from delib_fast.training.held_out import (
    EvaluationSet,
    RowMeter,
    append_rows,
    describe_rows,
    opening_of,
    read_rows,
    rows_key,
    segments_of,
)

OPENING = (7, 8)
WEIGHTS = (0.0, 1.0, 1.0, 1.0)
P, C, R, D = Segment


def chat(prompt: int, cot: int, response: int, first: int = 0) -> Example:
    """A chat whose chain of thought begins with OPENING; `first` is the first token of its prompt."""
    ids = [
        first,
        *range(20, 20 + prompt - 1),
        *(OPENING if cot else ()),
        *range(30, 30 + cot),
        *range(40, 40 + response),
    ]
    segments = [P] * prompt + [C] * ((cot + 2) if cot else 0) + [R] * response
    return Example(np.array(ids, np.int32), np.array(segments, np.int8), f"f:{first}")


def document(tokens: int) -> Example:
    return Example(np.arange(50, 50 + tokens, dtype=np.int32), np.full(tokens, D, np.int8), "d:1")


EXAMPLES = [chat(40, 5, 4), chat(40, 3, 6), chat(5, 0, 3, first=1), document(11), chat(6, 1, 1, first=2)]


def output_of(batch) -> LossOutput:
    """The nll of a target depends on the target and on its position, so that a mistake in either shows."""
    nll = batch.targets.clamp_min(0).float() / 7 + (batch.position_ids + 1).float() / 100
    return LossOutput(torch.zeros(()), nll, batch.targets % 2 == 0)


def expected() -> torch.Tensor:
    sums = torch.zeros(len(EXAMPLES), 5, 3, dtype=torch.float64)
    for row, example in enumerate(EXAMPLES):
        cot = [t for t, segment in enumerate(example.segments) if segment == C]
        for t in range(1, len(example)):
            segment, token = int(example.segments[t]), int(example.input_ids[t])
            if segment == P:
                continue
            values = torch.tensor([token / 7 + t / 100, 1.0, float(token % 2 == 0)], dtype=torch.float64)
            sums[row, segment] += values
            if t in cot[:2]:
                sums[row, 4] += values
    return sums


def evaluated(**options) -> EvaluationSet:
    dataset = TokenizedDataset(EXAMPLES)
    batches = evaluation_batches(dataset, pack_capacity=96, segment_weights=WEIGHTS, **options)
    return EvaluationSet("", dataset, batches, OPENING, "key")


@pytest.mark.parametrize("share_prompts", [False, True])
@pytest.mark.parametrize(("ranks", "sequence_parallel"), [(1, 1), (3, 1), (2, 2), (4, 2), (5, 5)])
def test_sums_by_row(ranks, sequence_parallel, share_prompts):
    """Whole packs and shards of packs, with one copy of a shared prompt or several: the ranks' sums are the rows'."""
    total = torch.zeros(())
    shared = False
    for rank in range(ranks):
        found = evaluated(rank=rank, world_size=ranks, sequence_parallel=sequence_parallel, share_prompts=share_prompts)
        meter = RowMeter(torch.device("cpu"), found)
        for batch in found.batches:
            shared |= batch.prefix is not None
            meter.add(batch, output_of(batch))
        total = total + meter.sums
    assert shared == share_prompts
    torch.testing.assert_close(total, expected(), rtol=1e-6, atol=1e-6)


def test_figures_of_the_sums():
    sums = expected()
    segments = segments_of(sums)
    assert list(segments) == ["cot", "response", "document"]
    assert segments["document"]["tokens"] == 10
    assert segments["cot"]["nll"] == pytest.approx(float(sums[:, C, 0].sum() / sums[:, C, 1].sum()))
    opening = opening_of(sums)
    assert opening["rows"] == 3
    assert opening["log_p"] == pytest.approx(-float(sums[:, 4, 0].sum()) / 3)
    assert opening_of(sums * 0) is None
    rows = describe_rows(sums)
    assert list(rows) == ["cot", "response", "document", "opens_cot"]
    assert rows["document"][3] == [round(float(sums[3, D, 0]), 6), 10]


def test_a_token_whose_nll_is_not_finite_is_excluded():
    found = evaluated(rank=0, world_size=1)
    meter = RowMeter(torch.device("cpu"), found)
    for batch in found.batches:
        output = output_of(batch)
        meter.add(batch, LossOutput(output.loss_sum, torch.full_like(output.nll, torch.nan), output.correct))
    assert not meter.sums.any()


def test_the_file_keeps_the_last_evaluation_of_a_moment(tmp_path):
    """A run that was killed between this file and the ledger evaluates the moment again."""
    first, last = ({"": {"key": "k", "segments": {"cot": [[float(k), 1]]}}} for k in (1, 2))
    for moment, sets in (("start", first), ("after aft", first), ("start", last)):
        append_rows(tmp_path, moment, sets)
    assert read_rows(tmp_path) == ({"start": last, "after aft": first}, [])
    with (tmp_path / "held_out.jsonl").open("a") as file:
        file.write('{"moment": "cut o')
    assert read_rows(tmp_path) == ({"start": last, "after aft": first}, [4])
    assert read_rows(tmp_path / "none") == ({}, [])


def test_rows_are_identified_by_their_content():
    rows = [Row(kind="document", location=f"a:{k}", source="s", digest=f"d{k}", text="x") for k in range(2)]
    both = TokenizedDataset([document(3), document(4)])
    moved = [Row(kind="document", location=f"b:{k}", source="other", digest=f"d{k}", text="x") for k in range(2)]
    assert rows_key(rows, both, "") == rows_key(moved, both, "")
    others = {
        rows_key(rows, both, "no CoT: "),
        rows_key(rows[::-1], both, ""),
        rows_key(rows, TokenizedDataset([document(3)]), ""),
    }
    assert len(others | {rows_key(rows, both, "")}) == 4
