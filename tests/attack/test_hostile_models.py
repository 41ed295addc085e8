"""Training on hostile model folders: each is refused with a readable error, or trained on without harm."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
import yaml
from helpers.launch import ROOT
from hostile_models import HOSTILE


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A small model folder that loads."""
    from helpers.small_models import tiny_qwen3

    from delib_fast.config import ModelConfig
    from delib_fast.models import build_model, export_model, train_tokenizer

    folder = tmp_path_factory.mktemp("good") / "model"
    rows = (ROOT / "examples" / "data" / "deliberation.jsonl").read_text().splitlines()[:24]
    tokenizer = train_tokenizer((json.loads(row)["response"] for row in rows), 400)
    export_model(build_model(ModelConfig(architecture=tiny_qwen3()), tokenizer), tokenizer, folder)
    return folder


def configure(folder: Path, model: Path) -> Path:
    rows = (ROOT / "examples" / "data" / "deliberation.jsonl").read_text().splitlines(keepends=True)[:8]
    (folder / "rows.jsonl").write_text("".join(rows))
    small = {"pack_capacity": 2048, "tokens_per_step": 2048, "max_steps": 1}
    tree = {
        "run_dir": str(folder / "run"),
        "model": {"path": str(model)},
        "data": {"rows": "rows.jsonl"},
        "stages": [{"kind": "aft", "train": ["rows"], **small}],
        "engine": {"precision": "fp32", "device": "cpu"},
        "log": {"tensorboard": False},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def hostile_copies(good: Path, top: Path) -> list[str]:
    """A copy of the good folder for each attack, below `top`; returns their names, the first unchanged."""
    names = ["unchanged", *HOSTILE]
    for name in names:
        folder = top / name / "model"
        shutil.copytree(good, folder)
        if name in HOSTILE:
            HOSTILE[name](folder, canary(top, name))
    return names


def canary(top: Path, name: str) -> Path:
    """The file that exists if code of the folder ran."""
    return top.parent / f"{name}-ran"


LOADED = {
    "unchanged",
    "code_next_to_a_known_type",
    "code_in_the_tokenizer",
    "code_of_another_repository",
    "a_custom_generate",
    "pickled_weights_next_to_good_ones",
    "a_template_that_reaches_for_the_system",
    "a_template_that_loops",
    "a_template_that_fills_memory",
    "a_template_that_does_not_parse",
    "a_context_of_a_quintillion",
    "an_unknown_quantization",
    "tokenizer_class_unknown",
    "template_a_number",
    "added_token_with_a_huge_id",
    "model_max_length_negative",
    "tokenizer_of_another_file",
    "a_tensor_of_another_shape",
    "a_rope_with_theta_0",
    "a_rope_with_theta_nan",
    "an_epsilon_that_is_nan",
    "weights_of_nan",
}
"""What loads: what is hostile in it is not used, or is found later (a template when it renders, NaN by the check of
isolation)."""


def test_loading_hostile_model_folders(good, tmp_path, fork_server):
    """Every folder is refused with a readable error, or loads without running its code."""
    names = hostile_copies(good, tmp_path / "folders")
    job = fork_server.start("hostile_models_worker:load_all", [tmp_path / "folders"])
    fork_server.wait(job, timeout=900)
    (output,) = fork_server.output(job)
    found = {said["name"]: said for said in map(json.loads, re.findall(r"^\{.*\}$", output, re.MULTILINE))}
    assert found.keys() == set(names), f"it ended after {len(found)} of {len(names)}:\n{output[-3000:]}"
    tracebacks = [said for said in found.values() if said["outcome"] == "traceback"]
    assert not tracebacks, json.dumps(tracebacks, indent=1)
    assert not [name for name in names if canary(tmp_path / "folders", name).exists()]
    assert {name for name in names if found[name]["outcome"] == "loaded"} == LOADED
    for said in found.values():
        assert said["outcome"] == "loaded" or said["message"].startswith("model"), said
    print(
        f"\n{len(names) - 1} hostile folders: {len(names) - len(LOADED)} refused, {len(LOADED) - 1} loaded harmlessly"
    )


@pytest.mark.full
def test_training_on_hostile_model_folders(good, tmp_path, fork_server):
    """No traceback, no hang, no code of the folder, in a whole run."""
    outcomes: Counter[str] = Counter()
    faults = []
    for name in hostile_copies(good, tmp_path / "folders"):
        path = configure(tmp_path / "folders" / name, tmp_path / "folders" / name / "model")
        job = fork_server.start("hostile_models_worker:train_on", [path])
        (code,) = fork_server.wait(job, timeout=300)
        (output,) = fork_server.output(job)
        readable = code in (1, 2) and "error: " in output and "Traceback" not in output
        ran = canary(tmp_path / "folders", name).exists()
        outcomes["refused" if code else "trained"] += 1
        if ran or not (readable or code == 0):
            faults.append(f"{name}: exit code {code}, ran: {ran}\n{output[-3000:]}")
    print(f"\n{dict(outcomes)}")
    assert not faults, f"{len(faults)}:\n" + "\n".join(faults)
