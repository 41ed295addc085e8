"""The roofline model of a step: each part computed by hand, and the rates of known GPUs."""

from __future__ import annotations

import pytest

from delib_fast.config import ConfigError
from delib_fast.config.load import parse_config
from delib_fast.models import ModelShape
from delib_fast.training.roofline import Device, StepWork, known_device, step_parts

P = 10_000_000
SHAPE = ModelShape(
    parameters=P,
    embedding_parameters=2_000_000,
    layers=4,
    hidden=1000,
    intermediate=3000,
    heads=10,
    kv_heads=5,
    head_dim=100,
    value_dim=100,
    vocabulary=2000,
    largest_layer=2_000_000,
    matrix_parameters=8_000_000,
    norm_elements=9000,
    blocks=4,
    adapter_parameters=80_000,
)
WORK = StepWork(tokens=1000, supervised=500, pairs=100_000, micro_batches=2)
GPU = Device("a GPU", 1e12, 5e11, 1e11, link_bytes_per_s=1e9, launch_s=1e-6)
PRODUCT, ATTENTION = 2 * 8e6 * 1000 / 1e12, 4 * 4 * 1000 * 100_000 / 5e11  # seconds of one pass
# bytes for each token: norms, residuals, rotary positions and SwiGLU, forward and backward
EAGER = (9000 * 36 + 8000 * 6 + 6000 * 20 + 12_000 * 10, 9000 * 68 + 8000 * 6 + 6000 * 20 + 12_000 * 18)
FUSED = (9000 * 4 + 8000 * 4 + 6000 * 4 + 12_000 * 6, 9000 * 6 + 8000 * 2 + 6000 * 4 + 12_000 * 10)


def seconds(
    device: Device = GPU, *, ranks: int = 1, precision: str = "bf16", engine: dict | None = None, **model
) -> dict[str, float]:
    config = parse_config(
        {
            "run_dir": "r",
            "model": {"path": "m", "layers": "eager", "activation_checkpointing": "none", **model},
            "data": {"rows": "rows.jsonl"},
            "engine": engine or {},
            "stages": [{"kind": "aft", "train": ["rows"], "pack_capacity": 500, "tokens_per_step": 1000 * ranks}],
        }
    )
    parts = step_parts(config, config.stages[0], SHAPE, WORK, device, ranks, precision)
    return {part.name: part.seconds for part in parts}


def test_each_part_is_its_formula():
    assert seconds() == pytest.approx(
        {
            "products": 3 * PRODUCT,
            "attention": 3.5 * ATTENTION,
            "elementwise": sum(EAGER) * 1000 / 1e11,
            "head": 6 * 2000 * 1000 * 500 / 1e12 + 4 * 2 * 2000 * 500 / 1e11,
            "optimizer": (30 * P + 2 * 12 * P) / 1e11,
        }
    )
    assert seconds(layers="compile")["elementwise"] == pytest.approx(sum(FUSED) * 1000 / 1e11)
    liger = sum(EAGER) - 9000 * (36 + 68 - 10) - 12_000 * (28 - 16)
    assert seconds(layers="liger")["elementwise"] == pytest.approx(liger * 1000 / 1e11)
    assert seconds(layers="auto") == seconds(layers="compile")  # on a GPU
    fp32 = 9000 * (28 + 64) + 8000 * 24 + 6000 * 80 + 12_000 * 56
    assert seconds(precision="fp32")["elementwise"] == pytest.approx(fp32 * 1000 / 1e11)
    assert seconds(precision="fp32")["optimizer"] == pytest.approx((30 + 12) * P / 1e11)


def test_an_adapter_needs_no_gradients_of_the_base():
    found = seconds(lora={"r": 8})
    assert found["products"] == pytest.approx(2 * PRODUCT)
    assert found["adapter"] == pytest.approx(4 * 2 * 1000 * (80_000 / 8) / 1e11)  # more than its 0.48 ms of FLOPs
    assert found["head"] == pytest.approx(4 * 2000 * 1000 * 500 / 1e12 + 4 * 2 * 2000 * 500 / 1e11)
    assert found["optimizer"] == pytest.approx((30 + 2 * 12) * 80_000 / 1e11)


def test_recomputed_layers():
    forward = PRODUCT + EAGER[0] * 1000 / 1e11
    some = {"activation_checkpointing": "full", "checkpointed_layers": 1}
    assert seconds(**some)["recompute"] == pytest.approx((forward + ATTENTION) / 4)
    assert seconds(activation_checkpointing="full")["recompute"] == pytest.approx(forward + ATTENTION)
    assert seconds(activation_checkpointing="selective")["recompute"] == pytest.approx(forward)


@pytest.mark.parametrize(
    ("zero", "precision", "expected"),
    [
        (0, "fp32", 8 * P * 0.75 / 1e9),
        (1, "bf16", (8 + 2) * P * 0.75 / 1e9),
        (2, "bf16", (2 * 2 + 2) * P * 0.75 / 1e9 - PRODUCT),
        (0, "bf16", (2 * 2 + 2) * P * 0.75 / 1e9 - PRODUCT),  # on several GPUs it runs as stage 2
        (3, "bf16", 2 * (2 * 2 + 2) * P * 0.75 / 1e9 - PRODUCT),
    ],
)
def test_collectives(zero, precision, expected):
    found = seconds(ranks=4, precision=precision, engine={"zero_stage": zero})
    assert found["collectives"] == pytest.approx(expected)
    fast = Device("a GPU", 1e12, 5e11, 1e11, link_bytes_per_s=1e11)
    hidden = seconds(fast, ranks=4, precision=precision, engine={"zero_stage": zero})
    assert ("collectives" in hidden) == (zero < 2 and not (zero == 0 and precision == "bf16"))


def test_sharded_optimizer_and_split_packs():
    assert seconds(ranks=4, engine={"zero_stage": 1})["optimizer"] == pytest.approx((30 / 4 + 24) * P / 1e11)
    split = seconds(ranks=2, precision="fp32", engine={"sequence_parallel": 2})["collectives"]
    whole = seconds(ranks=2, precision="fp32")["collectives"]
    assert split - whole == pytest.approx(4 * 4 * (1000 + 500) * 4 * 1000 / 2 / 1e9)


def test_a_gpu_hides_the_launches_that_a_cpu_does_not():
    assert "launches" not in seconds()
    slow = Device("a GPU", 1e12, 5e11, 1e11, launch_s=1e-3)
    assert seconds(slow)["launches"] == pytest.approx(4 * 2 * 220 * 1e-3 - sum(seconds().values()))
    cpu = Device("a CPU", 1e12, 5e11, 1e11, launch_s=1e-6, is_gpu=False)
    assert seconds(cpu)["launches"] == pytest.approx(4 * 2 * 220 * 1e-6)
    assert seconds(cpu, lora={"r": 8})["launches"] == pytest.approx(4 * 2 * (220 + 60) * 1e-6)
    assert seconds(cpu, activation_checkpointing="full")["launches"] == pytest.approx(4 * 2 * 220 * 4 / 3 * 1e-6)


def test_known_gpus():
    h200 = known_device("h200")
    assert (h200.name, h200.gemm_flops_per_s, h200.bytes_per_s) == ("H200", 0.7 * 989e12, pytest.approx(4.32e12))
    assert known_device("NVIDIA RTX-4090").name == "RTX 4090"
    assert known_device("h100 pcie").gemm_flops_per_s == pytest.approx(0.7 * 756e12)
    with pytest.raises(ConfigError, match=r"--gpu h900: this GPU is not known; choose from GB300, B300, GB200"):
        known_device("h900")
