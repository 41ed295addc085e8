"""Every backend of a GPU, eager and compiled, with the device checks inverted (helpers/as_if_gpu.py)."""

from typing import get_args

import pytest
import torch
from attention_cases import inputs, offsets
from helpers.as_if_gpu import as_if_gpu
from loss_cases import make_case, supervised
from torch import Tensor

from delib_fast.config import ModelConfig
from delib_fast.ops import _dispatch, linear_cross_entropy, varlen_attention
from delib_fast.ops.linear_cross_entropy import BACKENDS as LOSS_BACKENDS
from delib_fast.ops.varlen_attention import BACKENDS as ATTENTION_BACKENDS

LENGTHS = [20, 33, 1, 10]


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")


@pytest.mark.parametrize("backend", ["auto", *[b.name for b in LOSS_BACKENDS if b.name not in ("cpu", "reference")]])
@pytest.mark.parametrize(
    "options", [{}, {"logit_scale": 0.5}, {"positions": True}], ids=["plain", "scale", "positions"]
)
def test_losses_of_a_gpu_compile_into_one_graph(backend, options, monkeypatch) -> None:
    case = make_case(dtype=torch.bfloat16)
    keywords = {"loss_positions": supervised(case)} if options.get("positions") else options
    leaves = (case.hidden, case.weight)

    def loss(hidden: Tensor, weight: Tensor, backend: str = backend) -> Tensor:
        return linear_cross_entropy(hidden, weight, *case[2:], backend=backend, **keywords).loss_sum

    exact = torch.autograd.grad(loss(*leaves, backend="cpu"), leaves)
    registered = as_if_gpu(monkeypatch)
    for run in (loss, compiled(loss)):
        ours = torch.autograd.grad(run(*leaves), leaves)
        torch.testing.assert_close(ours, exact, rtol=0.05, atol=0.02)
    del registered


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("torch", {}),
        ("torch", {"window": 7}),
        ("torch", {"sinks": True}),
        ("torch", {"prefix": [-1, 0, 0, 0]}),
        ("flash", {}),
        ("flash", {"window": 7}),
    ],
    ids=str,
)
def test_attention_of_a_gpu_compiles_into_one_graph(backend, options, monkeypatch) -> None:
    q, k, v, upstream = inputs(LENGTHS, (4, 2), 16, dtype=torch.bfloat16)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    keywords = {**options, **({"sinks": torch.randn(4)} if "sinks" in options else {})}
    borders = (0, 20, 53, 54, 64)

    def attend(q: Tensor, k: Tensor, v: Tensor, backend: str = backend) -> Tensor:
        return varlen_attention(q, k, v, offsets(LENGTHS), 33, cu_seqlens_host=borders, backend=backend, **keywords)

    exact = torch.autograd.grad(attend(*leaves, backend="cpu"), leaves, upstream)
    registered = as_if_gpu(monkeypatch, flash=backend == "flash")
    for run in (attend, compiled(attend)):
        ours = torch.autograd.grad(run(*leaves), leaves, upstream)
        torch.testing.assert_close(ours, exact, rtol=0.05, atol=0.05)
    del registered


@pytest.mark.parametrize("flash", [False, True])
def test_the_order_of_the_backends_of_a_gpu(flash, monkeypatch, caplog) -> None:
    """cuda is before triton, and an installed flash-attention package is before torch's kernel."""
    monkeypatch.setattr(_dispatch, "_logged", set())
    registered = as_if_gpu(monkeypatch, flash=flash)
    case = make_case(dtype=torch.bfloat16)
    q, k, v, _ = inputs(LENGTHS, (4, 2), 16, dtype=torch.bfloat16)
    with caplog.at_level("INFO", "delib_fast.ops"):
        linear_cross_entropy(*case)
        varlen_attention(q, k, v, offsets(LENGTHS), 33)
    chosen = [record.getMessage().split(" (")[0] for record in caplog.records]
    assert chosen == ["linear_cross_entropy runs on cuda", f"varlen_attention runs on {'flash' if flash else 'torch'}"]
    assert [b.name for b in ATTENTION_BACKENDS][:2] == ["flash", "torch"]
    del registered


def test_the_configuration_accepts_every_backend() -> None:
    accepted = {key: set(get_args(ModelConfig.model_fields[key].annotation)) for key in ("attention", "loss")}
    assert accepted["attention"] == {"auto", *(b.name for b in ATTENTION_BACKENDS)}
    assert accepted["loss"] == {"auto", *(b.name for b in LOSS_BACKENDS)}
