"""A whole training step: forward, backward and update, ours beside the loop that one writes by hand.

    pytest bench/bench_step.py                       # both model shapes, some minutes on two cores
    pytest bench/bench_step.py --quick               # a small one

Both sides train the same new model on the same rows (the example deliberations, tokenised by a tokenizer trained
on them), with the same fused AdamW, in the precision that the device multiplies natively. The hand-written loop is
a good one: rows sorted by length and padded in micro-batches of at most `pack_capacity` tokens, the head only on
supervised rows, one division by the step's supervised tokens. Before timing, the two losses must agree.

`supervised_tokens_per_s` of one run compares; a time alone says nothing about another machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import machine, peak_extra_mib, synchronize
from torch.nn import functional as F

from delib_fast.config import AFTConfig, Config, ModelConfig, SourceConfig
from delib_fast.config_file import parse_config
from delib_fast.data import EncodedSet, PackedBatches, encode_rows, read_source
from delib_fast.engine import Engine, Ranks, native_precision
from delib_fast.engine.engine import DTYPES
from delib_fast.losses import loss_normalizer, segment_weights
from delib_fast.models import TrainableLM, build_model, train_tokenizer

ROWS = Path(__file__).parent.parent / "examples" / "data" / "deliberation.jsonl"


@dataclass(frozen=True)
class Shape:
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tokens_per_step: int = 8192
    pack_capacity: int = 2048

    def architecture(self) -> dict[str, Any]:
        return {"model_type": "qwen3", "hidden_size": self.hidden, "num_hidden_layers": self.layers,
                "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim,
                "intermediate_size": self.intermediate, "vocab_size": self.vocab, "tie_word_embeddings": True}


SHAPES = {
    "quick": Shape(128, 2, 4, 2, 32, 384, 2048, tokens_per_step=2048, pack_capacity=1024),
    "hidden256-vocab8k": Shape(256, 6, 8, 4, 32, 768, 8192),
    "hidden512-vocab152k": Shape(512, 4, 8, 4, 64, 1536, 151_936, tokens_per_step=4096),
}


class Workload:
    """One model shape, its rows, and its first global step."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.ranks = Ranks()
        self.precision = native_precision(self.ranks.device)
        rows = read_source("rows", SourceConfig(path=str(ROWS)))
        self.tokenizer = train_tokenizer((text for row in rows for text in row.texts), 2000)
        self.config = self._config()
        self.stage = self.config.stages[0]
        assert isinstance(self.stage, AFTConfig)
        self.examples: EncodedSet = encode_rows(rows, self.tokenizer, self.stage)
        self.batches = PackedBatches(
            self.examples, pack_capacity=shape.pack_capacity, packs_per_step=self.stage.packs_per_step,
            segment_weights=segment_weights(self.stage), seed=0, epochs=1, rank=0, world_size=1)
        self.micro_batches = self.batches.step(0)
        self.normalizer = loss_normalizer(self.micro_batches)
        self.supervised = sum(batch.num_supervised for batch in self.micro_batches)

    def _config(self) -> Config:
        return parse_config({
            "run_dir": "unused", "model": {"architecture": self.shape.architecture()}, "data": {"rows": str(ROWS)},
            "tokenizer": {"path": "unused"}, "engine": {"precision": self.precision},
            "stages": [{"kind": "aft", "train": ["rows"], "pack_capacity": self.shape.pack_capacity,
                        "tokens_per_step": self.shape.tokens_per_step, "optimizer": {"grad_clip": 1.0}}]})

    def model(self) -> Any:
        return build_model(ModelConfig(architecture=self.shape.architecture()), self.tokenizer, seed=0)


def ours(work: Workload) -> tuple[Callable[[], float], Callable[[], None]]:
    """(one step, giving its loss; clean up): packs through the fused loss under the engine."""
    engine = Engine(TrainableLM(work.model()), work.config, work.stage, 1000, work.ranks)

    def step() -> float:
        engine.begin_step()
        total = torch.zeros((), device=engine.device)
        for micro_batch in work.micro_batches:
            output = engine.forward(micro_batch.to(engine.device))
            engine.backward(output.loss_sum, work.normalizer)
            total += output.loss_sum.detach()
        engine.end_step()
        return float(total) / work.normalizer

    return step, engine.close


def by_hand(work: Workload) -> tuple[Callable[[], float], Callable[[], None]]:
    """The same rows sorted by length, padded, through transformers' own sdpa, with the head on supervised rows."""
    device = work.ranks.device
    model = work.model().to(device, DTYPES[work.precision])
    model.set_attn_implementation("sdpa")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, betas=(0.9, 0.95), fused=True)
    padded = [tuple(t.to(device) for t in batch) for batch in padded_batches(work)]

    def step() -> float:
        total = torch.zeros((), device=device)
        for ids, mask, targets, weights in padded:
            hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            at = weights > 0
            nll = F.cross_entropy(model.lm_head(hidden[at]).float(), targets[at], reduction="none")
            loss_sum = (nll * weights[at]).sum()
            (loss_sum / work.normalizer).backward()
            total += loss_sum.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(total) / work.normalizer

    return step, lambda: None


def padded_batches(work: Workload) -> list[tuple[torch.Tensor, ...]]:
    """(ids, mask, targets, weights) of the step's rows, each (B, longest), B · longest ≤ pack_capacity."""
    weight_of = np.asarray(segment_weights(work.stage), np.float32)
    rows = sorted((work.examples[i] for i in work.batches.step_example_ids(0)), key=len)
    groups: list[list[Any]] = [[]]
    for row in rows:
        if groups[-1] and (len(groups[-1]) + 1) * len(row) > work.shape.pack_capacity:
            groups.append([])
        groups[-1].append(row)
    batches = []
    for group in groups:
        shape = (len(group), max(map(len, group)))
        ids, mask, targets = (np.zeros(shape, np.int64) for _ in range(3))
        weights = np.zeros(shape, np.float32)
        for i, row in enumerate(group):
            n = len(row)
            ids[i, :n], mask[i, :n] = row.input_ids, 1
            targets[i, : n - 1], weights[i, : n - 1] = row.input_ids[1:], weight_of[row.segments[1:]]
        batches.append(tuple(map(torch.from_numpy, (ids, mask, targets, weights))))
    return batches


CONTENDERS = {"ours": ours, "by-hand": by_hand}


@pytest.fixture(scope="module")
def workloads():
    made: dict[str, Workload] = {}
    return lambda name: made.setdefault(name, Workload(SHAPES[name]))


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("shape", SHAPES)
def bench_step(benchmark, workloads, quick, shape, contender):
    if quick != (shape == "quick"):
        pytest.skip("--quick runs the small shape alone" if quick else "the small shape is for --quick")
    work = workloads(shape)
    step, close = CONTENDERS[contender](work)
    first = step()
    reference, close_reference = by_hand(work)
    assert first == pytest.approx(reference(), rel=1e-4 if work.precision == "fp32" else 2e-2)
    close_reference()

    def timed() -> None:
        step()
        synchronize()

    peak = peak_extra_mib(timed)
    benchmark.pedantic(timed, rounds=3 if quick else 5, warmup_rounds=1)
    seconds = benchmark.stats.stats.median
    tokens = int(work.examples.lengths[work.batches.step_example_ids(0)].sum())
    benchmark.extra_info.update(
        machine(), shape=shape, contender=contender, precision=work.precision, peak_extra_mib=peak,
        tokens=tokens, tokens_per_s=tokens / seconds, supervised_tokens_per_s=work.supervised / seconds,
        fill=work.batches.fill)
    close()
