"""The teacher's forward pass over a pack of rows that all begin with a spec: the spec once, or once for every row.

    pytest bench/bench_teacher.py --quick
    pytest bench/bench_teacher.py               # a spec of 6,144 tokens before 16 rows of 1,024

The model has one layer of SmolLM2-135M's shape and random weights, in bfloat16 where the device computes it natively.
`times_as_fast` is the median over alternating rounds of the time of the pack whose rows have their own copy of the spec
(one pass of packed attention, without padding) ÷ that of the pack with the spec as a shared beginning. The hidden
states of the supervised rows are compared first, in float32.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from harness import DEVICE, dtype_name, median_ratio, time_alternating
from pytest_benchmark.fixture import BenchmarkFixture
from recording import machine
from torch import Tensor

from delib_fast.data import Example, PackedBatch, PackedDataLoader, Segment, TeacherWeights, TokenizedDataset

VOCABULARY = 49152


@dataclass(frozen=True)
class Case:
    """Rows of `prompt` + `reply` tokens after a spec, `replies` of them to each prompt."""

    spec: int
    rows: int
    prompt: int
    reply: int
    replies: int = 1
    layers: int = 1

    def examples(self) -> TokenizedDataset:
        """The rows without the spec, and the same rows with it as the teacher's."""
        random = np.random.default_rng(0)
        spec = random.integers(0, VOCABULARY, self.spec)
        prompts = random.integers(0, VOCABULARY, (self.rows // self.replies, self.prompt))
        found: tuple[list[Example], list[Example]] = ([], [])
        for k in range(self.rows):
            row = np.concatenate([prompts[k // self.replies], random.integers(0, VOCABULARY, self.reply)])
            for examples, start in zip(found, ([], spec), strict=True):
                counts = [len(start) + self.prompt, self.reply]
                segments = np.repeat([Segment.PROMPT, Segment.RESPONSE], counts).astype(np.int8)
                examples.append(Example(np.concatenate([start, row]).astype(np.int32), segments, f"made:{k}"))
        dataset = TokenizedDataset(found[0])
        dataset.teacher = TokenizedDataset(found[1])
        return dataset

    def pack(self, *, share: bool) -> PackedBatch:
        """All rows in one pack of the student, with its teacher's."""
        loader = PackedDataLoader(
            self.examples(),
            pack_capacity=self.rows * (self.prompt + self.reply),
            packs_per_step=1,
            segment_weights=(0, 1, 1, 1),
            seed=0,
            epochs=1,
            rank=0,
            world_size=1,
            share_prompts=True,
            teacher=TeacherWeights((0.0, 1.0, 1.0, 0.0), (0.0, 0.2, 0.2, 1.0), share),
        )
        return loader.step(0)[0].to(DEVICE)


QUICK = {"spec 512, 8 rows of 64": Case(512, 8, 32, 32)}
FULL = {
    "spec 6144, 16 rows of 1024": Case(6144, 16, 512, 512),
    "spec 6144, 4 x 4 replies of 1024": Case(6144, 16, 512, 512, replies=4),
}


@pytest.mark.parametrize("name", [*QUICK, *FULL])
def bench_spec_once(benchmark: BenchmarkFixture, quick: bool, name: str) -> None:
    if quick != (name in QUICK):
        pytest.skip("--quick runs only the smallest case, and only --quick does")
    from transformers import AutoConfig, AutoModelForCausalLM

    from delib_fast.config.dtypes import DTYPES
    from delib_fast.models import Teacher, TrainableLM
    from delib_fast.models.precision import native_precision

    case = {**QUICK, **FULL}[name]
    config = AutoConfig.for_model(
        "llama",
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=case.layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=VOCABULARY,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = TrainableLM(AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(DEVICE))
    teacher = Teacher("self", "reverse")
    once, each = (case.pack(share=share) for share in (True, False))

    def run(batch: PackedBatch) -> Tensor:
        assert batch.teacher is not None
        return teacher.hidden(model, batch.teacher)

    expected = run(each)
    error = ((run(once) - expected).abs().max() / expected.abs().max()).item()
    assert error < 1e-4, error
    dtype = DTYPES[native_precision(torch.device(DEVICE))]
    model.to(dtype)
    run(once)
    each_s, once_s = time_alternating(benchmark, lambda: run(once), lambda: run(each), rounds=3)
    assert once.teacher is not None
    assert each.teacher is not None
    tokens, whole_tokens = once.teacher.batch.num_tokens, each.teacher.batch.num_tokens
    benchmark.extra_info.update(
        machine(),
        case=f"teacher: {name}",
        contender="ours-torch",
        quick=quick,
        rounds=len(once_s),
        dtype=dtype_name(dtype),
        tokens=tokens,
        tokens_of_whole_rows=whole_tokens,
        fewer_tokens=whole_tokens / tokens,
        whole_rows_ms=1e3 * statistics.median(each_s),
        times_as_fast=median_ratio(each_s, once_s),
        error=error,
    )
    print(
        f"\n{name}: {tokens:,} instead of {whole_tokens:,} tokens ({whole_tokens / tokens:.2f}x fewer); "
        f"{median_ratio(each_s, once_s):.2f}x as fast ({1e3 * statistics.median(once_s):.0f} ms, not "
        f"{1e3 * statistics.median(each_s):.0f} ms)"
    )
