"""Compiled blocks: the same losses and gradients as eager ones, and compiled once whatever the packs."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import build, documents, gradients, largest_deviation, pack
from torch._dynamo.testing import CompileCounterWithBackend

from delib_fast.config import ConfigError
from delib_fast.config.load import parse_config
from delib_fast.models import TrainableLM, UnsupportedModelError, layers
from delib_fast.models.recompute import enable_activation_checkpointing

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


@pytest.mark.parametrize(
    ("name", "checkpointed", "kinds"), [("qwen3", False, 1), ("llama long rope", True, 1), ("gemma3 text", False, 2)]
)
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
    with pytest.raises(ValueError, match="layers='fast' does not exist; choose from auto, eager, compile, liger"):
        TrainableLM(build("qwen3"), layers="fast")
    with pytest.raises(ConfigError, match=r"model.layers is compile, and ZeRO stage 3.*engine.zero_stage: 2"):
        parse_config(
            {
                "run_dir": "r",
                "model": {"path": "m", "layers": "compile"},
                "data": {"rows": "rows.jsonl"},
                "stages": [{"kind": "aft", "train": ["rows"]}],
                "engine": {"zero_stage": 3},
            }
        )
    trainable = TrainableLM(build("qwen3"), layers="compile").train()
    trainable(pack(documents()))
    next(trainable.model.model.layers[0].parameters()).ds_id = 0  # as ZeRO-3 marks what it shards
    with pytest.raises(UnsupportedModelError, match="ZeRO-3 gathers its weights by hooks"):
        trainable(pack(documents()))


# --- Liger: its kernels need a GPU; which modules they stand in for, and that they get the right numbers, does not ----


def liger_in_torch(x, weight, eps, offset, casting, in_place):
    assert not in_place
    unit = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    return unit.to(x.dtype) * weight if casting == "llama" else (unit * (offset + weight.float())).to(x.dtype)


@pytest.mark.parametrize(("name", "changed"), [("qwen3", 3 * 5 + 1), ("llama", 3 * 3 + 1), ("gemma3 text", 3 * 6 + 1)])
def test_liger_stands_in_for_the_right_modules(name, changed, monkeypatch) -> None:
    """Norms of both formulas and SwiGLU (gemma's MLP is a GeGLU, and stays)."""
    norm, mul = pytest.importorskip("liger_kernel.ops.rms_norm"), pytest.importorskip("liger_kernel.ops.swiglu")
    monkeypatch.setattr(norm.LigerRMSNormFunction, "apply", liger_in_torch)
    monkeypatch.setattr(mul.LigerSiLUMulFunction, "apply", lambda a, b: torch.nn.functional.silu(a) * b)
    model = build(name)
    eager = losses_and_gradients(model, "eager")
    assert_same(losses_and_gradients(model, "liger"), eager)
    trainable = TrainableLM(model, layers="liger")
    assert sum("forward" in vars(module) for module in model.modules()) == changed
    trainable.unpatch()
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_liger_gives_the_same_on_a_gpu() -> None:
    pytest.importorskip("liger_kernel")
    model = build("qwen3").cuda()
    found = {}
    for choice in ("eager", "liger"):
        trainable = TrainableLM(copy.deepcopy(model), layers=choice)
        output = trainable(pack(documents()).to("cuda"))
        output.loss_sum.backward()
        found[choice] = [output.loss_sum.item()], gradients(trainable)
    assert found["liger"][0] == pytest.approx(found["eager"][0], rel=1e-4)
    assert largest_deviation(found["liger"][1], found["eager"][1])[0] < 1e-3


def test_liger_is_refused_where_it_can_not_run() -> None:
    with pytest.raises(UnsupportedModelError, match=r"layers is liger: liger-kernel.*set it to eager or compile"):
        layers.resolve_layers("liger", torch.device("cpu"))
