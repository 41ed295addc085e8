"""Activation checkpointing: the same gradients, less memory, and attention computed once if it is kept."""

from __future__ import annotations

import copy
import gc
from collections import Counter

import pytest
import torch
from helpers.small_models import ARCHITECTURES, build, documents, gradients, largest_deviation, pack
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from delib_fast.config import ConfigError, LoraConfig

LENGTHS = (61, 40, 90)
MODES = {
    "none": {},
    "selective": {},
    "full": {},
    "selective, one layer": {"layers": 1},
    "full, one layer": {"layers": 1},
    "full, two layers": {"layers": 2},
    "none, tiled": {"mlp_tiles": 3},
    "full, tiled": {"mlp_tiles": 3},
}


@pytest.fixture(scope="module", autouse=True)
def heavy_imports():
    """Import when the first test runs, not when tests are collected."""
    global TrainableLM, add_adapter, recompute, remove_patches
    from delib_fast.models import TrainableLM, add_adapter, recompute
    from delib_fast.models.forward_patch import remove_patches


class Recorder(TorchDispatchMode):
    """Counts the ops that run, and the bytes of their results that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.results: dict[int, tuple[StorageWeakRef, int]] = {}
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops[str(func)] += 1
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.results[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    @property
    def held_bytes(self) -> int:
        gc.collect()
        return sum(size for ref, size in self.results.values() if not ref.expired())


def trained(mode: str, *, lora: bool = False) -> tuple[dict[str, torch.Tensor], int, Recorder]:
    """(gradients, bytes alive between the passes, the ops that ran)"""
    model = copy.deepcopy(build("llama"))
    if lora:
        add_adapter(model, LoraConfig(r=4, dropout=0.2), base=None, seed=1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    recompute(model, mode.partition(",")[0], **MODES[mode])
    trainable = TrainableLM(model, attention_backend="cpu", loss_backend="reference").train()
    torch.manual_seed(3)
    with Recorder() as recorder:
        loss = trainable(pack(documents(LENGTHS))).loss_sum
        held = recorder.held_bytes
        loss.backward()
    return {n: g for n, g in gradients(trainable.model).items() if g is not None}, held, recorder


@pytest.fixture(scope="module")
def plain():
    return trained("none")


@pytest.mark.parametrize("mode", [m for m in MODES if m != "none"])
def test_gradients_are_those_of_none(plain, mode):
    assert largest_deviation(trained(mode)[0], plain[0])[0] < 1e-5


@pytest.mark.parametrize("mode", ["full", "selective", "none, tiled"])
def test_adapter_with_dropout(mode):
    """The recomputed dropout is the same, and a layer is recomputed though its own weights are frozen.

    Tiles draw dropout in another order, so for them the test only checks that every adapter weight gets a gradient.
    """
    expected, grads = trained("none", lora=True)[0], trained(mode, lora=True)[0]
    assert grads.keys() == expected.keys()
    assert all(".lora_" in name for name in grads)
    if "tiled" not in mode:
        assert largest_deviation(grads, expected)[0] < 1e-5


def test_less_is_held_between_the_passes(plain):
    held = {mode: trained(mode)[1] for mode in MODES if mode not in ("none", "full, tiled")} | {"none": plain[1]}
    assert held["full"] < held["full, two layers"] < held["full, one layer"] < held["none"]
    # each layer that is not recomputed holds as much as another
    step = held["full, one layer"] - held["full, two layers"]
    assert step == pytest.approx(held["none"] - held["full, one layer"], rel=0.01)
    assert held["full"] < held["selective"] < held["none, tiled"] < held["none"]
    tokens, layers, width = sum(LENGTHS), 3, 32
    attention = tokens * layers * 4 * (width + 4)  # its output and one log-sum-exp per head, in fp32
    assert held["selective"] - held["full"] == pytest.approx(attention, rel=0.1)


@pytest.mark.parametrize(
    ("mode", "times"),
    [
        ("none", 3),
        ("selective", 3),
        ("selective, one layer", 3),
        ("full, one layer", 4),
        ("full, two layers", 5),
        ("full", 6),
    ],
)
def test_attention_is_computed_once_where_it_is_kept(mode, times):
    """By the three layers together, forward and backward."""
    ops = trained(mode)[2].ops
    assert ops["delib_fast.varlen_attention_cpu.default"] == times


def test_the_first_layers_are_recomputed():
    """The backward pass has freed what the last ones keep before it recomputes one."""
    model = build("llama")
    recompute(model, "full", layers=2)
    assert [layer.gradient_checkpointing for layer in model.model.layers] == [True, True, False]
    with pytest.raises(
        ConfigError, match=r"checkpointed_layers is 4, but LlamaForCausalLM has 3 layers; set it to at m"
    ):
        recompute(model, "full", layers=4)
    model.model.layers = model.model.layers[:2]
    with pytest.raises(
        ConfigError, match=r"has 3 layers, but 2 modules that can be recomputed one by one; set it to nu"
    ):
        recompute(model, "full", layers=1)


def test_tiles_can_be_removed():
    model = build("llama")
    patches = recompute(model, "none", mlp_tiles=3)
    assert len(patches) == 3
    remove_patches(patches)
    assert not any("forward" in vars(module) for module in model.modules())


def test_rejects_unsupported_models_and_settings():
    assert "qwen3 moe" in ARCHITECTURES
    with pytest.raises(ConfigError, match=r"model\.mlp_tiles: Qwen3MoeForCausalLM has no layers with an MLP of plain"):
        recompute(build("qwen3 moe"), "none", mlp_tiles=2)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="torch sees no GPU"):
            recompute(build("llama"), "full", offload=True)


class Host(torch.autograd.graph.saved_tensors_hooks):
    """Replaces torch's save_on_cpu: it copies too, without pinned memory, so it needs no GPU; and it counts."""

    packed: list[tuple[tuple[int, ...], StorageWeakRef]]
    unpacked: int

    def __init__(self, **_: object) -> None:
        super().__init__(self._pack, self._unpack)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        Host.packed.append((tuple(tensor.shape), StorageWeakRef(tensor.untyped_storage())))
        return tensor.clone()

    def _unpack(self, tensor: torch.Tensor) -> torch.Tensor:
        Host.unpacked += 1
        return tensor.clone()


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_offload_moves_each_layers_input_to_the_host(monkeypatch, mode, lora):
    """The gradients are bitwise those without offload. Between the passes the device holds none of the inputs, except
    the output of frozen embeddings, which transformers makes a leaf that autograd keeps. The test catches a hook that
    is set where nothing is saved, and inputs that something else keeps alive."""
    expected = trained(mode, lora=lora)[0]
    monkeypatch.setattr("transformers.modeling_utils.save_on_cpu", Host)
    monkeypatch.setattr(Host, "packed", [], raising=False)
    monkeypatch.setattr(Host, "unpacked", 0, raising=False)
    held: list[int] = []

    class RecordsRelease(Recorder):
        @property
        def held_bytes(self) -> int:
            gc.collect()
            held.extend(not ref.expired() for _, ref in Host.packed)
            return 0

    monkeypatch.setitem(MODES, mode, {"offload": True})
    monkeypatch.setitem(globals(), "Recorder", RecordsRelease)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        grads = trained(mode, lora=lora)[0]
    layers = 3
    assert [shape for shape, _ in Host.packed if shape == (1, sum(LENGTHS), 32)] == [(1, sum(LENGTHS), 32)] * layers
    assert Host.unpacked == len(Host.packed)
    assert held == [lora] + [False] * (len(held) - 1)
    assert len(held) == len(Host.packed)
    assert grads.keys() == expected.keys()
    assert all(torch.equal(grads[name], expected[name]) for name in expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_offload_on_a_gpu(mode):
    grads = []
    for offload in (False, True):
        model = build("llama")
        recompute(model, mode, offload=offload)
        trainable = TrainableLM(model).cuda().bfloat16().train()
        trainable(pack(documents(LENGTHS)).to(torch.device("cuda"))).loss_sum.backward()
        grads.append(gradients(trainable.model))
    assert largest_deviation(grads[1], grads[0])[0] == 0.0
