"""Whole runs with a teacher that reads the spec: what they record, refuse, resume and leave as it was."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from helpers.callbacks import StopAfter
from helpers.launch import ROOT
from helpers.run_facts import facts
from helpers.small_models import tiny_qwen3
from helpers.tiny_run import metrics, tiny, weights
from safetensors.torch import load_file

from delib_fast.config import ConfigError
from delib_fast.config.load import load_config
from delib_fast.data import DataError
from delib_fast.digests import hash_tree, read_json
from delib_fast.preview.dry_run import dry_run
from delib_fast.train import main
from delib_fast.training.memory import memory_parts

SPEC = "# Rules\n\n" + "\n".join(
    f"{k}. The assistant answers question number {k} as a careful and kind adviser would answer it, and says why."
    for k in range(1, 15)
)


def distil(folder: Path, teacher: dict, *, spec: str = SPEC, stage: dict | None = None, **changes) -> Path:
    """A run of one AFT stage with a teacher: 4 steps."""
    path = tiny(folder)
    (folder / "spec.md").write_text(spec)
    tree = yaml.safe_load(path.read_text())
    tree["tokenizer"]["train"]["sources"] = ["deliberation"]
    tree["model"]["architecture"]["num_hidden_layers"] = 1
    tree["data"] = {k: v for k, v in tree["data"].items() if k.startswith("deliberation")}
    small = {"pack_capacity": 1024, "tokens_per_step": 2048, "max_steps": 4}
    tree["stages"] = [tree["stages"][1] | small | {"teacher": {"spec": "spec.md", **teacher}} | (stage or {})]
    tree |= changes
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def lora(**keys) -> dict:
    architecture = tiny_qwen3(tie_word_embeddings=True, num_hidden_layers=1, **keys)
    return {"architecture": architecture, "lora": {"r": 4, "dropout": 0.1}}


@pytest.fixture(scope="module")
def taught_by_itself(tmp_path_factory):
    """A run whose teacher is the model itself, and which was stopped once and resumed."""
    folder = tmp_path_factory.mktemp("distil")
    changes = {"checkpoint": {"every_steps": 1}, "log": {"every_steps": 2}}
    whole = distil(folder / "whole", {"model": "self", "cot_weight": 0.5, "nll_weight": 0.5}, **changes)
    assert main(["--config", str(whole)]) == 0
    stopped = distil(folder / "stopped", {"model": "self", "cot_weight": 0.5, "nll_weight": 0.5}, **changes)
    assert main(["--config", str(stopped)], [StopAfter(3)]) == 0
    assert main(["--config", str(stopped)]) == 0
    return whole.parent, stopped.parent


def test_a_run_resumes_bitwise(taught_by_itself):
    whole, stopped = taught_by_itself
    assert facts(stopped / "run") == facts(whole / "run")


def test_the_ledger_and_the_metrics_describe_the_teacher(taught_by_itself):
    run_dir = taught_by_itself[0] / "run"
    (entry,) = read_json(run_dir / "ledger.json")["stages"]
    assert entry["cot_under_pressure"] == "SFT and distillation"
    recorded = dict(entry["teacher"])
    assert len(recorded.pop("spec_sha256")) == 64
    assert Path(recorded.pop("spec")).read_text() == SPEC
    assert recorded == {
        "sections": "all",
        "model": "self",
        "weight": 1.0,
        "nll_weight": 0.5,
        "cot_weight": 0.5,
        "direction": "reverse",
    }
    for record in metrics(run_dir):
        loss = total = 0.0
        for name, weight in (("cot", 0.5), ("response", 1.0)):
            part = record["segments"][name]
            assert part.keys() == {"nll", "tokens", "divergence", "teacher_nll"}
            loss += part["tokens"] * (part["divergence"] * (0.5 if name == "cot" else 1.0) + 0.5 * weight * part["nll"])
            total += part["tokens"] * weight
        assert record["loss"] == pytest.approx(loss / total, rel=1e-6)


def test_another_model_teaches_and_is_recorded(taught_by_itself, tmp_path):
    """The exported model of one run teaches another, with an adapter; its weights do not change."""
    model = taught_by_itself[0] / "run" / "model"
    before = hash_tree(str(model))
    path = distil(tmp_path, {"model": str(model), "direction": "forward"}, model=lora(), stage={"cot": "context"})
    assert main(["--config", str(path)]) == 0
    (entry,) = read_json(tmp_path / "run" / "ledger.json")["stages"]
    (of_teacher,) = (s["model"] for s in read_json(taught_by_itself[0] / "run" / "ledger.json")["stages"])
    assert entry["teacher_model"] == {"path": str(model), "sha256": of_teacher["sha256"]}
    assert entry["cot_under_pressure"] == "no"
    assert {name for record in metrics(tmp_path / "run") for name in record["segments"]} == {"response"}
    assert hash_tree(str(model)) == before


def test_the_base_teaches_its_adapter(tmp_path):
    """The divergence falls from that of the spec alone, since a new adapter is 0: over four epochs of the same rows."""
    stage = {"epochs": 4, "max_steps": None, "optimizer": {"lr": 0.002}}
    path = distil(tmp_path, {"model": "base", "nll_weight": 0}, stage=stage, model=lora(initializer_range=0.3))
    assert main(["--config", str(path)]) == 0
    records = metrics(tmp_path / "run")
    divergences = [record["segments"]["response"]["divergence"] for record in records]
    epoch = len(records) // 4
    assert 0.01 < sum(divergences[-epoch:]) < 0.5 * sum(divergences[:epoch])
    last = records[-1]
    assert last["loss"] == pytest.approx(
        last["segments"]["response"]["divergence"]
        * last["segments"]["response"]["tokens"]
        / (last["segments"]["response"]["tokens"] + 0.5 * cot_tokens(tmp_path, last["step"])),
        rel=1e-5,
    )
    (entry,) = read_json(tmp_path / "run" / "ledger.json")["stages"]
    assert entry["cot_under_pressure"] == "no"


def cot_tokens(folder: Path, step: int) -> int:
    """The CoT tokens of a step, which has weight 0.5 each in the normalizer although nothing trains them."""
    config = load_config(folder / "run.yaml")
    with dry_run(config) as dataset:
        packs = dataset.batches(config.stages[0]).step(step - 1)
    return sum(int((pack.segment_ids == 1).sum()) for pack in packs)


def test_the_same_shared_and_unshared_teacher(taught_by_itself, tmp_path):
    """share_prompts: never gives each row its own copy of the spec, and trains the same."""
    never = distil(
        tmp_path,
        {"model": "self", "cot_weight": 0.5, "nll_weight": 0.5},
        stage={"share_prompts": "never"},
        log={"every_steps": 2},
    )
    assert main(["--config", str(never)]) == 0
    for one, other in zip(metrics(tmp_path / "run"), metrics(taught_by_itself[0] / "run"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-4)
    for name, weight in weights(tmp_path / "run").items():
        assert torch.allclose(weight, weights(taught_by_itself[0] / "run")[name], atol=1e-4), name


def test_the_spec_in_a_prompt_of_the_student_is_refused(tmp_path):
    path = distil(tmp_path, {"model": "self"}, stage={"system_prompt": SPEC})
    config = load_config(path)
    with (
        dry_run(config) as dataset,
        pytest.raises(DataError, match=r"stages.aft.system_prompt: the prompt contains text of the spec"),
    ):
        dataset.batches(config.stages[0])


@pytest.mark.parametrize(
    ("teacher", "stage", "message"),
    [
        (
            {"model": "base"},
            {},
            r"stages.aft.teacher.model: base is the model without its adapter, but model.lora is not set; set it, or "
            "set teacher.model to self or to the folder of a model",
        ),
        (
            {"model": "self", "cot_weight": 0.5},
            {"cot": "strip"},
            r"teacher.cot_weight is 0.5, but cot: strip removes the CoT; set cot to train or context, or",
        ),
        ({"model": "self", "cot_weight": -1}, {}, r"cot_weight.*greater than or equal to 0"),
        ({"model": "self", "weight": 0}, {}, r"weight.*greater than 0"),
        ({"model": "self", "direction": "sideways"}, {}, r"direction.*'forward', 'reverse' or 'jsd'"),
        ({"model": "self"}, {"kind": "msm", "cot_weight": None}, r"teacher"),
    ],
)
def test_configurations_that_cannot_be_right_are_refused(tmp_path, teacher, stage, message):
    path = distil(tmp_path, teacher)
    tree = yaml.safe_load(path.read_text())
    tree["stages"][0] = {k: v for k, v in (tree["stages"][0] | stage).items() if v is not None}
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_a_teacher_that_cannot_be_used_is_refused(taught_by_itself, tmp_path):
    def refusal(path: Path) -> str:
        config = load_config(path)
        with dry_run(config) as dataset, pytest.raises((ConfigError, DataError)) as error:
            dataset.batches(config.stages[0])
        return str(error.value)

    path = distil(tmp_path / "a", {"model": "self"}, spec=" \n")
    assert refusal(path) == (
        f"stages.aft.teacher.spec: {tmp_path / 'a' / 'spec.md'} is empty; give the file of the spec"
    )
    path = distil(tmp_path / "p", {"model": "self"}, spec="You are {model_name}. " + SPEC)
    assert refusal(path) == (
        f"stages.aft.teacher.spec: {tmp_path / 'p' / 'spec.md'} has the placeholder {{model_name}}, which only "
        "`delib-fast deliberate` fills in; write the name into a copy of the file"
    )
    path = distil(tmp_path / "b", {"model": "self", "spec": "nowhere.md"})
    assert refusal(path).startswith(f"stages.aft.teacher.spec: {tmp_path / 'b' / 'nowhere.md'} cannot be read: ")
    path = distil(tmp_path / "c", {"model": "self"}, spec=SPEC * 50)
    tree = yaml.safe_load(path.read_text())
    tree["model"]["architecture"]["max_position_embeddings"] = 2048
    path.write_text(yaml.safe_dump(tree))
    assert "tokens, more than its 2,048 positions (max_position_embeddings): shorten teacher.spec" in refusal(path)
    model = tmp_path / "model"
    shutil.copytree(taught_by_itself[0] / "run" / "model", model)
    path = distil(
        tmp_path / "d", {"model": str(model)}, tokenizer={"train": {"vocab_size": 400, "sources": ["deliberation"]}}
    )
    message = refusal(path)
    assert message.startswith(f"stages.aft.teacher.model: {model} has another tokenizer than the run (the id of ")
    assert message.endswith("give a model with the run's tokenizer")
    (model / "config.json").unlink()
    path = distil(tmp_path / "e", {"model": str(model)})
    assert refusal(path).startswith("stages.aft.teacher.model: ")


def test_the_memory_of_another_model_counts(taught_by_itself, tmp_path):
    model = taught_by_itself[0] / "run" / "model"
    config = load_config(distil(tmp_path, {"model": str(model)}, model=lora()))
    (stage,) = config.stages
    with dry_run(config) as dataset:
        shape = dataset.stage_shape(stage)
    stored = sum(weight.numel() for weight in load_file(model / "model.safetensors").values())
    assert shape.teacher_parameters == stored
    parts = {part.name: part.bytes for part in memory_parts(config, stage, shape, 4, "fp32")}
    assert parts["teacher"] == 4 * stored


def test_base_and_self_are_words_even_beside_folders_of_that_name(tmp_path):
    for name in ("base", "self"):
        path = distil(tmp_path, {"model": name}, model=lora())
        (tmp_path / name).mkdir()
        assert load_config(path).stages[0].teacher.model == name
    path = distil(tmp_path, {"model": "./base"}, model=lora())
    assert load_config(path).stages[0].teacher.model == str(tmp_path / "base")


def test_the_example_is_valid():
    config = load_config(ROOT / "examples" / "distillation.yaml")
    assert config.stages[-1].teacher.model == "base"
