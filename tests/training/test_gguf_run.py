"""A run and its evaluation on a model in a GGUF file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from helpers.gguf_files import small_llama, write_gguf
from helpers.tiny_run import run, tiny
from safetensors.torch import load_file

from delib_fast.config.load import load_config
from delib_fast.digests import read_json
from delib_fast.evals.moments import MomentLoader, find_moments
from delib_fast.evals.settings import load_eval_config
from delib_fast.evals.target import EvalTarget
from delib_fast.models import local_model

pytest.importorskip("gguf")


@pytest.fixture
def gguf_run(tmp_path, monkeypatch) -> Path:
    """The YAML file of a LoRA run of one step in each stage, on `small.gguf` next to it."""
    monkeypatch.setenv("DELIB_FAST_CACHE", str(tmp_path / "cache"))
    path = tiny(tmp_path, model={"path": "small.gguf", "lora": {"r": 4, "alpha": 8}})
    write_gguf(tmp_path / "small.gguf")
    tree = yaml.safe_load(path.read_text())
    del tree["tokenizer"]
    for stage in tree["stages"]:
        stage |= {"max_steps": 1, "pack_capacity": 8192, "tokens_per_step": 8192}
    path.write_text(yaml.safe_dump(tree))
    return path


class FailsInAFT:
    def micro_batch(self, batch, output):
        pass

    def step_end(self, run, engine, stage):
        if stage.name == "aft":
            raise RuntimeError("the machine fails")


def test_a_run_on_a_gguf_file_resumes_without_the_cache(tmp_path, gguf_run):
    from delib_fast.training.run import run as run_stages

    with pytest.raises(RuntimeError, match="the machine fails"):
        run_stages(load_config(gguf_run), [FailsInAFT()])
    shutil.rmtree(tmp_path / "cache")
    assert run(gguf_run) == 0
    folder = local_model(str(tmp_path / "small.gguf"))
    saved = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == folder  # peft and transformers load the base from there
    msm, aft = read_json(tmp_path / "run/ledger.json")["stages"]
    assert msm["parent"]["path"] == aft["base"]["path"] == str(tmp_path / "small.gguf")
    assert msm["parent"]["sha256"] == aft["base"]["sha256"] is not None

    import peft
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(saved["base_model_name_or_path"], dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(base, tmp_path / "run/adapter").merge_and_unload().state_dict()
    for name, weight in load_file(tmp_path / "run/model/model.safetensors").items():
        torch.testing.assert_close(merged[name].to(weight.dtype), weight, rtol=0, atol=1e-6)

    # Drift is measured from the file's model; the file itself can be evaluated too, next to which the results go.
    target = EvalTarget(tmp_path / "run", load_eval_config(None, model=str(tmp_path / "run")))
    assert target.base_key == msm["parent"]["sha256"]
    target = EvalTarget(tmp_path / "small.gguf", load_eval_config(None, model="small.gguf"))
    assert (str(target.model_folder), target.sha256) == (folder, msm["parent"]["sha256"])
    assert target.results_folder == tmp_path / "small-evals"


def change(path: Path) -> None:
    """Replace a file of `write_gguf` by that of other weights."""
    model, tokenizer = small_llama()
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    write_gguf(path, model=model, tokenizer=tokenizer)


def test_replies_of_a_file_that_changed_are_not_those_of_the_run(tmp_path, gguf_run):
    """Neither shown as the base of the run, nor taken from the cache of replies."""
    assert run(gguf_run) == 0
    before = find_moments(tmp_path / "run")
    assert [moment.name for moment in before.found] == ["base", "after msm", "after aft"]
    loader = MomentLoader(before, None, device="cpu", precision="fp32")
    key = loader.key(before.found[0])
    change(tmp_path / "small.gguf")
    assert loader.key(before.found[0]) != key
    after = find_moments(tmp_path / "run")
    assert "base" not in [moment.name for moment in after.found]
    assert after.missing["base"] == (
        f"{tmp_path / 'small.gguf'} has changed since the run started from it; restore it, or give --base FOLDER"
    )


def test_a_file_that_changed_between_the_stages_is_refused(tmp_path, gguf_run, capsys):
    from delib_fast.training.run import run as run_stages

    with pytest.raises(RuntimeError, match="the machine fails"):
        run_stages(load_config(gguf_run, ["engine.zero_stage=3"]), [FailsInAFT()])  # reads weight by weight
    change(tmp_path / "small.gguf")
    assert run(gguf_run) == 1
    assert "small.gguf is no longer the model whose adapter stage 'msm' trained" in capsys.readouterr().err
