"""A two-stage run of a few seconds, for tests of whole runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from helpers.launch import ROOT
from helpers.small_models import tiny_qwen3
from safetensors.torch import load_file

from delib_fast.digests import read_json, read_json_lines, write_json
from delib_fast.files import hash_file
from delib_fast.train import main

DATA = ROOT / "examples" / "data"


def tiny(folder: Path, **changes) -> Path:
    """Write the configuration and the rows of a two-stage run, and return the YAML file.

    Args:
        changes: sections of the configuration that replace the default ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("documents", 8), ("documents_heldout", 2), ("deliberation", 24), ("deliberation_heldout", 4)):
        lines = (DATA / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(lines[:rows]))
    tree = {
        "run_dir": str(folder / "run"),
        "model": {"architecture": tiny_qwen3(tie_word_embeddings=True)},
        "tokenizer": {"train": {"vocab_size": 512, "sources": ["documents", "deliberation"]}},
        "data": {
            name: f"{name}.jsonl" for name in ("documents", "documents_heldout", "deliberation", "deliberation_heldout")
        },
        "stages": [
            {
                "kind": "msm",
                "train": ["documents"],
                "eval": ["documents_heldout"],
                "pack_capacity": 1024,
                "tokens_per_step": 2048,
                "epochs": 2,
                "optimizer": {"lr": 0.01},
            },
            {
                "kind": "aft",
                "train": ["deliberation"],
                "eval": ["deliberation_heldout"],
                "cot_weight": 0.5,
                "pack_capacity": 1024,
                "tokens_per_step": 2048,
                "epochs": 2,
                "optimizer": {"lr": 0.01},
            },
        ],
        "engine": {"precision": "fp32", "device": "cpu"},
        **changes,
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def short_run(folder: Path, zero_stage: int = 0) -> Path:
    """A run of a few steps of both stages that saves after every step and logs after every second one."""
    path = tiny(folder)
    tree = yaml.safe_load(path.read_text())
    tree["model"]["architecture"]["num_hidden_layers"] = 1
    for stage, steps in zip(tree["stages"], (3, 4), strict=True):
        stage |= {"max_steps": steps, "epochs": 2, "pack_capacity": 1024, "tokens_per_step": 4096}
    tree |= {"checkpoint": {"every_steps": 1, "keep_last": 2}, "log": {"every_steps": 2}}
    tree["engine"]["zero_stage"] = zero_stage
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def run(path: Path, *overrides: str) -> int:
    return main(["--config", str(path), *(word for item in overrides for word in ("--set", item))])


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "model" / "model.safetensors")


def metrics(run_dir: Path) -> list[dict]:
    """The records of metrics.jsonl, none of which is damaged."""
    records, damaged = read_json_lines(run_dir / "metrics.jsonl")
    assert not damaged
    return records


@contextmanager
def edited_ledger(run_dir: Path) -> Iterator[dict[str, Any]]:
    """The content of ledger.json, to be changed in the block; it is written back with a digest."""
    ledger = read_json(run_dir / "ledger.json")
    yield ledger
    write_json(run_dir / "ledger.json", ledger)


def replace_in_config(run_dir: Path, old: str, new: str) -> None:
    """Replace a text in config.yaml, and its hash in the ledger."""
    text = (run_dir / "config.yaml").read_text().replace(old, new, 1)
    (run_dir / "config.yaml").write_text(text)
    with edited_ledger(run_dir) as ledger:
        ledger["config"] = hash_file(run_dir / "config.yaml")
