"""Planning packs, collating them and encoding rows: the work between rows of text and tensors.

    pytest bench/bench_packing.py --benchmark-only

Lengths are modeled on long chains of thought: lognormal, median 6,000 tokens, sigma 0.9, clipped to 64 … 32,768, for
packs of 32,768 tokens. TRL runs if it is installed (extra `peers`): its packing as `SFTTrainer` calls it, on batches of
1,000 rows, and on the whole dataset in one call. TRL moves tokens while it packs. Ours plans first and moves tokens in
`bench_collate_pack`, so add the two times to compare.
"""

from __future__ import annotations

import json
import os
import platform
import random
from typing import Any, Literal

import numpy as np
import pytest
from harness import SHARED_DATA, round_seconds
from pytest_benchmark.fixture import BenchmarkFixture

from delib_fast.data import Example, Message, PackedDataLoader, Row, TokenizedDataset, encode_rows, plan_packs
from delib_fast.data.pack.epochs import pack_costs
from delib_fast.data.pack.packing import _compiled
from delib_fast.data.pack.shared_prompts import bundle, plan_bundles

CAPACITY = 32_768
MATH_COT = SHARED_DATA / "math_cot_100x8.jsonl"


def long_cot_lengths(N: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.clip(np.exp(rng.normal(np.log(6000), 0.9, N)), 64, CAPACITY).astype(np.int64)


def store_figures(benchmark: BenchmarkFixture, **more: Any) -> None:
    """Store figures of a bench with the processor that they were measured on."""
    benchmark.extra_info.update(machine=platform.processor() or platform.machine(), cores=os.cpu_count(), **more)


def byte_level_bpe(texts: list[str], vocab_size: int) -> Any:
    """A tokenizer trained on these texts, with a chat template like Qwen3's."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|im_start|>", "<|im_end|>"], show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' }}{% if m.reasoning_content %}"
        "{{ '<think>\n' ~ m.reasoning_content ~ '\n</think>\n\n' }}{% endif %}{{ m.content ~ '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    return tokenizer


# --- planning -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("N", [10_000, 100_000, 1_000_000])
@pytest.mark.parametrize(
    "backend",
    [
        pytest.param("cpp", marks=pytest.mark.skipif(_compiled() is None, reason="delib_fast._C is not built")),
        "python",
    ],
)
def bench_plan_packs(benchmark: BenchmarkFixture, backend: Literal["cpp", "python"], N: int) -> None:
    lengths = long_cot_lengths(N)
    plan = plan_packs(lengths, CAPACITY, backend=backend)
    assert np.array_equal(np.sort(plan.examples), np.arange(N))
    sizes = np.add.reduceat(lengths[plan.examples], plan.pack_offsets[:-1])
    assert sizes.max() <= CAPACITY
    benchmark.pedantic(
        plan_packs,
        (lengths, CAPACITY),
        {"backend": backend},
        rounds=5 if backend == "cpp" else 1,
        warmup_rounds=1 if backend == "cpp" else 0,
    )
    store_figures(
        benchmark,
        fill=plan.fill,
        packs=plan.num_packs,
        least_packs=int(-(-lengths.sum() // CAPACITY)),
        lengths_per_s=N / min(round_seconds(benchmark)),
    )


@pytest.mark.parametrize("batch", [1000, None], ids=["batches-of-1000", "whole-set"])
def bench_plan_packs_trl(benchmark: BenchmarkFixture, batch: int | None) -> None:
    """TRL's best-fit decreasing on 20,000 rows that have only input ids."""
    data_utils = pytest.importorskip("trl.data_utils", reason="trl is not installed (extra: peers)")
    datasets = pytest.importorskip("datasets")
    N = 20_000
    lengths = long_cot_lengths(N)
    rows = datasets.Dataset.from_dict({"input_ids": [np.zeros(n, np.int32) for n in lengths // 16]})
    capacity = CAPACITY // 16  # lengths and capacity ÷ 16, so that 20,000 rows fit in memory; packs are the same

    def pack():
        return data_utils.pack_dataset(rows, capacity, "bfd", {"batch_size": batch or N, "keep_in_memory": True})

    packed = benchmark.pedantic(pack, rounds=1)
    tokens = sum(map(len, packed["input_ids"]))
    store_figures(
        benchmark,
        fill=tokens / (len(packed) * capacity),
        packs=len(packed),
        lengths_per_s=N / min(round_seconds(benchmark)),
    )


@pytest.mark.parametrize("N", [100_000, 1_000_000])
def bench_plan_packs_numba(benchmark: BenchmarkFixture, N: int) -> None:
    """Plain best fit in numba. It returns only the pack of each length; ours also lists the examples of each pack."""
    pytest.importorskip("numba", reason="numba is not installed (extra: peers)")
    from experiments.numba_best_fit import best_fit_decreasing

    lengths = long_cot_lengths(N)
    packs, opened = best_fit_decreasing(lengths, CAPACITY)  # this call also compiles
    assert np.bincount(packs, lengths).max() <= CAPACITY
    benchmark.pedantic(best_fit_decreasing, (lengths, CAPACITY), rounds=5)
    store_figures(
        benchmark,
        fill=lengths.sum() / (opened * CAPACITY),
        packs=opened,
        lengths_per_s=N / min(round_seconds(benchmark)),
    )


@pytest.mark.parametrize("model", ["Qwen3-1.7B", "Qwen3-8B"])
@pytest.mark.parametrize("ranks", [8, 32])
def bench_cost_balance(benchmark: BenchmarkFixture, model: str, ranks: int) -> None:
    """Cost of a step's slowest rank over the mean of all ranks, with packs in random order and balanced by cost."""
    quadratic_cost = {"Qwen3-1.7B": 28 * 2048 / 1.7e9, "Qwen3-8B": 36 * 4096 / 8.2e9}[model]
    lengths = np.clip(long_cot_lengths(200_000), 64, CAPACITY)
    examples = TokenizedDataset([Example(np.zeros(n, np.int32), np.full(n, 2, np.int8), "") for n in (2, 2)])
    examples.lengths = lengths  # only lengths matter here, so the 1.8 billion tokens are not created

    def slowest_over_mean(planned_cost: float) -> float:
        batches = PackedDataLoader(
            examples,
            pack_capacity=2 * CAPACITY,
            packs_per_step=ranks,
            epochs=1,
            rank=0,
            segment_weights=(0, 1, 1, 1),
            seed=0,
            world_size=1,
            quadratic_cost=planned_cost,
        )
        plan, order = batches._epochs.plan(0)
        costs = pack_costs(plan, lengths, quadratic_cost)[order[: len(order) // ranks * ranks]].reshape(-1, ranks)
        return float((costs.max(1) / costs.mean(1)).mean())

    balanced = benchmark.pedantic(slowest_over_mean, (quadratic_cost,), rounds=3)
    store_figures(benchmark, random_order=slowest_over_mean(0.0), balanced=balanced)
    assert balanced < 1.005


# --- shared prompts -------------------------------------------------------------------------------------------


def bench_bundle_prompts(benchmark: BenchmarkFixture, quick: bool) -> None:
    """Bundle a million random lengths, eight replies per prompt, and plan an epoch of the bundles."""
    N = 80_000 if quick else 1_000_000
    rng = np.random.default_rng(0)
    prompts = np.repeat(np.clip(rng.lognormal(np.log(400), 1, N // 8), 20, 8000).astype(np.int64), 8)
    own = np.clip(rng.lognormal(np.log(2000), 0.9, N), 64, CAPACITY - 8000).astype(np.int64)
    examples = TokenizedDataset([Example(np.zeros(2, np.int32), np.full(2, 2, np.int8), "")])
    examples.lengths = prompts + own  # only lengths and hashes matter here
    examples.prompt_keys = np.stack([prompts, np.repeat(rng.integers(-(2**62), 2**62, N // 8), 8)], axis=1)

    def plan() -> Any:
        bundles = bundle(examples, CAPACITY)
        assert bundles is not None
        return plan_bundles(bundles, CAPACITY, seed=0)

    found, alone = benchmark.pedantic(plan, rounds=3), plan_packs(examples.lengths, CAPACITY)
    assert np.array_equal(np.sort(found.examples), np.arange(N))
    store_figures(
        benchmark,
        fill=found.fill,
        packs=found.num_packs,
        packs_alone=alone.num_packs,
        tokens_saved=1 - found.num_tokens / alone.num_tokens,
        lengths_per_s=N / min(round_seconds(benchmark)),
    )


@pytest.mark.skipif(not MATH_COT.exists(), reason="../shared/data/math_cot_100x8.jsonl does not exist")
def bench_math_cot(benchmark: BenchmarkFixture, quick: bool) -> None:
    """Tokens computed for 100 prompts with 8 chains of thought each, with shared prompts and without."""
    items = [json.loads(line) for line in MATH_COT.read_text().splitlines()[: 20 if quick else None]]
    rows = [
        Row(
            kind="chat",
            location="",
            source="s",
            digest="",
            messages=(Message("user", item["question"]),),
            response=reply,
        )
        for item in items
        for reply in item["code"]
    ]
    encoded = encode_rows(
        rows,
        byte_level_bpe([part for row in rows for part in row.texts], 8192),
        pack_capacity=8192,
    )

    def batches(share: bool) -> PackedDataLoader:
        return PackedDataLoader(
            encoded,
            pack_capacity=8192,
            packs_per_step=1,
            segment_weights=(0, 1, 1, 1),
            seed=0,
            epochs=1,
            rank=0,
            world_size=1,
            share_prompts=share,
        )

    shared, plain = benchmark.pedantic(batches, (True,), rounds=3), batches(False)
    supervised = [sum(p.num_supervised for s in range(len(b)) for p in b.step(s)) for b in (shared, plain)]
    assert supervised[0] == supervised[1]
    store_figures(
        benchmark,
        tokens_computed=shared.tokens_per_epoch,
        tokens_plain=plain.tokens_per_epoch,
        supervised=supervised[0],
        packs=shared.packs_per_epoch,
        packs_plain=plain.packs_per_epoch,
        saved=1 - shared.tokens_per_epoch / plain.tokens_per_epoch,
    )


# --- collating ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("median", [100, 1000, 6000])
def bench_collate_pack(benchmark: BenchmarkFixture, median: int) -> None:
    """Packs as tensors: ids, shifted targets, weights, positions, sequence boundaries. One core."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(median), 0.9, 2_000_000 // median), 16, CAPACITY).astype(int)
    examples = TokenizedDataset(
        [
            Example(rng.integers(0, 50_000, n).astype(np.int32), (np.arange(n) * 3 // n).astype(np.int8), f"row {i}")
            for i, n in enumerate(lengths)
        ]
    )
    batches = PackedDataLoader(
        examples,
        pack_capacity=CAPACITY,
        packs_per_step=4,
        segment_weights=(0, 1, 1, 1),
        seed=0,
        epochs=1,
        rank=0,
        world_size=1,
    )

    def epoch() -> int:
        return sum(pack.num_tokens for step in range(len(batches)) for pack in batches.step(step) if not pack.is_empty)

    assert epoch() == lengths.sum()
    benchmark.pedantic(epoch, rounds=5)
    store_figures(benchmark, tokens_per_s=lengths.sum() / min(round_seconds(benchmark)), fill=batches.fill)


# --- encoding -------------------------------------------------------------------------------------------------


def bench_encode(benchmark: BenchmarkFixture) -> None:
    """Rows to ids and segments, with a byte-level BPE of 4,096 tokens and a chat template like Qwen3's; all cores."""
    draw = random.Random(0)
    words = ["the", "policy", "says", "user", "asks", "therefore", "harm", "honest", "answer", "step", "because", "so"]

    def text(n: int) -> str:
        return " ".join(draw.choice(words) + draw.choice(["", "", "", ",", ".\n", "?"]) for _ in range(n))

    rows = [
        Row(
            kind="chat",
            location=f"rows.jsonl:{i}",
            source="s",
            digest="",
            messages=(Message("user", text(40)),),
            cot=text(300),
            response=text(100),
        )
        for i in range(1000)
    ]
    tokenizer = byte_level_bpe([part for row in rows[:100] for part in row.texts], 4096)
    encoded = encode_rows(rows, tokenizer, pack_capacity=8192)
    message = {"role": "assistant", "reasoning_content": rows[0].cot, "content": rows[0].response}
    user = {"role": "user", "content": rows[0].messages[0].content}
    assert encoded[0].input_ids.tolist() == tokenizer.apply_chat_template([user, message], return_dict=False)
    benchmark.pedantic(encode_rows, (rows, tokenizer), {"pack_capacity": 8192}, rounds=3)
    store_figures(
        benchmark,
        tokens_per_s=encoded.counts.tokens / min(round_seconds(benchmark)),
        rows_per_s=len(rows) / min(round_seconds(benchmark)),
    )
