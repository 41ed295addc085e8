"""The figures of a run: counted FLOPs, the rate of known GPUs, metrics records, and the services that receive them."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers.tiny_run import metrics, run, tiny
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config, Qwen3ForCausalLM

from delib_fast.data import Example, PackedDataLoader
from delib_fast.digests import read_json
from delib_fast.models import StepCost, TrainableLM
from delib_fast.training.loggers import Loggers
from delib_fast.training.throughput import known_tflops

SIZES = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=64,
)


def packs(lengths: list[int], prompt: int) -> list:
    """One pack of sequences whose first `prompt` tokens are not targets."""
    import numpy as np

    examples = [
        Example(np.arange(n, dtype=np.int32) % 64, np.repeat(np.int8([0, 2]), [prompt, n - prompt]), "rows:1")
        for n in lengths
    ]
    batches = PackedDataLoader(
        examples,
        pack_capacity=sum(lengths),
        packs_per_step=1,
        segment_weights=(0, 1, 1, 1),
        seed=0,
        epochs=1,
        rank=0,
        world_size=1,
    )
    return batches.step(0)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("frozen", [False, True])
def test_flops_match_torch_counter(tied, frozen):
    """Against torch's own counter on the eager model, which has the same products, but twice as many in attention,
    since it also computes the half that the mask hides."""
    model = Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=tied, attn_implementation="eager"))
    if frozen:  # only the gradient of its input is computed
        model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    n = 24
    with FlopCounterMode(display=False) as counter:
        model(torch.arange(n)[None]).logits.sum().backward()
    cost = StepCost.of(TrainableLM(model))
    ours = (cost.per_token + cost.per_supervised_token) * n + cost.per_pair * len(cost.windows) * n * n
    assert ours == counter.get_total_flops()


def test_flops_of_a_pack_follow_its_sequences():
    model = Qwen3ForCausalLM(Qwen3Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1))
    cost = StepCost.of(TrainableLM(model))
    assert cost.windows == (None, 4)
    pairs = (10 * 11 / 2 + 6 * 7 / 2) + (4 * 5 / 2 + 6 * 4 + 4 * 5 / 2 + 2 * 4)
    supervised = (10 - 3) + (6 - 3)
    assert (
        cost.flops(packs([10, 6], prompt=3))
        == cost.per_token * 16 + cost.per_supervised_token * supervised + cost.per_pair * pairs
    )


def test_metrics_records_agree_with_the_ledger_and_tensorboard(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines = metrics(finished)
    stages = {s["name"]: s for s in json.loads((finished / "ledger.json").read_text())["stages"]}
    for line in lines:
        assert line["tokens"] == pytest.approx(line["fill"] * 2048)
        assert 0 < line["mfu"] < 1.5
        assert line["model_tflops_per_s"] == pytest.approx(line["mfu"] * stages[line["stage"]]["peak_tflops_per_s"])
        assert 0 <= line["data_wait_s"] < line["seconds"]
        assert line["memory_peak_mib"] > 100
    events = EventAccumulator(str(finished / "tensorboard"))
    events.Reload()
    logged = {e.step: e.value for e in events.Scalars("loss")}
    assert sorted(logged) == list(range(1, len(lines) + 1)), "the steps of a stage continue those of the previous one"
    assert [logged[k] for k in sorted(logged)] == pytest.approx([line["loss"] for line in lines])
    assert {e.step for e in events.Scalars("nll/cot")} == {
        k for k, line in enumerate(lines, 1) if "cot" in line["segments"]
    }


def test_trackers_must_be_installed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "wandb" else SimpleNamespace())
    assert run(tiny(tmp_path), "log.trackers=[wandb]") == 2
    assert "log.trackers names wandb, which is not installed: pip install wandb" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


class Wandb:
    """A stand-in for wandb that records its arguments; `log` fails from the third record on."""

    Settings = dict

    def __init__(self) -> None:
        self.given, self.lines = {}, []

    def init(self, **given):
        self.given = given
        return SimpleNamespace(id="abc", log=self.log, finish=lambda: None)

    def log(self, figures, step):
        if len(self.lines) == 2:
            raise ConnectionError("no route")
        self.lines.append((step, figures))


def test_a_tracker_gets_metrics_but_no_secret_and_may_fail(tmp_path, monkeypatch):
    from delib_fast.config.load import load_config

    fake, warnings = Wandb(), []
    monkeypatch.setitem(sys.modules, "wandb", fake)
    path = tiny(tmp_path, deepspeed={"comet": {"api_key": "canary-1"}}, log={"trackers": ["wandb"]})
    monkeypatch.setenv("WANDB_API_KEY", "canary-2")
    trackers = Loggers(load_config(path), tmp_path, enabled=True, warn=warnings.append)
    trackers.begin_stage(10, 4)
    record = {
        "stage": "aft",
        "step": 5,
        "loss": 1.5,
        "gradient_norm": None,
        "segments": {"cot": {"nll": 2.0, "accuracy": 0.5, "tokens": 7}},
    }
    for _ in range(4):
        trackers.log(record)
    trackers.close()
    assert fake.lines == [(15, {"loss": 1.5, "nll/cot": 2.0, "accuracy/cot": 0.5})] * 2
    assert len(warnings) == 1
    assert "no route" in warnings[0]
    assert fake.given["id"] is None
    assert "canary" not in json.dumps(fake.given, default=str)
    assert read_json(tmp_path / "trackers.json") == {"wandb": "abc"}
    again = Loggers(load_config(path), tmp_path, enabled=True, warn=warnings.append)
    again.begin_stage(10, 5)
    assert fake.given["id"] == "abc", "a resumed run continues under its id"


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA GB200", 2500),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB300", 2500),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA L40S", 362),
        # another GPU, or a slice of one, whose name contains the name of a known one
        ("NVIDIA RTX A4000", None),
        ("NVIDIA A10G", None),
        ("NVIDIA RTX A6000", None),
        ("NVIDIA H20", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)
def test_rates_of_known_gpus(name, tflops):
    assert known_tflops(name) == tflops
