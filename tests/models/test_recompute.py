"""What layers keep and compute again: the same gradients, less memory, and attention only once where that is asked."""

from __future__ import annotations

import copy
import gc
from collections import Counter

import pytest
import torch
from small_models import ARCHITECTURES, build, documents, gradients, largest_deviation, pack
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from delib_fast.config import ConfigError, LoraConfig
from delib_fast.models import TrainableLM, add_adapter, recompute

LENGTHS = (61, 40, 90)
MODES = {"none": {}, "selective": {}, "full": {}, "none, tiled": {"mlp_tiles": 3}, "full, tiled": {"mlp_tiles": 3}}


class Watch(TorchDispatchMode):
    """Counts the ops that run, and the bytes of what they made and somebody still holds."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops[str(func)] += 1
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    @property
    def held_bytes(self) -> int:
        gc.collect()
        return sum(size for ref, size in self.made.values() if not ref.expired())


def trained(mode: str, *, lora: bool = False) -> tuple[dict[str, torch.Tensor], int, Watch]:
    """(gradients, bytes held between the passes, what ran)"""
    model = copy.deepcopy(build("llama"))
    if lora:
        add_adapter(model, LoraConfig(r=4, dropout=0.2), base=None, seed=1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    recompute(model, mode.partition(",")[0], **MODES[mode])
    trainable = TrainableLM(model, attention_backend="cpu", loss_backend="reference").train()
    torch.manual_seed(3)
    with Watch() as watch:
        loss = trainable(pack(documents(LENGTHS))).loss_sum
        held = watch.held_bytes
        loss.backward()
    return {n: g for n, g in gradients(trainable.model).items() if g is not None}, held, watch


@pytest.fixture(scope="module")
def plain():
    return trained("none")


@pytest.mark.parametrize("mode", [m for m in MODES if m != "none"])
def test_gradients_are_those_of_none(plain, mode):
    assert largest_deviation(trained(mode)[0], plain[0])[0] < 1e-5


@pytest.mark.parametrize("mode", ["full", "selective", "none, tiled"])
def test_adapter_with_dropout(mode):
    """The dropout that is drawn again is the same; nothing frozen needs a gradient for a layer to be computed again.

    (Tiles draw in another order, so there it is only held that all get a gradient.)
    """
    expected, found = trained("none", lora=True)[0], trained(mode, lora=True)[0]
    assert found.keys() == expected.keys()
    assert all(".lora_" in name for name in found)
    if "tiled" not in mode:
        assert largest_deviation(found, expected)[0] < 1e-5


def test_memory_falls(plain):
    held = {mode: trained(mode)[1] for mode in ("selective", "full", "none, tiled")} | {"none": plain[1]}
    assert held["full"] < held["selective"] < held["none, tiled"] < held["none"]
    tokens, layers, width = sum(LENGTHS), 3, 32
    attention = tokens * layers * 4 * (width + 4)  # its output, and a log-sum-exp a head, in fp32
    assert held["selective"] - held["full"] == pytest.approx(attention, rel=0.1)


@pytest.mark.parametrize(("mode", "times"), [("none", 1), ("selective", 1), ("full", 2)])
def test_attention_is_computed_once_where_it_is_kept(mode, times):
    ops = trained(mode)[2].ops
    assert ops["delib_fast.varlen_attention_cpu.default"] == 3 * times


def test_refuses():
    assert "qwen3 moe" in ARCHITECTURES
    with pytest.raises(ConfigError, match=r"model\.mlp_tiles: Qwen3MoeForCausalLM has no layers with an MLP of plain"):
        recompute(build("qwen3 moe"), "none", mlp_tiles=2)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="torch sees no GPU"):
            recompute(build("llama"), "full", offload=True)


class Host(torch.autograd.graph.saved_tensors_hooks):
    """Stands in for torch's save_on_cpu: copies as that does, and keeps account; what is not pinned needs no GPU."""

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
def test_offload_hands_each_layers_input_to_the_host(monkeypatch, mode, lora):
    """And gives it back: the gradients are those without, to the bit. Between the passes the device holds none of the
    inputs (with frozen embeddings their output: transformers makes it a leaf, which autograd keeps). Catches a hook
    that is set where nothing is saved, and inputs that something else keeps alive."""
    expected = trained(mode, lora=lora)[0]
    monkeypatch.setattr("transformers.modeling_utils.save_on_cpu", Host)
    monkeypatch.setattr(Host, "packed", [], raising=False)
    monkeypatch.setattr(Host, "unpacked", 0, raising=False)
    held: list[int] = []

    class Looking(Watch):
        @property
        def held_bytes(self) -> int:
            gc.collect()
            held.extend(not ref.expired() for _, ref in Host.packed)
            return 0

    monkeypatch.setitem(MODES, mode, {"offload": True})
    monkeypatch.setitem(globals(), "Watch", Looking)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        found = trained(mode, lora=lora)[0]
    layers = 3
    assert [shape for shape, _ in Host.packed if shape == (1, sum(LENGTHS), 32)] == [(1, sum(LENGTHS), 32)] * layers
    assert Host.unpacked == len(Host.packed)
    assert held == [lora] + [False] * (len(held) - 1)
    assert len(held) == len(Host.packed)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_offload_on_a_gpu(mode):
    found = []
    for offload in (False, True):
        model = build("llama")
        recompute(model, mode, offload=offload)
        trainable = TrainableLM(model).cuda().bfloat16().train()
        trainable(pack(documents(LENGTHS)).to(torch.device("cuda"))).loss_sum.backward()
        found.append(gradients(trainable.model))
    assert largest_deviation(found[1], found[0])[0] == 0.0
