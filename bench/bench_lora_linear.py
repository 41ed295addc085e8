"""A frozen linear layer with a LoRA adapter, forward and backward: one op, and the chain of products that peft runs.

    pytest bench/bench_lora_linear.py --quick
    pytest bench/bench_lora_linear.py -k "layer and 576"
    pytest bench/bench_lora_linear.py -k step

`bench_layer` compares each contender with its roof: the eight matrix products alone, written to memory that exists
already. `bench_step` runs the forward and backward pass of a whole model on a pack, with the op and with peft's layers
in alternating rounds; `times_as_fast` is the median of the ratios. Outputs and gradients are compared first.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from harness import DEVICE, dtype_name, median_ratio, time_alternating
from pytest_benchmark.fixture import BenchmarkFixture
from recording import machine
from torch import Tensor

from delib_fast.ops import lora_linear
from delib_fast.ops.lora_linear.reference import lora_linear as chain

RANK, SCALING = 64, 2.0
# (inputs, outputs): the layers of SmolLM2-135M, and two of an 8B model
SHAPES = [(576, 576), (576, 192), (576, 1536), (1536, 576), (4096, 4096), (4096, 14336)]
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 4e-2}


class Layer:
    """The tensors of one layer, and a forward and backward pass of a contender."""

    def __init__(self, shape: tuple[int, int], tokens: int, dtype: torch.dtype) -> None:
        inputs, outputs = shape
        generator = torch.Generator(DEVICE).manual_seed(0)

        def draw(*size: int) -> Tensor:
            return (torch.randn(*size, device=DEVICE, generator=generator) / size[-1] ** 0.5).to(dtype)

        self.x, self.a, self.b = draw(tokens, inputs), draw(RANK, inputs), draw(outputs, RANK)
        self.weight, self.upstream = draw(outputs, inputs), draw(tokens, outputs)
        for leaf in (self.x, self.a, self.b):
            leaf.requires_grad_()
        new = self.x.detach().new_empty
        self.rank_sized = new(tokens, RANK)
        self.written = [new(tokens, outputs), new(tokens, inputs), new(RANK, inputs), new(outputs, RANK)]

    def run(self, call: Callable[..., Tensor]) -> list[Tensor]:
        out = call(self.x, self.weight, self.a, self.b, SCALING)
        return [out.detach(), *torch.autograd.grad(out, (self.x, self.a, self.b), self.upstream)]

    @torch.no_grad()
    def products(self) -> None:
        """The roof."""
        y, dx, da, db = self.written
        h, dy = self.rank_sized, self.upstream
        torch.mm(self.x, self.a.t(), out=h)
        torch.mm(self.x, self.weight.t(), out=y)
        torch.mm(h, self.b.t(), out=y)
        torch.mm(dy.t(), h, out=db)
        torch.mm(dy, self.b, out=h)
        torch.mm(dy, self.weight, out=dx)
        torch.mm(h, self.a, out=dx)
        torch.mm(h.t(), self.x, out=da)


def error(ours: list[Tensor], expected: list[Tensor]) -> float:
    pairs = zip(ours, expected, strict=True)
    return max(((a.float() - b.float()).abs().max() / b.float().abs().max()).item() for a, b in pairs)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}-{shape[1]}")
@pytest.mark.parametrize("dtype", ALLOWED, ids=dtype_name)
@pytest.mark.parametrize("contender", ["ours-torch", "peft", "torch.compile"])
def bench_layer(
    against_roof: Callable[..., None], quick: bool, contender: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    if quick and shape != (576, 576):
        pytest.skip("--quick runs only the smallest shape")
    if max(shape) > 2000 and DEVICE == "cpu":
        pytest.skip("this shape is for GPUs")
    torch._dynamo.reset()
    layer = Layer(shape, 512 if quick else 2048, dtype)
    calls: dict[str, Callable[..., Tensor]] = {
        "ours-torch": lambda *args: lora_linear(*args, backend="torch"),
        "peft": chain,
        "torch.compile": torch.compile(chain, dynamic=False),
    }
    call = calls[contender]
    worst = error(layer.run(call), layer.run(chain))
    assert worst < ALLOWED[dtype], worst
    against_roof(
        lambda: layer.run(call),
        layer.products,
        rounds=5 if quick else 15,
        case=f"layer {shape[0]} to {shape[1]}",
        contender=contender,
        dtype=dtype_name(dtype),
        tokens=layer.x.shape[0],
        error=worst,
    )


def bench_step(benchmark: BenchmarkFixture, quick: bool) -> None:
    """SmolLM2-135M's shape with random weights, bfloat16, on a pack of five documents, all of it supervised."""
    pytest.importorskip("peft")
    from transformers import AutoConfig, AutoModelForCausalLM

    from delib_fast.config import LoraConfig
    from delib_fast.models import TrainableLM, add_adapter
    from delib_fast.models.lora_layers import LoraForward

    config = AutoConfig.for_model(
        "llama",
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=2 if quick else 30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    inner = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to(DEVICE)
    add_adapter(inner, LoraConfig(r=RANK, alpha=2 * RANK), base=None, seed=0)
    trained = [parameter for parameter in inner.parameters() if parameter.requires_grad]
    for parameter in trained:
        torch.nn.init.normal_(parameter, std=0.02)
    model = TrainableLM(inner)
    patches = [forward for m in model.modules() if isinstance(forward := vars(m).get("forward"), LoraForward)]
    assert patches
    batch = pack([96, 64, 40] if quick else [700, 520, 380, 260, 188]).to(DEVICE)

    def run(active: bool) -> list[Tensor]:
        for patch in patches:
            patch.active = active
        return list(torch.autograd.grad(model(batch).loss_sum, trained))

    worst = error(run(True), run(False))
    assert worst < 0.2, worst  # bfloat16 through 30 layers
    peft_s, ours_s = time_alternating(benchmark, lambda: run(True), lambda: run(False), rounds=3 if quick else 9)
    benchmark.extra_info.update(
        machine(),
        case="step",
        contender="ours-torch",
        quick=quick,
        tokens=batch.num_tokens,
        dtype="bfloat16",
        error=worst,
        times_as_fast=median_ratio(peft_s, ours_s),
        peft_ms=statistics.median(peft_s) * 1e3,
    )


def pack(lengths: list[int]) -> Any:
    """Random documents as one pack, with every target supervised."""
    from delib_fast.data import PackedBatch

    bounds = tuple(accumulate(lengths, initial=0))
    tokens = torch.randint(0, 49152, (bounds[-1],), generator=torch.Generator().manual_seed(1))
    targets, weights = tokens.roll(-1), torch.ones(len(tokens))
    ends = torch.tensor(bounds[1:]) - 1
    targets[ends], weights[ends] = -100, 0.0
    return PackedBatch(
        input_ids=tokens,
        targets=targets,
        loss_weights=weights,
        segment_ids=torch.full_like(tokens, 2, dtype=torch.int8),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        max_seqlen=max(lengths),
        loss_positions=weights.nonzero().squeeze(-1),
        cu_seqlens_host=bounds,
        example_ids=tuple(range(len(lengths))),
    )
