"""State and weights on the host: the same training to the bit where the host is the device; for the rest, the JSON."""

from __future__ import annotations

import pytest
from helpers.launch import result_of, run_ranks
from helpers.tiny_run import run, tiny

from delib_fast.config import ConfigError
from delib_fast.config.load import parse_config
from delib_fast.engine import nvme
from delib_fast.engine.cpu_adam import uses_cpu_adam
from delib_fast.engine.deepspeed_json import deepspeed_json


def results(folder, what):
    first = run_ranks(["tests/engine/offload_worker.py", str(folder), what], 2)[0]
    return result_of(first)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return results(tmp_path_factory.mktemp("offload"), "main")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", ["z1 optimizer", "z2 optimizer", "z3 optimizer", "z3 both"])
def test_offloaded_run_is_the_same(found, precision, case):
    assert found[f"{precision} {case} against none"] == 0.0
    assert found[f"{precision} {case} resumed"] == 0.0


@pytest.mark.slow
def test_deepspeeds_cpu_adam(tmp_path):
    """It compiles the op, where this machine has not yet. Weights of size 0.2, moved by 0.05 a step: catches another
    bias correction or decay (1e-3), and a resume that is another number (its running product of β)."""
    for name, found in results(tmp_path, "cpu_adam").items():
        assert found == 0.0 if "resumed" in name else 0.0 < found < 2e-6, name


def test_cpu_adam_falls_back_and_says_why(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    auto, alone = config(zero_stage=1, offload_optimizer="cpu", cpu_adam="auto"), lambda text: [text]
    used, note = uses_cpu_adam(auto, auto.stages[0].optimizer, alone)
    assert not used
    assert "torch's AdamW, not DeepSpeed's CPU Adam: ninja is not there" in note
    wanted = config(zero_stage=1, offload_optimizer="cpu", cpu_adam="deepspeed")
    with pytest.raises(ConfigError, match=r"cpu_adam is deepspeed, and ninja is not there.*set it to torch"):
        uses_cpu_adam(wanted, wanted.stages[0].optimizer, alone)
    assert uses_cpu_adam(config(), auto.stages[0].optimizer, alone) == (False, None)


def config(**engine):
    return parse_config(
        {
            "run_dir": "-",
            "model": {"path": "-"},
            "data": {"a": "-"},
            "engine": engine,
            "stages": [{"kind": "msm", "train": ["a"]}],
        }
    )


def test_json_of_nvme():
    made = config(zero_stage=3, precision="bf16", offload_optimizer="nvme", offload_parameters="cpu", nvme_path="/disk")
    block = deepspeed_json(made, made.stages[0], 1)["zero_optimization"]
    assert block["offload_optimizer"] | {"pin_memory": True} == {
        "device": "nvme",
        "pin_memory": True,
        "nvme_path": "/disk",
    }
    assert block["offload_param"] | {"pin_memory": True} == {"device": "cpu", "pin_memory": True}


@pytest.mark.slow
@pytest.mark.skipif(not nvme.AsyncIOBuilder().is_compatible(verbose=False), reason="no libaio to build async_io with")
@pytest.mark.parametrize("world_size", [1, 2])
def test_on_a_disk(tmp_path, world_size):
    """The same weights as in the host's memory, to the bit, and across a resume. Catches moments of size 0, which is
    what there is of a group that is on the disk (a segmentation fault), and gradients that are read nowhere."""
    found = result_of(run_ranks(["tests/engine/offload_worker.py", str(tmp_path), "disk"], world_size, timeout=600)[0])
    told = found.pop("misaligned")
    assert "the gradient of back.weight would lie at byte" in told
    for name, case in found.items():
        assert case["against the host"] == case["resumed"] == 0.0, name
        assert case["bytes"] > 3 * 4 * 2 * 33 * 40960, "weights and moments of both matrices"


def test_nvme_without_libaio_ends_before_weights_are_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(nvme.AsyncIOBuilder, "is_compatible", lambda *_, **__: False)
    monkeypatch.setattr("delib_fast.train.build_stage_model", lambda *_: pytest.fail("weights are loaded"))
    assert (
        run(
            tiny(tmp_path),
            "engine.zero_stage=3",
            "engine.offload_optimizer=nvme",
            f"engine.nvme_path={tmp_path / 'disk'}",
        )
        == 2
    )
    told = capsys.readouterr().err
    assert "error: engine.offload_optimizer is nvme, by DeepSpeed's async_io, and libaio is not there" in told
    assert "apt install libaio-dev" in told
    assert "or set engine.offload_optimizer: cpu" in told


def test_nvme_that_can_not_be_built_or_written(tmp_path, monkeypatch):
    engine = config(zero_stage=3, offload_parameters="nvme", nvme_path=str(tmp_path / "file")).engine
    monkeypatch.setattr(nvme.AsyncIOBuilder, "is_compatible", lambda *_, **__: True)
    monkeypatch.setattr(nvme, "build_failure", lambda _: "it can't be built: no libaio.h")
    with pytest.raises(ConfigError, match=r"offload_parameters is nvme.*can't be built: no libaio\.h; install libaio"):
        nvme.check_nvme(engine)
    monkeypatch.setattr(nvme, "build_failure", lambda _: None)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"engine\.nvme_path: .*/file can't be written .*File exists; give a folder"):
        nvme.check_nvme(engine)
    with pytest.raises(ConfigError, match=r"offload_parameters is nvme, with which DeepSpeed 0\.19 trains wrongly"):
        nvme.check_nvme(engine.model_copy(update={"precision": "fp32"}))
    nvme.check_nvme(engine.model_copy(update={"nvme_path": str(tmp_path / "disk")}))
    assert list((tmp_path / "disk").iterdir()) == []


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"offload_optimizer": "cpu"}, "engine.offload_optimizer needs ZeRO 1, 2 or 3"),
        ({"offload_parameters": "cpu", "zero_stage": 2}, "engine.offload_parameters needs ZeRO 3, not 2"),
        ({"cpu_adam": "deepspeed", "zero_stage": 1}, "set offload_optimizer to cpu"),
        ({"offload_optimizer": "nvme", "zero_stage": 3}, "engine.nvme_path is missing"),
        ({"offload_optimizer": "nvme", "zero_stage": 1, "nvme_path": "/disk"}, "offload to NVMe needs ZeRO 3"),
    ],
)
def test_refuses(keys, message):
    with pytest.raises(ConfigError) as error:
        config(**keys)
    assert message in str(error.value)
