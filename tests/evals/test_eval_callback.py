"""Evaluation during training: it must leave the trained weights unchanged, and report figures of the held-out rows."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.tiny_run import tiny, weights

from delib_fast.config import ConfigError
from delib_fast.config.load import load_config
from delib_fast.evals import EvalCallback
from delib_fast.training.run import run


def test_a_run_with_the_callback_trains_the_same_weights(finished, tmp_path):
    config = load_config(tiny(tmp_path))
    run(config, [EvalCallback(("segments", "early", "reliance", "drift"), every_steps=5, limit=2)])
    lines = [json.loads(line) for line in (tmp_path / "run/evals/in_loop.jsonl").read_text().splitlines()]
    ledger = json.loads((tmp_path / "run/ledger.json").read_text())
    for stage in ledger["stages"]:
        steps = [line["step"] for line in lines if line["stage"] == stage["name"]]
        assert steps == sorted({*range(5, stage["steps"] + 1, 5), stage["steps"]})
    drift = [line["figures"]["cot drift"]["value"] for line in lines]
    assert 0 < drift[0] < drift[-1], "measured from the weights at the start"
    assert all(line["figures"]["response nll"]["low"] is not None for line in lines)
    mine, other = weights(tmp_path / "run"), weights(finished)
    assert all(torch.equal(mine[name], other[name]) for name in other)


@pytest.mark.parametrize(
    ("suites", "changes", "message"),
    [
        (("hints",), {}, r"'hints' is not a suite for evaluation during training \(known: segments"),
        (("early",), {"engine": {"precision": "fp32", "device": "cpu", "zero_stage": 3}}, "zero_stage 3"),
    ],
)
def test_unsupported_settings_are_rejected(tmp_path, suites, changes, message):
    with pytest.raises(ConfigError, match=message):
        run(load_config(tiny(tmp_path, **changes)), [EvalCallback(suites, every_steps=1)])
