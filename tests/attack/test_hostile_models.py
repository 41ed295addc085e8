"""Training on hostile model folders: each is refused with a readable error, or trained on without harm."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import yaml
from helpers.launch import ROOT
from hostile_models import HOSTILE

SAMPLE = 20


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


def test_hostile_model_folders(good, tmp_path, fork_server, full):
    """No traceback, no hang, no code of the folder."""
    names = list(HOSTILE) if full else list(HOSTILE)[:: max(1, len(HOSTILE) // SAMPLE)]
    outcomes: Counter[str] = Counter()
    faults = []
    for name in ["unchanged", *names]:
        folder, canary = tmp_path / name / "model", tmp_path / f"{name}-ran"
        shutil.copytree(good, folder)
        if name in HOSTILE:
            HOSTILE[name](folder, canary)
        path = configure(folder.parent, folder)
        job = fork_server.start("hostile_models:train_on", [path])
        (code,) = fork_server.wait(job, timeout=120)
        (output,) = fork_server.output(job)
        readable = code in (1, 2) and "error: " in output and "Traceback" not in output
        outcomes["refused" if code else "trained"] += 1
        if canary.exists() or not (readable or code == 0):
            faults.append(f"{name}: exit code {code}, ran: {canary.exists()}\n{output[-3000:]}")
        elif full:
            print(f"{name}: {code} {output.strip().splitlines()[-1][:300] if code else ''}")
        if name == "unchanged":
            assert code == 0, output
    print(dict(outcomes))
    assert not faults, f"{len(faults)} of {len(names)}:\n" + "\n".join(faults)
