"""What stands around attention and matrix products in a decoder block: eager, compiled, or Liger's; both passes.

    pytest bench/bench_layers.py --quick
    pytest bench/bench_layers.py -k "block and 1024"

Every contender is timed in turns with eager, so `times_as_fast` is a median of ratios of neighbours. Parts: RMSNorm
with the residual before it, rotary positions of a pack with QK-norm, SwiGLU's product. The block is a whole Qwen3
decoder layer on packed runs, as `model.layers` runs it; `of_the_block` says how much of the eager block a part takes.
Outputs and gradients are compared with eager's first. Liger's kernels need a GPU.
"""

import functools
import statistics
import time
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from conftest import machine, synchronize
from torch import Tensor

pytest.importorskip("transformers")
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from delib_fast.models.layers import plug_layers, why_not_liger

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# (hidden, intermediate, heads, kv heads, head size): this project's example, and Qwen3's 0.6B and 8B
SHAPES = {"256": (256, 768, 8, 4, 32), "1024": (1024, 3072, 16, 8, 128), "4096": (4096, 12288, 32, 8, 128)}
LENGTHS = [700, 420, 310, 250, 180, 110, 78]  # 2048 tokens
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 4e-2}


class Block:
    """One decoder layer on a pack, and its parts on the tensors that reach them."""

    def __init__(self, shape: str, dtype: torch.dtype) -> None:
        from delib_fast.models.attention import NAME

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
        self.model.set_attn_implementation(NAME)
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
        """name: (function, arguments, what is differentiated, upstream gradients)."""
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


def seconds(call: Callable[[], Any]) -> float:
    synchronize()
    begin = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - begin


def compare(
    benchmark: Any,
    eager: Callable[[], list[Tensor]],
    other: Callable[[], list[Tensor]],
    dtype: torch.dtype,
    rounds: int,
    **extra: Any,
) -> None:
    error = max(
        ((a.float() - b.float()).abs().max() / b.float().abs().max()).item()
        for a, b in zip(other(), eager(), strict=True)
    )
    assert error < ALLOWED[dtype], error
    eager_s: list[float] = []
    benchmark.pedantic(lambda: (other(), synchronize()), setup=lambda: eager_s.append(seconds(eager)), rounds=rounds)
    ratios = [a / b for a, b in zip(eager_s, benchmark.stats.stats.data, strict=True)]
    benchmark.extra_info.update(
        machine(),
        times_as_fast=statistics.median(ratios),
        error=error,
        eager_ms=statistics.median(eager_s) * 1e3,
        dtype=str(dtype).removeprefix("torch."),
        tokens=sum(LENGTHS),
        **extra,
    )


def skip_if_large(quick: bool, shape: str) -> None:
    if quick and shape != "256":
        pytest.skip("--quick: the smallest shape")
    if shape == "4096" and DEVICE.type == "cpu":
        pytest.skip("a shape for a GPU")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ALLOWED, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("contender", ["compile", "liger"])
def bench_block(benchmark, quick, contender, dtype, shape):
    skip_if_large(quick, shape)
    if contender == "liger" and (reason := why_not_liger(DEVICE)):
        pytest.skip(reason)
    block, other = make_block(shape, dtype), Block(shape, dtype)
    torch._dynamo.reset()
    plug_layers(other.model, contender)
    other.run()  # a block's first pass is eager
    begin = time.perf_counter()
    other.run()
    compare(
        benchmark,
        block.run,
        other.run,
        dtype,
        3 if quick else 7,
        case=f"block {shape}",
        contender=contender,
        quick=quick,
        compile_s=time.perf_counter() - begin,
    )


@pytest.mark.parametrize("part", ["norm", "rope", "swiglu"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ALLOWED, ids=lambda dtype: str(dtype).removeprefix("torch."))
def bench_part(benchmark, quick, dtype, shape, part):
    skip_if_large(quick, shape)
    block = make_block(shape, dtype)
    function, *rest = block.parts()[part]
    torch._dynamo.reset()
    compiled = torch.compile(function, dynamic=False)
    block.run()
    whole = statistics.median(seconds(block.run) for _ in range(3))
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
    benchmark.extra_info["of_the_block"] = benchmark.extra_info["eager_ms"] / whole / 1e3
