"""LoRA in whole runs: the published recipe on a small model, its adapter from stage to stage, and the exports."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from helpers.launch import ROOT
from helpers.small_models import documents, pack, tiny_qwen3
from helpers.tiny_run import DATA, run, tiny
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from delib_fast.config import ConfigError, LoraConfig, ModelConfig
from delib_fast.config.load import load_config
from delib_fast.models import StepCost, TrainableLM, add_adapter, build_model, load_adapter
from delib_fast.models.build import _nf4_config
from delib_fast.models.export_check import ExportCheckError
from delib_fast.training import run as training_run
from delib_fast.training.export_check import ExportChecker, Probe

ARCHITECTURE = tiny_qwen3(vocab_size=512, initializer_range=0.1)
SMALL = ["stages.msm.max_steps=3", "stages.aft.max_steps=3"]


def base_model(folder: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**ARCHITECTURE)).save_pretrained(folder / "base")
    return folder / "base"


def ledger(folder: Path) -> dict:
    return json.loads((folder / "run" / "ledger.json").read_text())


def tokenizer_of(folder: Path):
    return AutoTokenizer.from_pretrained(folder / "run" / "tokenizer")


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(90).view(3, 30)).logits


@pytest.fixture(scope="module")
def paper(tmp_path_factory) -> Path:
    """examples/msm_paper.yaml on a model of two layers and a few rows."""
    folder = tmp_path_factory.mktemp("paper")
    tree = yaml.safe_load((ROOT / "examples" / "msm_paper.yaml").read_text())
    tree["run_dir"], tree["model"]["path"] = str(folder / "run"), str(base_model(folder))
    tree["data"] = {
        "documents": {"path": str(DATA / "documents.jsonl"), "limit": 8},
        "rows": {"path": str(DATA / "deliberation.jsonl"), "limit": 30, "holdout": 0.1},
        "generic": {"path": str(DATA / "deliberation_heldout.jsonl"), "limit": 4},
    }
    tree["tokenizer"] = {"train": {"vocab_size": 500, "sources": ["documents", "rows"]}}
    for stage in tree["stages"]:
        stage |= {"pack_capacity": 1024, "tokens_per_step": 2048, "min_steps": 2, "max_steps": 3}
    tree["engine"] = {"precision": "fp32", "device": "cpu"}
    (folder / "run.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    assert run(folder / "run.yaml") == 0
    return folder


def test_the_example_is_the_published_recipe():
    config = load_config(ROOT / "examples" / "msm_paper.yaml")
    assert config.model.lora == LoraConfig(r=64, alpha=128, dropout=0, targets="all-linear", rslora=False)
    for stage in config.stages:
        optimizer = stage.optimizer
        assert (optimizer.name, optimizer.lr, optimizer.schedule, optimizer.warmup, optimizer.weight_decay) == (
            "adamw",
            1e-4,
            "cosine",
            0.05,
            0.01,
        )
        assert (stage.pack_capacity, stage.epochs, stage.adapter) == (8192, 1, "continue")


def test_aft_continues_the_adapter(paper):
    """The second stage begins where the first ended, by the ledger and by the weights."""
    msm, aft = ledger(paper)["stages"]
    assert aft["parent"] == msm["adapter"]
    assert aft["base"] == msm["parent"]
    assert msm["parent"]["path"] == str(paper / "base")
    assert not (paper / "run" / "stages" / "msm" / "model").exists(), "nothing starts from the merged model"
    before, after = adapter(paper / "run" / "stages" / "msm" / "adapter"), adapter(paper / "run" / "adapter")
    # AdamW moves a weight by at most the learning rate per step; the 3 steps are warm-up and a falling cosine.
    assert all((after[name] - weight).abs().max() <= 3.1e-4 for name, weight in before.items())
    assert any(not torch.equal(after[name], weight) for name, weight in before.items() if "lora_B" in name)
    assert {weight.dtype for weight in after.values()} == {torch.float32}
    assert aft["trained_parameters"] == sum(w.numel() for w in after.values())


def test_adapter_and_merged_model_agree(paper):
    """The adapter is loaded with peft, the merged model with plain transformers."""
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(paper / "base")
    plain = logits(base)
    adapted = logits(PeftModel.from_pretrained(base, paper / "run" / "adapter"))
    merged = logits(AutoModelForCausalLM.from_pretrained(paper / "run" / "model"))
    assert (adapted - merged).abs().max() <= 1e-5 * merged.abs().max()
    assert (adapted - plain).abs().max() > 1e-4 * plain.abs().max(), "it learned something"
    head = load_file(paper / "run" / "model" / "model.safetensors")["lm_head.weight"]
    assert torch.equal(head, load_file(paper / "base" / "model.safetensors")["lm_head.weight"])
    first, last = (stage["export_check"] for stage in ledger(paper)["stages"])
    assert set(first) == {"rows", "adapter"}
    assert first["adapter"]["tensors"] == last["adapter"]["tensors"] == 28
    assert max(part["difference"] for part in (first["adapter"], last["adapter"], last["model"])) < 1e-5
    assert abs(last["model"]["lost_effect"]) < 1e-3


def test_a_merge_that_loses_the_adapter_is_reported(tmp_path, capsys, monkeypatch):
    """A wrong scale is an error in fp32. In bf16, where rounding can lose an effect, it is a warning."""
    from delib_fast.models import lora

    merge = lora.merged_weights

    def halves(model, weights, dtype):
        return merge(model, {k: w / 2 if "lora_B" in k else w for k, w in weights.items()}, dtype)

    monkeypatch.setattr("delib_fast.models.merged_weights", halves)
    monkeypatch.setattr("delib_fast.training.export_check.MIN_GAIN_NATS", 0.0)
    base = {"path": str(base_model(tmp_path)), "lora": {"r": 4, "alpha": 4}}
    short = [
        f"stages.{stage}.{setting}" for stage in ("msm", "aft") for setting in ("max_steps=1", "optimizer.lr=1e-3")
    ]
    engine = {"precision": "bf16", "device": "cpu"}
    assert run(tiny(tmp_path, model=base, engine=engine), *short) == 0
    printed = " ".join(capsys.readouterr().out.split())
    found = re.search(r"the merged model lacks (\d+)% of the adapter's effect on the logits: in bf16", printed)
    assert found, printed
    assert 40 <= int(found[1]) <= 65
    nll = ledger(tmp_path)["stages"][1]["export_check"]["model"]["nll"]
    assert 0.4 < (nll["merged"] - nll["adapter"]) / (nll["base"] - nll["adapter"]) < 0.65
    assert re.search(
        rf"aft: nll of {nll['tokens']:,} held-out tokens: base {nll['base']:.4f}, adapter {nll['adapter']:.4f}, merged "
        rf"into bf16 {nll['merged']:.4f}: merging lost [456]\d\.\d% of what the adapter learned; export.dtype: fp32 "
        "merges without rounding",
        printed,
    )
    fp32 = SimpleNamespace(config=load_config(tmp_path / "run.yaml", ["engine.precision=fp32"]))
    checker = ExportChecker(fp32, Probe("held-out", [], []), pytest.fail)
    checker._judge_lost_effect(0.09, tmp_path)
    checker._judge_lost_effect(None, tmp_path)
    with pytest.raises(
        ExportCheckError, match="the merged model lacks 50% of the adapter's effect on the logits; 10% is"
    ):
        checker._judge_lost_effect(0.5, tmp_path)


@pytest.mark.parametrize("lora", [{"r": 4, "alpha": 8}, None], ids=["lora", "every weight"])
def test_an_fp32_export_of_a_bf16_run_is_not_rounded(tmp_path, lora):
    """With LoRA it is W + s·B·A. Rounded to bf16, it is what the run exports otherwise."""
    base = base_model(tmp_path)
    stage = {"kind": "aft", "train": ["deliberation"], "pack_capacity": 1024, "tokens_per_step": 2048, "max_steps": 1}
    config = tiny(
        tmp_path,
        model={"path": str(base), **({} if lora is None else {"lora": lora})},
        stages=[{**stage, "eval": ["deliberation_heldout"], "optimizer": {"lr": 0.01, "warmup": 0.0}}],
        tokenizer={"train": {"vocab_size": 512, "sources": ["deliberation"]}},
        engine={"precision": "bf16", "device": "cpu"},
    )
    assert run(config) == 0
    assert run(config, "export.dtype=fp32", f"run_dir={tmp_path / 'exact'}") == 0
    rounded, exact = (load_file(tmp_path / name / "model/model.safetensors") for name in ("run", "exact"))
    assert ({w.dtype for w in rounded.values()}, {w.dtype for w in exact.values()}) == (
        {torch.bfloat16},
        {torch.float32},
    )
    assert all(torch.equal(exact[key].bfloat16(), weight) for key, weight in rounded.items())
    name = "model.layers.1.mlp.up_proj"
    assert not torch.equal(exact[f"{name}.weight"], rounded[f"{name}.weight"].float())
    if lora is not None:
        start, learned = load_file(base / "model.safetensors"), adapter(tmp_path / "exact/adapter")
        a, b = (learned[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        assert torch.equal(exact[f"{name}.weight"], start[f"{name}.weight"].bfloat16().float() + 8 / 4 * (b @ a))
    ledgers = [json.loads((tmp_path / folder / "ledger.json").read_text()) for folder in ("run", "exact")]
    assert [found["stages"][0]["model_dtype"] for found in ledgers] == ["bf16", "fp32"]


def test_merge_starts_a_new_adapter_on_the_merged_model(tmp_path):
    path = tiny(tmp_path, model={"path": str(base_model(tmp_path)), "lora": {"r": 4, "targets": ["q_proj", "up_proj"]}})
    assert run(path, *SMALL, "stages.aft.adapter=merge") == 0
    msm, aft = ledger(tmp_path)["stages"]
    assert aft["parent"] == msm["model"] != msm["parent"]
    assert "base" not in aft
    before, after = adapter(tmp_path / "run/stages/msm/adapter"), adapter(tmp_path / "run/adapter")
    assert {name.rpartition("model.layers.")[2][2:].split(".")[1] for name in before} == {"q_proj", "up_proj"}
    drawn = {name: w for name, w in after.items() if "lora_A" in name}
    # Both began with the same random values; Adam has since moved them by a few learning rates of 0.01.
    assert all((w - before[name]).abs().max() < 0.1 for name, w in drawn.items())
    start, merged = (
        load_file(tmp_path / "base/model.safetensors"),
        load_file(tmp_path / "run/stages/msm/model/model.safetensors"),
    )
    moved = {name for name, w in start.items() if not torch.equal(w, merged[name])}
    assert moved == {f"model.layers.{i}.{part}.weight" for i in (0, 1) for part in ("self_attn.q_proj", "mlp.up_proj")}


def test_a_saved_configuration_resumes_in_another_folder(tmp_path, monkeypatch, capsys):
    """Also the second stage, whose base the ledger names; and by another path to the same files."""
    base_model(tmp_path)
    tiny(tmp_path, run_dir="run", model={"path": "base", "lora": {"r": 4}})
    monkeypatch.chdir(tmp_path)
    assert run(Path("run.yaml"), *SMALL, "data.deliberation=none.jsonl") == 2
    with monkeypatch.context() as stops:
        stops.setattr("delib_fast.training.run.run_stage", _only_the_first(training_run.run_stage))
        with pytest.raises(KeyboardInterrupt):
            training_run.run(load_config("run.yaml", SMALL))
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir("/")
    saved = tmp_path / "run" / "config.yaml"
    assert run(saved, "data.deliberation.path=" + str(tmp_path / "link" / "deliberation.jsonl")) == 0
    assert "msm: already finished" in capsys.readouterr().out
    assert [stage["status"] for stage in ledger(tmp_path)["stages"]] == ["finished", "finished"]


def _only_the_first(run_stage):
    def run(context, index, callbacks=()):
        if index:
            raise KeyboardInterrupt
        run_stage(context, index, callbacks)

    return run


def test_a_given_adapter_is_continued(paper, tmp_path):
    path = tiny(
        tmp_path, model={"path": str(paper / "base"), "lora": {"path": str(paper / "run" / "adapter"), "alpha": 64}}
    )
    assert run(path, *SMALL) == 2, "its alpha differs; a corrected command reuses the run_dir"
    assert (
        run(path, *SMALL, "model.lora.alpha=128", "stages.msm.optimizer.lr=1e-9", "stages.aft.optimizer.lr=1e-9") == 0
    )
    assert ledger(tmp_path)["stages"][0]["parent"] == ledger(paper)["stages"][1]["adapter"]
    for name, weight in adapter(tmp_path / "run/adapter").items():
        torch.testing.assert_close(weight, adapter(paper / "run/adapter")[name], rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_qlora_merges_into_the_exact_weights(tmp_path, monkeypatch):
    """QLoRA: frozen matrices are in nf4 during training; the adapter is merged into the exact weights at the end."""
    pytest.importorskip("bitsandbytes")
    from peft import PeftModel

    path = tiny(
        tmp_path,
        model={"path": str(base_model(tmp_path)), "lora": {"r": 4, "quantize": "nf4"}},
        engine={"precision": "bf16", "device": "cpu"},
    )
    assert run(path, *SMALL) == 0
    source, tokenizer = ModelConfig(path=str(tmp_path / "base")), tokenizer_of(tmp_path)
    exact, packed = (
        StepCost.of(TrainableLM(build_model(source, tokenizer, dtype="bf16", quantize=how).requires_grad_(False)))
        for how in ("none", "nf4")
    )
    assert packed == exact, "FLOPs are those of the matrix, not of the packed tensor"
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16).float()
    plain = logits(base)
    expected = logits(PeftModel.from_pretrained(base, tmp_path / "run/adapter"))
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "run/model", dtype=torch.float32))
    checked = ledger(tmp_path)["stages"][1]["export_check"]
    assert checked["model"]["tolerance"] is None  # the model in training has a 4-bit base
    assert "lost_effect" not in checked["model"]
    # One more rounding to bf16 is 1/200 of the adapter's effect; merging into the 4-bit weights would be a third.
    assert (merged - expected).norm() < 0.02 * (expected - plain).norm()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="nf4 needs bitsandbytes, which is not installed"):
        _nf4_config(torch.bfloat16)


def model() -> torch.nn.Module:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**ARCHITECTURE))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("lm_head", "'lm_head' is the output head or the embedding"),
        ("embed_tokens", "'embed_tokens' is the output head or the embedding"),
        ("q_prj", "'q_prj' is not an nn.Linear of Qwen3ForCausalLM (did you mean 'q_proj'?)"),
        ("self_attn", "'self_attn' is not an nn.Linear"),
    ],
)
def test_refuses_targets_that_are_not_linear_layers_of_the_trunk(target, message):
    with pytest.raises(ConfigError) as error:
        add_adapter(model(), LoraConfig(targets=["v_proj", target]), base=None, seed=0)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 8}, "its r is 64, but 8 in this run; set model.lora.r to 64"),
        ({"targets": ["q_proj"]}, "the model does not adapt model.layers.0.mlp.down_proj.lora_A"),
        ({"rslora": True}, "its use_rslora is False, but True in this run; set model.lora.rslora to False"),
    ],
)
def test_refuses_another_adapter(paper, change, message):
    other = model()
    add_adapter(other, LoraConfig(**change), base=None, seed=0)
    with pytest.raises(ConfigError) as error:
        load_adapter(other, paper / "run" / "adapter")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stages.msm.adapter=merge"], "stages.msm.adapter: there is nothing to merge (it is the first stage)"),
        (
            ["model.lora=null", "stages.aft.adapter=merge"],
            "stages.aft.adapter: there is nothing to merge (model.lora is",
        ),
        (["model.lora.quantize=nf4", "engine.zero_stage=3"], "ZeRO 3 cannot shard 4-bit weights"),
        (
            ["model.lora.quantize=nf4", "model.path=null", "model.architecture={model_type: qwen3}"],
            "a new model has no weights to keep in 4 bits",
        ),
    ],
)
def test_refuses_settings_that_conflict(overrides, message):
    with pytest.raises(ConfigError) as error:
        load_config(ROOT / "examples" / "msm_paper.yaml", overrides)
    assert message in str(error.value)


def test_frozen_head_makes_no_weight_gradient(monkeypatch):
    """One of the head's three matrix products computes the gradient of its weight; a frozen head skips it."""
    op = sys.modules["delib_fast.ops.linear_cross_entropy"]  # the package's attribute of that name is the function
    wanted = []

    def spy(call):
        wanted.append((call.need_grad_hidden, call.need_grad_weight))
        return op._run_reference(call)

    monkeypatch.setattr(op, "choose", lambda *_: op.Backend("spy", spy, op._always_available))
    adapted = model()
    add_adapter(adapted, LoraConfig(r=2), base=None, seed=0)
    trainable = TrainableLM(adapted).train()
    trainable(pack(documents())).loss_sum.backward()
    assert wanted == [(True, False)]
    assert all((p.grad is not None) == (".lora_" in name) for name, p in trainable.named_parameters())
