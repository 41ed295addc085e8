"""Compiled blocks: the same losses and gradients as eager ones, and one compilation for all packs."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from helpers.small_models import build, documents, gradients, largest_deviation, pack

# Packs that differ in total length, number of sequences and longest sequence.
PACKS = [(13, 1, 7, 30, 2, 11), (40, 9), (5, 5, 5, 5, 21, 3, 8, 2), (64,)]


@pytest.fixture(scope="module", autouse=True)
def heavy_imports():
    """Import when the first test runs, not when tests are collected."""
    global TrainableLM, UnsupportedModelError, enable_activation_checkpointing, layers
    from delib_fast.models import TrainableLM, UnsupportedModelError, layers
    from delib_fast.models.recompute import enable_activation_checkpointing


@pytest.fixture
def counter(monkeypatch):
    """A backend that counts the graphs it compiles, and computes their gradients without inductor's code."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(layers, "BACKEND", backend)
    yield backend
    torch._dynamo.reset()


def losses_and_gradients(model, choice: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    trainable = TrainableLM(copy.deepcopy(model), layers=choice).train()
    losses = []
    for lengths in PACKS:
        output = trainable(pack(documents(lengths)))
        output.loss_sum.backward()
        losses.append(output.loss_sum.item())
    return losses, gradients(trainable)


def assert_same(ours, theirs) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    deviation, name = largest_deviation(ours[1], theirs[1])
    assert deviation < 1e-5, name


@pytest.mark.parametrize(
    ("name", "checkpointed", "kinds"),
    [
        ("qwen3", False, 1),
        ("llama long rope", True, 1),
        ("gemma3 text", False, 2),
        ("gemma2, capped logits", False, 2),
        ("phi3, longrope", False, 1),
    ],
)
def test_compiled_once_for_all_layers_and_packs(name, checkpointed, kinds, counter) -> None:
    """One graph per kind of layer (sliding, full). It must not depend on a layer's index or a pack's lengths."""
    model = build(name)
    if checkpointed:
        enable_activation_checkpointing(model)
    assert_same(losses_and_gradients(model, "compile"), losses_and_gradients(model, "eager"))
    assert counter.frame_count == kinds


def test_blocks_with_adapters_are_compiled_once(counter) -> None:
    """Once more for the first block, whose input needs no gradient, and not for each of the three.

    A patch of a LoRA layer would be a constant of the graph, and each block would be compiled again.
    """
    from delib_fast.config import LoraConfig
    from delib_fast.models import add_adapter

    model = build("qwen3")
    add_adapter(model, LoraConfig(r=4, alpha=8), base=None, seed=0)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:  # zero in a new adapter
            torch.nn.init.normal_(parameter, std=0.1)
    assert_same(losses_and_gradients(model, "compile"), losses_and_gradients(model, "eager"))
    assert counter.frame_count == 2


def checkpoint_around_the_forward(monkeypatch, model) -> None:
    """Checkpoint a layer as transformers did until 5.22: around its call, so that the patched forward is inside."""
    from functools import partial

    from transformers.modeling_layers import GradientCheckpointingLayer

    def call(self, *args, **kwargs):
        run = partial(torch.nn.Module.__call__, self, **kwargs)
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(run, *args)
        return run(*args)

    for kind in {type(block) for block in model.modules() if isinstance(block, GradientCheckpointingLayer)}:
        monkeypatch.setattr(kind, "forward", getattr(kind.forward, "__wrapped__", kind.forward))
    monkeypatch.setattr(GradientCheckpointingLayer, "__call__", call)
    monkeypatch.setattr(layers, "_CHECKPOINTS_INSIDE", False)


@pytest.mark.parametrize("around", [False, True], ids=["inside", "around"])
def test_compiled_blocks_are_checkpointed(around, counter, monkeypatch) -> None:
    """The first pass is eager, and recomputed eagerly; each later one is compiled, and recomputed compiled."""
    model = build("qwen3")
    eager = losses_and_gradients(model, "eager")
    enable_activation_checkpointing(model)
    if around:
        checkpoint_around_the_forward(monkeypatch, model)
    calls = []
    compiled = layers._compile
    monkeypatch.setattr(layers, "_compile", lambda *args: lambda *a, **k: calls.append(1) or compiled(*args)(*a, **k))
    assert_same(losses_and_gradients(model, "compile"), eager)
    assert counter.frame_count == 1
    assert len(calls) == 2 * 3 * (len(PACKS) - 1)  # forward and recomputation of three layers


@pytest.mark.parametrize("around", [False, True], ids=["inside", "around"])
def test_checkpoints_hold_if_two_packs_run_before_their_backward_passes(around, counter, monkeypatch) -> None:
    """The first pack ran eagerly, and is recomputed after the second one was compiled; then the same pack again."""
    model = build("qwen3")
    packs = [pack(documents(lengths)) for lengths in PACKS[:2]]
    packs.append(packs[0])  # the same tensors, as in a bench that repeats a step
    expected = TrainableLM(copy.deepcopy(model)).train()
    for batch in packs:
        expected(batch).loss_sum.backward()
    enable_activation_checkpointing(model)
    if around:
        checkpoint_around_the_forward(monkeypatch, model)
    trainable = TrainableLM(model, layers="compile").train()
    outputs = [trainable(batch) for batch in packs[:2]]
    for output in reversed(outputs):
        output.loss_sum.backward()
    trainable(packs[2]).loss_sum.backward()
    deviation, name = largest_deviation(gradients(trainable), gradients(expected))
    assert deviation < 1e-5, name


def test_a_compiled_block_keeps_only_the_weights_themselves(counter) -> None:
    """It saves no view of a weight for the backward pass, which would keep alive what ZeRO 3 gathered."""
    trainable = TrainableLM(build("qwen3"), layers="compile").train()
    for _ in range(2):  # the first pass is eager
        trainable(pack(documents())).loss_sum.backward()
    weights = {p.untyped_storage().data_ptr(): p for p in trainable.model.model.layers.parameters()}
    saved = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        weight = weights.get(tensor.untyped_storage().data_ptr())
        if weight is not None:
            saved.append(tensor is weight)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trainable(pack(documents()))
    assert saved == [True] * len(weights)


@pytest.mark.slow
def test_inductor_gives_the_losses_and_gradients_of_eager() -> None:
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


def test_unpatch_removes_compiled_forwards(counter) -> None:
    model = TrainableLM(build("qwen3"), layers="compile").unpatch()
    assert not any("forward" in vars(module) for module in model.modules())


def test_unpatching_a_copy_leaves_the_original_patched(counter) -> None:
    trainable = TrainableLM(build("qwen3"), layers="compile")
    copied = copy.deepcopy(trainable)
    model = copied.unpatch()
    assert not any("forward" in vars(module) for module in model.modules())
    assert all("forward" in vars(block) for block in trainable.model.model.layers)


def test_a_wrapper_stays_after_unpatch_and_calls_the_original_forward(counter, caplog) -> None:
    trainable = TrainableLM(build("qwen3"), layers="compile")
    block = trainable.model.model.layers[0]
    ours = block.forward
    block.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    model = trainable.unpatch()
    assert "Qwen3DecoderLayer was wrapped by test_layers after delib_fast patched it" in caplog.text
    tokens = torch.arange(9)[None]
    expected = build("qwen3")(tokens).logits
    assert torch.equal(model(tokens).logits, expected)


def test_rejects_unsupported_layers(counter) -> None:
    with pytest.raises(ValueError, match="layers='fast' does not exist; choose from auto, eager, compile, liger"):
        TrainableLM(build("qwen3"), layers="fast")
    with pytest.raises(ValueError, match="layers='fast' does not exist; choose from auto, eager, compile, liger"):
        layers.check_layers("fast", torch.device("cpu"))


@pytest.mark.parametrize("around", [False, True], ids=["inside", "around"])
def test_compiled_blocks_of_which_some_are_checkpointed(around, counter, monkeypatch) -> None:
    from delib_fast.models.recompute import recompute

    model = build("qwen3")
    eager = losses_and_gradients(model, "eager")
    recompute(model, "full", layers=2)
    if around:
        checkpoint_around_the_forward(monkeypatch, model)
    assert_same(losses_and_gradients(model, "compile"), eager)
    assert counter.frame_count == 1


# --- auto -----------------------------------------------------------------------------------------------------


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.utils._triton, "has_triton", lambda: True)
    monkeypatch.setattr(layers.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(layers, "why_not_liger", lambda device: None)


GPU = torch.device("cuda")


def test_auto_is_eager_on_a_cpu() -> None:
    trainable = TrainableLM(build("qwen3"), layers="auto")
    assert (trainable.layers, trainable.layers_reason) == (
        "eager",
        "on a CPU, compiling pays off only in runs longer than a few minutes",
    )


def test_auto_compiles_on_a_gpu(as_on_a_gpu) -> None:
    trainable = TrainableLM(build("qwen3"), layers="auto", device=GPU)
    assert (trainable.layers, trainable.layers_reason) == (
        "compile",
        "torch.compile fuses norms, rotary positions and SwiGLU",
    )
    assert all("forward" in vars(block) for block in trainable.model.model.layers)


@pytest.mark.parametrize("name", ["qwen3 moe", "gpt-oss, sinks", "deepseek v3, small values"])
def test_auto_does_not_compile_experts(name, as_on_a_gpu) -> None:
    choice, reason = layers.choose_layers(build(name), GPU)
    assert choice == "liger"
    assert reason == "the blocks are not compiled: the number of tokens of each expert changes with every pack"


def test_auto_does_not_compile_layers_that_run_one_document_at_a_time(as_on_a_gpu, monkeypatch) -> None:
    monkeypatch.setattr(layers, "computes_with_liger", lambda model: False)
    separated = importlib.import_module("delib_fast.models.separation").Separation("mixers", "it has a convolution")
    monkeypatch.setattr("delib_fast.models.lm.separate", lambda *_, **__: separated)
    trainable = TrainableLM(build("qwen3"), layers="auto", device=GPU)
    assert trainable.layers == "eager"
    assert trainable.layers_reason.startswith("the blocks are not compiled: documents run one at a time; and ")


def test_auto_gives_the_reason_of_each_choice(as_on_a_gpu, monkeypatch) -> None:
    from delib_fast.models.recompute import recompute

    model = build("qwen3")
    choose = layers.choose_layers
    assert choose(model, GPU) == ("compile", "torch.compile fuses norms, rotary positions and SwiGLU")
    split = choose(model, GPU, why_eager="packs that are split across ranks run eagerly")
    assert split == ("liger", "the blocks are not compiled: packs that are split across ranks run eagerly")
    recompute(model, "full", layers=2)
    assert choose(model, GPU)[0] == "compile"
    recompute(model, "selective")
    inside = "selective activation checkpointing cannot see inside a compiled block"
    assert choose(model, GPU) == ("liger", f"the blocks are not compiled: {inside}")
    model.gradient_checkpointing_disable()
    recompute(model, "none", mlp_tiles=2)
    assert choose(model, GPU) == ("liger", "the blocks are not compiled: a forward inside them was replaced")
    model = build("qwen3")
    monkeypatch.setattr(layers, "why_not_liger", lambda device: "liger-kernel is not installed")
    monkeypatch.setattr(layers.shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    no_compiler = "triton needs a C compiler, and cc, gcc and clang are not found"
    assert choose(model, GPU) == (
        "eager",
        f"the blocks are not compiled: {no_compiler}; and liger-kernel is not installed",
    )
    monkeypatch.setattr(torch.utils._triton, "has_triton", lambda: False)
    assert "triton is not installed" in choose(model, GPU)[1]
    with torch.device("meta"):
        deferred = copy.deepcopy(model).to("meta")
    monkeypatch.setattr(layers, "why_not_liger", lambda device: None)
    assert choose(deferred, GPU)[0] == "eager"  # the same on every rank, though only rank 0 could look at the weights


# --- Liger: its kernels need a GPU, but which modules they replace, and with which arguments, is tested without one ---


def liger_in_torch(x, weight, eps, offset, casting, in_place):
    assert not in_place
    unit = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    return unit.to(x.dtype) * weight if casting == "llama" else (unit * (offset + weight.float())).to(x.dtype)


@pytest.mark.parametrize(("name", "changed"), [("qwen3", 3 * 5 + 1), ("llama", 3 * 3 + 1), ("gemma3 text", 3 * 6 + 1)])
def test_liger_replaces_the_right_modules(name, changed, monkeypatch) -> None:
    """It replaces norms of both formulas and SwiGLU, but not gemma's MLP, which is a GeGLU."""
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
def test_liger_gives_the_losses_and_gradients_of_eager_on_a_gpu() -> None:
    pytest.importorskip("liger_kernel")
    model = build("qwen3").cuda()
    results = {}
    for choice in ("eager", "liger"):
        trainable = TrainableLM(copy.deepcopy(model), layers=choice)
        output = trainable(pack(documents()).to("cuda"))
        output.loss_sum.backward()
        results[choice] = [output.loss_sum.item()], gradients(trainable)
    assert results["liger"][0] == pytest.approx(results["eager"][0], rel=1e-4)
    assert largest_deviation(results["liger"][1], results["eager"][1])[0] < 1e-3


def test_liger_is_rejected_without_a_gpu() -> None:
    with pytest.raises(UnsupportedModelError, match=r"layers is liger: liger-kernel.*set it to eager or compile"):
        layers.check_layers("liger", torch.device("cpu"))
