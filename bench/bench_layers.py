"""Element-wise layers of a decoder block, and the whole block: eager, compiled and Liger's, forward and backward.

    pytest bench/bench_layers.py --quick
    pytest bench/bench_layers.py -k "block and 1024"

`bench_part` times the parts between attention and the matrix products: RMSNorm with the residual addition before it,
rotary embeddings of a pack with QK-norm, and SwiGLU's product. `bench_block` times a whole Qwen3 decoder layer on a
pack, as `model.layers` configures it. Each contender is timed in alternating rounds with eager; `times_as_fast` is the
median of the ratios, and `of_the_block` the share of the eager block's time that a part takes. Outputs and gradients
are first compared with eager's. Liger's kernels need a GPU.
"""

import functools
import statistics
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from harness import DEVICE, dtype_name, median_ratio, seconds, time_alternating
from pytest_benchmark.fixture import BenchmarkFixture
from recording import machine
from torch import Tensor

pytest.importorskip("transformers")
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from delib_fast.models.attention import NAME as ATTENTION_NAME
from delib_fast.models.layers import patch_layers, why_not_liger

# {name: (hidden size, intermediate size, heads, key-value heads, head size)}: quickstart_tiny.yaml, Qwen3 0.6B and 8B
SHAPES = {"256": (256, 768, 8, 4, 32), "1024": (1024, 3072, 16, 8, 128), "4096": (4096, 12288, 32, 8, 128)}
LENGTHS = [700, 420, 310, 250, 180, 110, 78]  # 2048 tokens
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 4e-2}


class Block:
    """One decoder layer with a pack as its input, and its parts with inputs of the right shape."""

    def __init__(self, shape: str, dtype: torch.dtype) -> None:
        hidden, intermediate, heads, kv_heads, head_dim = SHAPES[shape]
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            "qwen3",
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=1,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=64,
        )
        self.model = AutoModelForCausalLM.from_config(config).to(DEVICE)
        self.model.set_attn_implementation(ATTENTION_NAME)
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(dtype)
        self.layer = self.model.model.layers[0]
        T = sum(LENGTHS)
        borders = (0, *accumulate(LENGTHS))
        cu_seqlens = torch.tensor(borders, dtype=torch.int32, device=DEVICE)
        positions = torch.cat([torch.arange(n) for n in LENGTHS])[None].to(DEVICE)
        draw = functools.partial(torch.randn, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1))
        self.hidden, self.residual, self.upstream = (draw(1, T, hidden).to(dtype) for _ in range(3))
        self.gate, self.up, self.d_up = (draw(1, T, intermediate).to(dtype) for _ in range(3))
        self.q, self.d_q = (draw(1, T, heads, head_dim).to(dtype) for _ in range(2))
        self.k, self.d_k = (draw(1, T, kv_heads, head_dim).to(dtype) for _ in range(2))
        self.rope = self.model.model.rotary_emb(self.hidden, positions)
        self.packed = {
            "attention_mask": None,
            "position_embeddings": self.rope,
            "position_ids": positions,
            "cu_seq_lens_q": cu_seqlens,
            "cu_seq_lens_k": cu_seqlens,
            "max_length_q": max(LENGTHS),
            "max_length_k": max(LENGTHS),
            "cu_seqlens_host": borders,
            "varlen_backend": "auto",
        }
        for leaf in (self.hidden, self.residual, self.gate, self.up, self.q, self.k):
            leaf.requires_grad_()

    def parts(self) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...], tuple[Tensor, ...], tuple[Tensor, ...]]]:
        """Return {name: (function, arguments, tensors to differentiate, upstream gradients)}."""
        norm, attention, act = self.layer.input_layernorm, self.layer.self_attn, self.layer.mlp.act_fn

        def norm_and_residual(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
            total = x + residual
            return norm(total), total

        def rope_and_qk_norm(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
            return qwen3.apply_rotary_pos_emb(
                attention.q_norm(q).transpose(1, 2), attention.k_norm(k).transpose(1, 2), cos, sin
            )

        def swiglu(gate: Tensor, up: Tensor) -> tuple[Tensor]:
            return (act(gate) * up,)

        return {
            "norm": (
                norm_and_residual,
                (self.hidden, self.residual),
                (self.hidden, self.residual, norm.weight),
                (self.upstream, self.upstream),
            ),
            "rope": (
                rope_and_qk_norm,
                (self.q, self.k, *self.rope),
                (self.q, self.k, attention.q_norm.weight, attention.k_norm.weight),
                (self.d_q.transpose(1, 2), self.d_k.transpose(1, 2)),
            ),
            "swiglu": (swiglu, (self.gate, self.up), (self.gate, self.up), (self.d_up,)),
        }

    def run(self) -> list[Tensor]:
        """Run the layer forward and backward; return its output and all gradients."""
        out = self.layer(self.hidden, **self.packed)
        leaves = (self.hidden, *self.layer.parameters())
        return [out.detach(), *torch.autograd.grad(out, leaves, self.upstream)]


@functools.lru_cache(maxsize=2)
def make_block(shape: str, dtype: torch.dtype) -> Block:
    return Block(shape, dtype)


def run_part(
    function: Callable[..., Any], arguments: tuple[Any, ...], leaves: tuple[Tensor, ...], upstream: tuple[Tensor, ...]
) -> list[Tensor]:
    out = function(*arguments)
    return [*(x.detach() for x in out), *torch.autograd.grad(out, leaves, upstream)]


def compare(
    benchmark: BenchmarkFixture,
    eager: Callable[[], list[Tensor]],
    other: Callable[[], list[Tensor]],
    dtype: torch.dtype,
    rounds: int,
    **extra: Any,
) -> None:
    """Assert that `other` computes the same as `eager`, then time both in alternating rounds."""
    error = max(
        ((a.float() - b.float()).abs().max() / b.float().abs().max()).item()
        for a, b in zip(other(), eager(), strict=True)
    )
    assert error < ALLOWED[dtype], error
    eager_s, other_s = time_alternating(benchmark, other, eager, rounds=rounds)
    benchmark.extra_info.update(
        machine(),
        times_as_fast=median_ratio(eager_s, other_s),
        error=error,
        eager_ms=statistics.median(eager_s) * 1e3,
        dtype=dtype_name(dtype),
        tokens=sum(LENGTHS),
        **extra,
    )


def skip_if_large(quick: bool, shape: str) -> None:
    if quick and shape != "256":
        pytest.skip("--quick runs only the smallest shape")
    if shape == "4096" and DEVICE == "cpu":
        pytest.skip("this shape is for GPUs")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ALLOWED, ids=dtype_name)
@pytest.mark.parametrize("contender", ["compile", "liger"])
def bench_block(benchmark: BenchmarkFixture, quick: bool, contender: str, dtype: torch.dtype, shape: str) -> None:
    skip_if_large(quick, shape)
    if contender == "liger" and (reason := why_not_liger(torch.device(DEVICE))):
        pytest.skip(reason)
    block, other = make_block(shape, dtype), Block(shape, dtype)
    torch._dynamo.reset()
    patch_layers(other.model, contender)
    other.run()  # the first pass of a block is eager, the second compiles
    compile_s = seconds(other.run)
    compare(
        benchmark,
        block.run,
        other.run,
        dtype,
        3 if quick else 7,
        case=f"block {shape}",
        contender=contender,
        quick=quick,
        compile_s=compile_s,
    )


@pytest.mark.parametrize("part", ["norm", "rope", "swiglu"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ALLOWED, ids=dtype_name)
def bench_part(benchmark: BenchmarkFixture, quick: bool, dtype: torch.dtype, shape: str, part: str) -> None:
    skip_if_large(quick, shape)
    block = make_block(shape, dtype)
    function, *rest = block.parts()[part]
    torch._dynamo.reset()
    compiled = torch.compile(function, dynamic=False)
    block.run()
    block_s = statistics.median(seconds(block.run) for _ in range(3))
    compare(
        benchmark,
        lambda: run_part(function, *rest),
        lambda: run_part(compiled, *rest),
        dtype,
        3 if quick else 7,
        case=f"{part} {shape}",
        contender="compile",
        quick=quick,
    )
    benchmark.extra_info["of_the_block"] = benchmark.extra_info["eager_ms"] / block_s / 1e3
