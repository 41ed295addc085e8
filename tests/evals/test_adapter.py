"""Evaluation of a peft adapter folder: the model with the adapter, and its distance from the base model."""

from __future__ import annotations

import json

import pytest
from eval_models import ARCHITECTURE, ROOT, make_model
from helpers.tiny_run import tiny

from delib_fast.config import ConfigError
from delib_fast.config.load import load_config
from delib_fast.evals import EvalCallback
from delib_fast.evals.run import evaluate
from delib_fast.evals.settings import load_eval_config
from delib_fast.evals.target import EvalTarget
from delib_fast.models import export_model
from delib_fast.training.run import run


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A folder with base/, merged/, and adapter/ as peft saves it: with the path of its base, without a tokenizer."""
    import peft

    path = tmp_path_factory.mktemp("adapter")
    export_model(make_model(tokenizer, 1), tokenizer, path / "base")
    wrapped = peft.get_peft_model(
        make_model(tokenizer, 1).model,
        peft.LoraConfig(
            r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
        ),
    )
    wrapped.peft_config["default"].base_model_name_or_path = str(path / "base")
    wrapped.save_pretrained(path / "adapter")
    merged = make_model(tokenizer, 1)
    merged.model.load_state_dict(wrapped.merge_and_unload().state_dict())
    export_model(merged, tokenizer, path / "merged")
    return path


def figures(path, out, **changes):
    settings = load_eval_config(
        None,
        **(
            {
                "model": str(path),
                "suites": "segments,drift",
                "limit": 4,
                "precision": "fp32",
                "out": str(out),
                "rows": {"held": str(ROOT / "examples/data/deliberation_heldout.jsonl")},
            }
            | changes
        ),
    )
    done = evaluate(EvalTarget(path, settings))
    return done, {row[0]: [cell.value for cell in row[1:4]] for row in done.results[1].tables[0].rows}


def test_an_adapter_equals_its_merged_model_and_its_base_is_the_adapter_turned_off(folder, tmp_path):
    done, found = figures(folder / "adapter", tmp_path / "a")
    _, expected = figures(folder / "merged", tmp_path / "m", base=str(folder / "base"))
    assert done.target["base"].endswith("base (the adapter turned off)")
    assert found.keys() == expected.keys() == {"cot", "response"}
    for segment in found:
        assert found[segment] == pytest.approx(expected[segment], rel=1e-4)
        assert found[segment][0] > 1e-4


def test_a_different_base_gives_different_figures(folder, tmp_path, tokenizer):
    export_model(make_model(tokenizer, 2), tokenizer, tmp_path / "other")
    _, own = figures(folder / "adapter", tmp_path / "out")
    _, other = figures(folder / "adapter", tmp_path / "out", base=str(tmp_path / "other"))  # same results folder
    assert own != other


def test_an_adapter_that_cannot_be_evaluated_is_rejected(folder, tmp_path):
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / name).write_bytes((folder / "adapter" / name).read_bytes())
    file = tmp_path / "adapter_config.json"
    theirs = json.loads(file.read_text())
    for changes, message in (
        ({"base_model_name_or_path": None}, "give --base FOLDER"),
        ({"use_dora": True}, "use_dora is True"),
        ({"r": None}, "in which peft saved a LoRA adapter"),
    ):
        file.write_text(json.dumps(theirs | changes))
        with pytest.raises(ConfigError, match=message):
            figures(tmp_path, tmp_path / "out")


def test_a_lora_run_with_the_callback_needs_no_second_model(tmp_path, monkeypatch):
    from delib_fast.evals import eval_callback

    monkeypatch.setattr(eval_callback, "build_model", lambda *_, **__: pytest.fail("a second model was built"))
    config = load_config(tiny(tmp_path, model={"architecture": ARCHITECTURE, "lora": {"r": 4}}))
    run(config, [EvalCallback(("drift",), every_steps=5, limit=2)])
    lines = [json.loads(line) for line in (tmp_path / "run/evals/in_loop.jsonl").read_text().splitlines()]
    assert all(line["figures"]["cot drift"]["value"] > 0 for line in lines)
