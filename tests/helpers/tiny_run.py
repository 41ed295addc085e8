"""A two-stage run of a few seconds, for tests of whole runs."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml
from helpers.launch import ROOT
from helpers.small_models import tiny_qwen3
from safetensors.torch import load_file

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


def run(path: Path, *overrides: str) -> int:
    return main(["--config", str(path), *(word for item in overrides for word in ("--set", item))])


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "model" / "model.safetensors")


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
