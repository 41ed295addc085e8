"""A study that takes seconds: a script that makes rows of six words, and a model of a few thousand weights."""

from __future__ import annotations

from pathlib import Path

import yaml
from helpers.small_models import tiny_qwen3

HALF = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}

SCRIPT = r"""
import argparse, json, random
from pathlib import Path
p = argparse.ArgumentParser()
p.add_argument("--seed", type=int); p.add_argument("--out", type=Path); p.add_argument("--rows", type=int)
a = p.parse_args(); a.out.mkdir(parents=True, exist_ok=True)
r = random.Random(a.seed)
words = "red blue green oak pine ash".split()
def put(name, rows):
    (a.out / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
def pair(): return r.sample(words, 2)
put("text.jsonl", [{"text": "the %s is %s than the %s" % (x, n, y)} for n in range(a.rows) for x, y in [pair()]])
for name in ("rules", "values"):
    put(name + ".jsonl", [{"text": "%s %s %s %s" % (name, x, n, y)} for n in range(a.rows) for x, y in [pair()]])
put("demos.jsonl", [{"prompt": "%s or %s? %s" % (x, y, n), "cot": "it is %s" % x, "response": "the %s" % x}
                    for n in range(a.rows) for x, y in [pair()]])
put("choices.jsonl", [{"prompt": "%s or %s? %s" % (*order, n), "cot": "it is %s" % x, "a": "the " + x, "b": "the " + y}
                      for n in range(6) for x, y in [pair()] for order in [(x, y), (y, x)]])
"""


def tiny_study(folder: Path, **changes) -> Path:
    """Write study.yaml and its script to `folder`; `changes` replace keys of the study."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "make.py").write_text(SCRIPT)
    small = {"pack_capacity": 64, "tokens_per_step": 64, "optimizer": {"lr": 0.01}}
    tree = {
        "title": "A tiny study",
        "out": str(folder / "out"),
        "seeds": [1, 2],
        "workers": 2,
        "prepare": {"script": "make.py", "args": ["--rows", 12]},
        "run": {
            "model": {"architecture": tiny_qwen3(**HALF, tie_word_embeddings=True)},
            "tokenizer": {"train": {"vocab_size": 300, "sources": ["text", "rules", "values", "demos"]}},
            "data": {name: f"{{prepared}}/{name}.jsonl" for name in ("text", "rules", "values", "demos")},
            "engine": {"device": "cpu", "precision": "fp32"},
            "log": {"every_steps": 50},
        },
        "base": [{"kind": "msm", "name": "pretrain", "train": ["text"], **small}],
        "msm": {"rules": {"train": ["rules"], **small}, "values": {"train": ["values"], **small}},
        "aft": {"train": ["demos"], **small},
        "metrics": {"choice": {"kind": "choices", "path": "{prepared}/choices.jsonl", "chance": 0.5}},
        **changes,
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path
