"""The roofline model of a step (`delib-fast plan --gpu`) against measured steps, at measured rates of this machine.

    pytest bench/bench_roofline.py                                 # all cases for this device; minutes on two cores
    pytest bench/bench_roofline.py -k "vocab8k and eager"          # one case
    pytest bench/bench_roofline.py --quick                         # one small case

Three rates are measured before each step: those of the three products of a matrix of the model's size (forward and
backward), of a copy of 128 MiB, and of the attention of a pack in one layer; nothing else of the step is. `ratio` is
the estimated time ÷ the measured time, as the median over the rounds; 1 means that the formulas of
`delib_fast/training/roofline.py` explain the step. `parts` has the estimated shares, and `times_the_step_without` the
measured time ÷ that of a step without recomputation.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from harness import DEVICE, median_ratio, seconds, time_alternating
from pytest_benchmark.fixture import BenchmarkFixture
from recording import append_case, machine
from step_cases import SHAPES, Workload

from delib_fast.config import LoraConfig
from delib_fast.config.dtypes import DTYPES
from delib_fast.engine import Engine
from delib_fast.models import TrainableLM
from delib_fast.models.recompute import recompute
from delib_fast.models.shape import ModelShape, model_shape
from delib_fast.ops import varlen_attention
from delib_fast.training.roofline import Device, StepWork, step_parts


def pairs(batch: Any) -> float:
    """The pairs of tokens of a pack of which one attends to the other."""
    return sum((end - start) * (end - start + 1) / 2 for start, end in pairwise(batch.cu_seqlens_host))


class Rates:
    """Calls whose times give the rates of a device: two of each kind, so that a burst does not count."""

    def __init__(self, work: Workload, shape: ModelShape) -> None:
        device, dtype, batch = work.ranks.device, DTYPES[work.precision], work.micro_batches[0]
        T, self.shape, self.pairs = batch.num_tokens, shape, pairs(batch)
        x, w = (torch.randn(n, shape.hidden, device=device, dtype=dtype) for n in (T, shape.intermediate))
        y = torch.randn(T, shape.intermediate, device=device, dtype=dtype)
        self.products = [lambda: x @ w.T, lambda: y @ w, lambda: y.T @ x]  # forward, and the two of the backward pass
        self.flops = 2 * T * shape.hidden * shape.intermediate * len(self.products)
        source = torch.ones(32 << 20, device=device)
        target = torch.empty_like(source)
        self.copy, self.copied = functools.partial(target.copy_, source), 2 * source.nbytes
        self.copy()
        q, k, v = (
            torch.randn(T, heads, shape.head_dim, device=device, dtype=dtype, requires_grad=True)
            for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
        )
        borders = batch.cu_seqlens.to(device)

        def attention() -> None:
            out = varlen_attention(q, k, v, borders, batch.max_seqlen, cu_seqlens_host=batch.cu_seqlens_host)
            torch.autograd.grad(out, (q, k, v), out.detach())

        self.attention = attention
        self.found: list[tuple[float, float, float]] = []

    def measure(self) -> None:
        """Time every call twice, and add the rates to `found`."""
        gemm_s = sum(seconds(call) for call in self.products * 2)
        attention_s, copy_s = (sum(seconds(call) for _ in range(2)) for call in (self.attention, self.copy))
        attention = 3.5 * 4 * self.shape.attention_width * self.pairs
        self.found.append((2 * self.flops / gemm_s, 2 * attention / attention_s, 2 * self.copied / copy_s))

    def device(self, i: int) -> Device:
        """The rates of a round."""
        gemm, attention, copy = self.found[i]
        return Device("measured", gemm, attention, copy, launch_s=5e-6, is_gpu=DEVICE == "cuda")

    def described(self, i: int) -> dict[str, float]:
        gemm, attention, moved = self.found[i]
        return {"gemm_gflops": gemm / 1e9, "attention_gflops": attention / 1e9, "copy_gb_per_s": moved / 1e9}


def steps_of(work: Workload, layers: str, checkpointed: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """(a function that runs one step in which the first layers are recomputed, a function that frees its resources)"""
    model = work.model()
    model.gradient_checkpointing_disable()
    recompute(model, "full" if checkpointed else "none", layers=checkpointed or None)
    engine = Engine(TrainableLM(model, layers=layers), work.config, work.stage, 1_000_000, work.ranks)
    return lambda: engine.train_step(work.micro_batches, work.normalizer), engine.close


@pytest.mark.parametrize("recomputed", ["none", "half", "all"])
@pytest.mark.parametrize("layers", ["eager", "compile"])
@pytest.mark.parametrize("name", [name for name in SHAPES if "32b" not in name])
def bench_roofline(benchmark: BenchmarkFixture, quick: bool, name: str, layers: str, recomputed: str) -> None:
    if quick != (name == "quick") or (quick and layers == "compile"):
        pytest.skip("--quick runs only the small shape, eager, which is for --quick")
    if reason := SHAPES[name].why_not():
        pytest.skip(reason)
    work = Workload(SHAPES[name], "short")
    count = {"none": 0, "half": work.shape.layers // 2, "all": work.shape.layers}[recomputed]
    checkpointing = {"activation_checkpointing": "full", "checkpointed_layers": count} if count else {}
    lora = None if work.shape.lora is None else LoraConfig(r=work.shape.lora)
    changes = {"activation_checkpointing": "none", "layers": layers, "lora": lora, **checkpointing}
    model = work.config.model.model_copy(update=changes)
    config = work.config.model_copy(update={"model": model})
    rates = Rates(work, shape := model_shape(model, work.tokenizer))
    step, close = steps_of(work, layers, count)
    plain, close_plain = steps_of(work, layers, 0) if count else (lambda: None, lambda: None)
    for warm_up in (step, plain) * (1 if layers == "eager" else 3):
        warm_up()
    plain_s: list[float] = []

    def before() -> None:
        rates.measure()
        plain_s.append(seconds(plain))

    rounds = 3
    _, step_s = time_alternating(benchmark, step, before, rounds=rounds)
    close(), close_plain()
    all_pairs = sum(map(pairs, work.micro_batches))
    done = StepWork(work.tokens, work.supervised, all_pairs, micro_batches=len(work.micro_batches))
    parts = [step_parts(config, work.stage, shape, done, rates.device(i), 1, work.precision) for i in range(rounds)]
    estimated = [sum(part.seconds for part in found) for found in parts]
    benchmark.extra_info.update(
        machine(),
        shape=name,
        contender=f"{layers}, {recomputed}",
        quick=quick,
        precision=work.precision,
        tokens=work.tokens,
        step_s=statistics.median(step_s),
        estimated_s=statistics.median(estimated),
        ratio=median_ratio(estimated, step_s),
        times_the_step_without=median_ratio(step_s, plain_s) if count else 1.0,
        parts={part.name: round(part.seconds / estimated[-1], 3) for part in parts[-1]},
        rates=rates.described(-1),
    )
    append_case(benchmark.name, statistics.median(step_s), benchmark.extra_info)
