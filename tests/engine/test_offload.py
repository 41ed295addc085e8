"""Offload to host memory: bitwise the same training where the host is the device. Offload to NVMe through `deepspeed:`
is refused where DeepSpeed trains wrongly."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers.launch import result_of, run_ranks


def results(folder, what, world_size=2):
    return result_of(run_ranks(["tests/engine/offload_worker.py", str(folder), what], world_size)[0])


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return results(tmp_path_factory.mktemp("offload"), "main")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", ["z1 optimizer", "z2 optimizer", "z3 optimizer", "z3 both"])
def test_offloaded_run_is_the_same(found, precision, case):
    assert found[f"{precision} {case} against none"] == 0.0
    assert found[f"{precision} {case} resumed"] == 0.0


def config(zero_optimization=None, **engine):
    from delib_fast.config.load import parse_config

    return parse_config(
        {
            "run_dir": "-",
            "model": {"path": "-"},
            "data": {"a": "-"},
            "engine": engine,
            "deepspeed": {"zero_optimization": zero_optimization} if zero_optimization else {},
            "stages": [{"kind": "msm", "train": ["a"]}],
        }
    )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"offload_optimizer": "cpu"}, "engine.offload_optimizer needs ZeRO 1, 2 or 3"),
        ({"offload_parameters": "cpu", "zero_stage": 2}, "engine.offload_parameters needs ZeRO 3, not 2"),
        ({"cpu_adam": "deepspeed"}, "engine.cpu_adam: this key was removed: an offloaded AdamW is torch's fused one"),
        (
            {"nvme_path": "/disk"},
            "engine.nvme_path: this key was removed, with offload to NVMe; set offload_optimizer to",
        ),
        (
            {"offload_optimizer": "nvme", "zero_stage": 3},
            "engine.offload_optimizer: nvme was removed; set it to cpu, or configure NVMe under "
            "deepspeed.zero_optimization.offload_optimizer (device: nvme, nvme_path: …)",
        ),
        (
            {"offload_parameters": "nvme", "zero_stage": 3},
            "engine.offload_parameters: nvme was removed; set it to cpu, or configure NVMe under "
            "deepspeed.zero_optimization.offload_param (device: nvme, nvme_path: …)",
        ),
    ],
)
def test_refuses_invalid_and_removed_keys(keys, message):
    from delib_fast.config import ConfigError

    with pytest.raises(ConfigError) as error:
        config(**keys)
    assert message in str(error.value)


# --- NVMe through the `deepspeed:` block --------------------------------------------------------------------

NVME = {"device": "nvme", "nvme_path": "/disk"}


def settings(made):
    from delib_fast.engine.deepspeed_json import deepspeed_json

    return deepspeed_json(made, made.stages[0], 1)["zero_optimization"]


def test_nvme_of_the_deepspeed_block_is_kept():
    made = config({"offload_optimizer": NVME}, zero_stage=3, precision="bf16", offload_parameters="cpu")
    assert settings(made)["offload_optimizer"] == NVME
    assert settings(made)["offload_param"] == {"device": "cpu", "pin_memory": torch.cuda.is_available()}


@pytest.mark.parametrize(
    ("offload", "engine", "message"),
    [
        (
            {"offload_optimizer": NVME},
            {"zero_stage": 2, "precision": "bf16"},
            "offload_optimizer.device is nvme, which needs ZeRO 3: set engine.zero_stage to 3",
        ),
        (
            {"offload_param": NVME},
            {"zero_stage": 3, "precision": "fp32"},
            "offload_param.device is nvme, with which DeepSpeed 0.19 trains wrongly in fp32; set engine.precision to",
        ),
        ({"offload_param": {"device": "cpu"}}, {"zero_stage": 3}, "set engine.offload_parameters instead"),
    ],
)
def test_refuses_nvme_with_which_deepspeed_trains_wrongly(offload, engine, message):
    from delib_fast.config import ConfigError

    with pytest.raises(ConfigError) as error:
        settings(config(offload, **engine))
    assert message in str(error.value)


@pytest.mark.parametrize(("offset", "refused"), [(128, False), (129, True)])
def test_refuses_misaligned_gradients(offset, refused):
    """DeepSpeed would use whatever is in memory for such a gradient."""
    from delib_fast.config import ConfigError
    from delib_fast.engine.sharding import refuse_misaligned_swap

    swapper = SimpleNamespace(swap_element_size=4, is_swappable_tensor=lambda numel: numel > 1000)
    zero = SimpleNamespace(
        optimizer_swapper=swapper,
        grad_position={"weight": (0, offset, 2000), "bias": (0, 1, 3)},
        get_param_id=lambda parameter: "weight" if parameter.ndim == 2 else "bias",
        _swappable_optimizer_subgroup=lambda group: True,
    )
    module = torch.nn.Linear(3, 3)
    if not refused:
        refuse_misaligned_swap(zero, module)
        return
    with pytest.raises(
        ConfigError, match="the gradient of weight would start at byte 516 of its group, which is not a"
    ):
        refuse_misaligned_swap(zero, module)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_nvme_trains_like_host_memory(tmp_path, world_size):
    """Bitwise the same weights as with offload to host memory, and across a resume. Catches moments of size 0, which is
    the size of a swapped-out group (a segmentation fault), and gradients that are never read."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("DeepSpeed's async_io needs libaio, which is not installed")
    found = results(tmp_path, "nvme", world_size)
    assert "the gradient of back.weight would start at byte" in found["misaligned"]
    assert found["against the host"] == found["resumed"] == 0.0
    assert found["bytes"] > 3 * 4 * 2 * 33 * 40960, "weights and moments of both matrices"
