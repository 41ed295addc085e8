"""lora_linear compared with its definition: the reference in float64."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from delib_fast.ops import BackendUnavailable, lora_linear

SHAPES = {
    "odd sizes": ((3, 7), 13, 11, 5),
    "one row": ((1,), 8, 6, 2),
    "no rows": ((0,), 8, 6, 2),
    "a rank above both sizes": ((9,), 4, 3, 8),
    "a model's layer": ((2, 65), 96, 40, 16),
}
NAMES = ("x", "lora_a", "lora_b", "adapter_input")


def tensors(shape, dtype: torch.dtype, *, bias: bool = False, dropped: bool = False) -> dict[str, Tensor]:
    rows, inputs, outputs, rank = shape
    made = {
        "x": torch.randn(*rows, inputs, dtype=dtype),
        "weight": torch.randn(outputs, inputs, dtype=dtype) / inputs**0.5,
        "lora_a": torch.randn(rank, inputs, dtype=dtype) / inputs**0.5,
        "lora_b": torch.randn(outputs, rank, dtype=dtype),
    }
    if bias:
        made["bias"] = torch.randn(outputs, dtype=dtype)
    if dropped:
        made["adapter_input"] = torch.randn(*rows, inputs, dtype=dtype)
    return made


def run(backend: str, values: dict[str, Tensor], scaling: float = 1.5) -> dict[str, Tensor]:
    """The output and the gradients of what is trained, for one and the same incoming gradient."""
    leaves = {name: value.detach().clone().requires_grad_(name in NAMES) for name, value in values.items()}
    arguments = {name: leaves[name] for name in leaves if name not in ("x", "weight", "lora_a", "lora_b")}
    out = lora_linear(*(leaves[n] for n in ("x", "weight", "lora_a", "lora_b")), scaling, **arguments, backend=backend)
    incoming = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    out.backward(incoming)
    return {"y": out.detach(), **{name: leaf.grad for name, leaf in leaves.items() if name in NAMES}}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dropped", [False, True], ids=["x", "adapter_input"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_matches_reference(shape, bias, dropped, dtype) -> None:
    values = tensors(shape, dtype, bias=bias, dropped=dropped)
    exact = run("reference", {name: value.double() for name, value in values.items()})
    torchs, ours = run("reference", values), run("torch", values)
    assert ours.keys() == exact.keys()
    for name, value in ours.items():
        assert value.dtype == dtype
        assert value.shape == exact[name].shape
        if value.numel():
            allowed = 1.5 * (torchs[name].double() - exact[name]).abs().max() + 1e-12
            assert (value.double() - exact[name]).abs().max() <= allowed + exact[name].abs().max() * torch.finfo(
                dtype
            ).eps, name


@pytest.mark.parametrize("dropped", [False, True])
def test_gradcheck(dropped) -> None:
    values = tensors(((4,), 5, 3, 2), torch.float64, bias=True, dropped=dropped)
    trained = [values[name].requires_grad_() for name in NAMES if name in values]

    def call(x, lora_a, lora_b, adapter_input=None):
        more = {"bias": values["bias"], "adapter_input": adapter_input}
        return lora_linear(x, values["weight"], lora_a, lora_b, 0.7, **more, backend="torch")

    assert torch.autograd.gradcheck(call, trained)


@pytest.mark.parametrize("trained", [("x",), ("lora_a",), ("lora_b",), ("adapter_input",), NAMES])
def test_only_requested_gradients_are_computed(trained) -> None:
    values = tensors(((6,), 5, 4, 3), torch.float32, dropped=True)
    for name in trained:
        values[name].requires_grad_()
    expected = run("reference", values)
    arguments = [values[n] for n in ("x", "weight", "lora_a", "lora_b")]
    out = lora_linear(*arguments, 1.5, adapter_input=values["adapter_input"], backend="torch")
    out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape))
    for name in NAMES:
        if name in trained:
            torch.testing.assert_close(values[name].grad, expected[name])
        else:
            assert values[name].grad is None


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(bias, dropped) -> None:
    values = tensors(((6,), 5, 4, 3), torch.float32, bias=bias, dropped=dropped)
    for name in NAMES:
        if name in values:
            values[name].requires_grad_()
    inputs = (values["x"], values.get("adapter_input"), values["weight"], values.get("bias"))
    torch.library.opcheck(torch.ops.delib_fast.lora_linear, (*inputs, values["lora_a"], values["lora_b"], 0.5))


def test_inputs_are_not_changed() -> None:
    values = tensors(((6,), 5, 4, 3), torch.float32, bias=True)
    before = {name: value.clone() for name, value in values.items()}
    run("torch", values)
    for name, value in values.items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_non_contiguous() -> None:
    values = tensors(((6, 4), 10, 8, 6), torch.float32)
    strided = {
        "x": values["x"].transpose(0, 1),
        "weight": values["weight"].t().contiguous().t(),
        "lora_a": values["lora_a"].repeat_interleave(2, 1)[:, ::2],
        "lora_b": values["lora_b"].t().contiguous().t(),
    }
    assert not any(value.is_contiguous() for value in strided.values())
    expected = run("torch", {name: value.contiguous() for name, value in strided.items()})
    for name, value in run("torch", strided).items():
        torch.testing.assert_close(value, expected[name])


def test_deterministic() -> None:
    values = tensors(((130,), 96, 40, 16), torch.bfloat16)
    first, second = run("torch", values), run("torch", values)
    for name, value in first.items():
        assert torch.equal(value, second[name])


def test_compile_fullgraph() -> None:
    """One graph for any number of rows."""
    values = tensors(((6,), 5, 4, 3), torch.float32, bias=True)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, dynamic=True, backend=backend)
    def compiled(x):
        more = {"bias": values["bias"], "backend": "torch"}
        return lora_linear(x, values["weight"], values["lora_a"], values["lora_b"], 2.0, **more).relu()

    for rows in (6, 7, 31):
        x = torch.randn(rows, 5)
        more = {"bias": values["bias"], "backend": "reference"}
        expected = lora_linear(x, values["weight"], values["lora_a"], values["lora_b"], 2.0, **more).relu()
        torch.testing.assert_close(compiled(x), expected)
    assert len(graphs) == 1


def test_autocast() -> None:
    """The products run in the dtype of autocast; gradients have the dtype of what is trained, as with nn.Linear."""
    values = tensors(((6,), 5, 4, 3), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours, expected = run("torch", values), run("reference", values)
    assert ours["y"].dtype == torch.bfloat16
    for name in ("x", "lora_a", "lora_b"):
        assert ours[name].dtype == torch.float32
        torch.testing.assert_close(ours[name], expected[name], rtol=0.03, atol=0.03)


def test_memory_of_the_backward_pass() -> None:
    """Beside its inputs, the op keeps a tensor of the rank's size, and none of the output's."""
    values = tensors(((64,), 32, 48, 4), torch.float32)
    for name in ("x", "lora_a", "lora_b"):
        values[name].requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        lora_linear(*(values[n] for n in ("x", "weight", "lora_a", "lora_b")), 1.0, backend="torch")
    inputs = {value.untyped_storage().data_ptr() for value in values.values()}
    others = [tuple(tensor.shape) for tensor in kept if tensor.untyped_storage().data_ptr() not in inputs]
    assert others == [(64, 4)]


def test_a_trained_weight_runs_on_the_reference() -> None:
    values = tensors(((6,), 5, 4, 3), torch.float32)
    values["weight"].requires_grad_()
    arguments = [values[n] for n in ("x", "weight", "lora_a", "lora_b")]
    with pytest.raises(BackendUnavailable, match="must be frozen"):
        lora_linear(*arguments, 1.0, backend="torch")
    lora_linear(*arguments, 1.0).sum().backward()
    assert values["weight"].grad is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(4, 6)}, r"x must be (…, I) and weight (O, I), got (6, 5) and (4, 6)"),
        ({"lora_a": torch.ones(3, 6)}, r"lora_a must be (3, 5) for x (6, 5), weight (4, 5)"),
        ({"lora_b": torch.ones(3, 4)}, r"lora_b must be (4, 3) for x (6, 5)"),
        ({"bias": torch.ones(5)}, r"bias must be (4,) for x"),
        ({"adapter_input": torch.ones(5, 5)}, r"adapter_input must be (6, 5) for x"),
        ({"lora_a": torch.ones(3, 5, dtype=torch.float64)}, "lora_a is torch.float64 and x torch.float32; cast one"),
        ({"x": torch.ones(6, 5, dtype=torch.int64)}, "x is torch.int64; it must be floating point"),
        ({"lora_b": torch.ones(4, 3, device="meta")}, "lora_b is on meta and x on cpu; move one of them"),
        ({"backend": "fast"}, "backend='fast' does not exist; choose from auto, torch, reference"),
    ],
)
def test_refuses(change, message) -> None:
    arguments = {**tensors(((6,), 5, 4, 3), torch.float32), "scaling": 1.0, **change}
    with pytest.raises(ValueError, match=re.escape(message)):
        lora_linear(**arguments)
