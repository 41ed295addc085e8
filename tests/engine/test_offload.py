"""State and weights on the host: the same training to the bit where the host is the device; for the rest, the JSON."""

from __future__ import annotations

import json

import pytest
from launch import run_ranks

from delib_fast.config import ConfigError
from delib_fast.config_file import parse_config
from delib_fast.engine.deepspeed_json import deepspeed_json


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    first = run_ranks(["tests/engine/offload_worker.py", str(tmp_path_factory.mktemp("offload"))], 2)[0]
    line = next(line for line in first.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", ["z1 optimizer", "z2 optimizer", "z3 optimizer", "z3 both"])
def test_offloaded_run_is_the_same(found, precision, case):
    assert found[f"{precision} {case} against none"] == 0.0
    assert found[f"{precision} {case} resumed"] == 0.0


def config(**engine):
    return parse_config({"run_dir": "-", "model": {"path": "-"}, "data": {"a": "-"}, "engine": engine,
                         "stages": [{"kind": "msm", "train": ["a"]}]})


def test_json_of_nvme():
    made = config(zero_stage=3, precision="bf16", offload_optimizer="nvme", offload_parameters="cpu", nvme_path="/disk")
    block = deepspeed_json(made, made.stages[0], 1)["zero_optimization"]
    assert block["offload_optimizer"] | {"pin_memory": True} == {
        "device": "nvme", "pin_memory": True, "nvme_path": "/disk"}
    assert block["offload_param"] | {"pin_memory": True} == {"device": "cpu", "pin_memory": True}


@pytest.mark.parametrize(("keys", "message"), [
    ({"offload_optimizer": "cpu"}, "engine.offload_optimizer needs ZeRO 1, 2 or 3"),
    ({"offload_parameters": "cpu", "zero_stage": 2}, "engine.offload_parameters needs ZeRO 3, not 2"),
    ({"offload_optimizer": "nvme", "zero_stage": 3}, "engine.nvme_path is missing"),
    ({"offload_optimizer": "nvme", "zero_stage": 1, "nvme_path": "/disk"}, "offload to NVMe needs ZeRO 3"),
])
def test_refuses(keys, message):
    with pytest.raises(ConfigError) as error:
        config(**keys)
    assert message in str(error.value)
