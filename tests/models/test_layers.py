"""Compiled blocks: the same losses and gradients as eager ones, and compiled once whatever the packs."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import build, documents, gradients, largest_deviation, pack
from torch._dynamo.testing import CompileCounterWithBackend

from delib_fast.config import ConfigError
from delib_fast.config_file import parse_config
from delib_fast.models import TrainableLM, UnsupportedModelError, layers
from delib_fast.models.build import enable_activation_checkpointing

PACKS = [(13, 1, 7, 30, 2, 11), (40, 9), (5, 5, 5, 5, 21, 3, 8, 2), (64,)]  # other sums, numbers and longest runs


@pytest.fixture
def counter(monkeypatch):
    """A backend that counts the graphs it is given, and makes their gradients without inductor's code."""
    torch._dynamo.reset()
    found = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(layers, "BACKEND", found)
    yield found
    torch._dynamo.reset()


def losses_and_gradients(model, choice: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    trainable = TrainableLM(copy.deepcopy(model), layers=choice).train()
    found = []
    for lengths in PACKS:
        output = trainable(pack(documents(lengths)))
        output.loss_sum.backward()
        found.append(output.loss_sum.item())
    return found, gradients(trainable)


def assert_same(ours, theirs) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    deviation, name = largest_deviation(ours[1], theirs[1])
    assert deviation < 1e-5, name


@pytest.mark.parametrize(("name", "checkpointed", "kinds"),
                         [("qwen3", False, 1), ("llama long rope", True, 1), ("gemma3 text", False, 2)])
def test_compiled_once_for_all_layers_and_packs(name, checkpointed, kinds, counter) -> None:
    """A graph a kind of layer (sliding, full): a layer's index, a pack's lengths or its runs would each add some."""
    model = build(name)
    if checkpointed:
        enable_activation_checkpointing(model)
    assert_same(losses_and_gradients(model, "compile"), losses_and_gradients(model, "eager"))
    assert counter.frame_count == kinds


@pytest.mark.slow
def test_inductor_gives_the_same() -> None:
    torch._dynamo.reset()
    model = build("qwen3")
    assert_same(losses_and_gradients(model, "compile"), losses_and_gradients(model, "eager"))


def test_only_passes_with_gradients_are_compiled(counter) -> None:
    trainable = TrainableLM(build("qwen3"), layers="compile").eval()
    batch = pack(documents())
    with torch.no_grad():
        first, second = trainable(batch).nll, trainable(batch).nll
    assert torch.equal(first, second)
    assert counter.frame_count == 0


def test_unpatch_takes_them_off(counter) -> None:
    model = TrainableLM(build("qwen3"), layers="compile").unpatch()
    assert not any("forward" in vars(module) for module in model.modules())


def test_refusals(counter) -> None:
    with pytest.raises(ValueError, match="layers='fast' does not exist; choose from auto, eager, compile"):
        TrainableLM(build("qwen3"), layers="fast")
    with pytest.raises(ConfigError, match=r"model.layers is compile, and ZeRO stage 3.*engine.zero_stage: 2"):
        parse_config({"run_dir": "r", "model": {"path": "m", "layers": "compile"}, "data": {"rows": "rows.jsonl"},
                      "stages": [{"kind": "aft", "train": ["rows"]}], "engine": {"zero_stage": 3}})
    trainable = TrainableLM(build("qwen3"), layers="compile").train()
    trainable(pack(documents()))
    next(trainable.model.model.layers[0].parameters()).ds_id = 0  # as ZeRO-3 marks what it shards
    with pytest.raises(UnsupportedModelError, match="ZeRO-3 gathers its weights by hooks"):
        trainable(pack(documents()))
