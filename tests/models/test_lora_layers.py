"""LoRA layers that run as one op, compared with the chain of peft."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from delib_fast.models import lora_layers
from delib_fast.models.forward_patch import remove_patches
from delib_fast.models.lora_layers import patch_lora


class Layers(nn.Module):
    """Two linear layers, one of them with a bias."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10, dtype=dtype)
        self.down = nn.Linear(10, 6, bias=False, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu())


def build(dtype: torch.dtype = torch.float64, **keys: Any) -> Any:
    torch.manual_seed(1)
    settings = {"r": 3, "lora_alpha": 5, "target_modules": ["up", "down"], "init_lora_weights": False, **keys}
    model = get_peft_model(Layers(dtype), LoraConfig(**settings), autocast_adapter_dtype=False)
    return model.to(dtype)


def result(model: nn.Module, x: torch.Tensor, **options: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(7)  # dropout draws the same elements
    x = x.clone().requires_grad_()
    out = model(x, **options)
    out.square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "x": x.grad, **grads}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One element for each layer that ran as one op: whether its adapter had an input of its own."""
    seen: list[bool] = []
    op = lora_layers.lora_linear

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(kwargs["adapter_input"] is not None)
        return op(*args, **kwargs)

    monkeypatch.setattr(lora_layers, "lora_linear", counted)
    return seen


def assert_equal(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("keys", [{}, {"use_rslora": True}, {"lora_dropout": 0.3}], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_equals_the_chain_of_peft(keys, training, calls) -> None:
    model, x = build(**keys).train(training), torch.randn(4, 5, 6, dtype=torch.float64)
    expected = result(model, x)
    assert calls == []
    patches = patch_lora(model)
    assert_equal(result(model, x), expected)
    assert calls == [bool(training and keys.get("lora_dropout"))] * 2
    remove_patches(patches)
    assert_equal(result(model, x), expected)
    assert len(calls) == 2
    assert not any("forward" in vars(module) for module in model.modules())


def test_autocast_with_adapters_in_float32(calls) -> None:
    """The weights of peft's usual call: a float32 adapter, which autocast converts."""
    model, x = build(torch.float32), torch.randn(4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        expected = result(model, x)
        patch_lora(model)
        ours = result(model, x)
    assert len(calls) == 2
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert ours[name].dtype == value.dtype
        torch.testing.assert_close(ours[name], value, rtol=0.05, atol=0.05 * float(value.abs().max()), msg=name)


def _second_adapter(model: Any) -> None:
    model.add_adapter("second", LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False))
    model.double().base_model.set_adapter(["default", "second"])


def _hook(model: Any) -> None:
    model.base_model.model.up.lora_A["default"].register_forward_hook(lambda module, args, out: out * 2)
    model.base_model.model.down.base_layer.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def _mark_as_sharded(model: Any) -> None:
    for layer in (model.base_model.model.up, model.base_model.model.down):
        layer.base_layer.weight.ds_id = 0


def _single_precision(model: Any) -> None:
    for layer in (model.base_model.model.up, model.base_model.model.down):
        layer.lora_A.float()
        layer.lora_B.float()


PLAIN: dict[str, tuple[dict[str, Any], Callable[[Any], Any]]] = {
    "switched off": ({}, lambda model: model.base_model.disable_adapter_layers()),
    "merged": ({}, lambda model: model.base_model.merge_adapter()),
    "two adapters": ({}, _second_adapter),
    "DoRA": ({"use_dora": True}, lambda model: None),
    "a trained base": ({}, lambda model: model.requires_grad_(True)),
    "a bias in the adapter": ({"lora_bias": True}, lambda model: None),
    "hooks": ({}, _hook),
    "sharded by ZeRO-3": ({}, _mark_as_sharded),
    "an adapter in another dtype": ({}, _single_precision),
}


@pytest.mark.parametrize(("keys", "change"), PLAIN.values(), ids=PLAIN)
def test_whatever_the_op_does_not_compute_runs_in_peft(keys, change, calls) -> None:
    model, x = build(**keys), torch.randn(4, 6, dtype=torch.float64)
    change(model)
    if keys.get("lora_bias"):
        nn.init.normal_(model.base_model.model.up.lora_B["default"].bias)
    expected = result(model, x)
    patch_lora(model)
    assert_equal(result(model, x), expected)
    assert calls == []


def test_an_adapter_for_each_row_runs_in_peft(calls) -> None:
    model, x = build().eval(), torch.randn(3, 6, dtype=torch.float64)
    options = {"adapter_names": ["default", "__base__", "default"]}
    expected = model(x, **options)
    patch_lora(model)
    torch.testing.assert_close(model(x, **options), expected, rtol=0, atol=0)
    assert calls == []


def test_a_compiled_layer_runs_in_peft(calls) -> None:
    model, x = build(), torch.randn(4, 6, dtype=torch.float64)
    expected = result(model, x)
    patch_lora(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    compiled_result = result(compiled, x)
    assert calls == []
    assert_equal({name.removeprefix("_orig_mod."): value for name, value in compiled_result.items()}, expected)


def test_other_kinds_of_layers_are_left_alone() -> None:
    """An embedding, and a layer that only inherits from nn.Linear and may compute something else."""

    class Twice(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.twice, self.plain = nn.Embedding(5, 4), Twice(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.plain(self.twice(self.embed(x)))

    model = get_peft_model(Model(), LoraConfig(r=2, target_modules=["embed", "twice", "plain"]))
    patched = [patch.module for patch in patch_lora(model)]
    assert patched == [model.base_model.model.plain]
