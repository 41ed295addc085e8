"""The memory estimate: the adapter's share, `auto`, and the error for a run that does not fit."""

from __future__ import annotations

import pytest
from helpers.launch import ROOT
from helpers.tiny_run import run, tiny

from delib_fast.config import REDUCE_BUCKET, ConfigError
from delib_fast.config.load import load_config
from delib_fast.models import ModelShape
from delib_fast.training.memory import MemoryBudget, check_fits, memory_parts, resolve_activation_checkpointing

# Qwen3-8B, from its published config; LoRA of rank 64 on its linear layers.
H, F, A, KV, LAYERS, V = 4096, 12288, 4096, 1024, 36, 151_936
MATRICES = LAYERS * (2 * H * A + 2 * H * KV + 3 * H * F)
ADAPTER = LAYERS * 64 * (2 * (H + A) + 2 * (H + KV) + 3 * (H + F))
QWEN3_8B = ModelShape(
    parameters=MATRICES + 2 * V * H,
    embedding_parameters=2 * V * H,
    layers=LAYERS,
    hidden=H,
    intermediate=F,
    heads=32,
    kv_heads=8,
    head_dim=128,
    value_dim=128,
    vocabulary=V,
    largest_layer=MATRICES // LAYERS,
    adapter_parameters=ADAPTER,
    adapted_parameters=MATRICES,
)


def paper(*overrides: str):
    config = load_config(ROOT / "examples" / "msm_paper.yaml", list(overrides))
    return config, config.stages[0]


def parts(*overrides: str) -> dict[str, float]:
    return {part.name: part.bytes for part in memory_parts(*paper(*overrides), QWEN3_8B, 1, "bf16")}


def test_only_the_adapter_has_optimizer_state():
    found = parts()
    assert found["weights"] == 2 * (QWEN3_8B.parameters + ADAPTER)
    assert found["gradients"] == (2 + 4) * ADAPTER
    assert found["optimizer"] == 12 * ADAPTER
    assert parts("model.lora=null")["optimizer"] == 12 * QWEN3_8B.parameters
    assert parts("model.lora.quantize=nf4")["weights"] == pytest.approx(
        2 * (QWEN3_8B.parameters + ADAPTER) - MATRICES * 1.45
    )


def test_gradients_at_stage_1_are_whole_on_every_rank():
    """DeepSpeed's BF16_Optimizer holds the fp32 gradients of all parameters: 48 GB more than a share of an eighth."""
    P = QWEN3_8B.parameters

    def gradients(stage: int, ranks: int, precision: str = "bf16", gpu: bool = True) -> float:
        config, step = paper("model.lora=null", f"engine.zero_stage={stage}", "stages.0.tokens_per_step=262144")
        return next(
            p for p in memory_parts(config, step, QWEN3_8B, ranks, precision, gpu=gpu) if p.name == "gradients"
        ).bytes

    assert gradients(1, 8) == gradients(1, 1) == 6 * P
    assert gradients(2, 8) == gradients(0, 8) == 6 * P / 8 + 2 * 2 * REDUCE_BUCKET
    assert gradients(3, 8) == 6 * P / 8
    assert gradients(0, 1) == 6 * P  # one rank: stage 1
    assert gradients(0, 8, "fp16") == 6 * P  # fp16: stage 1
    assert gradients(0, 8, "fp32") == 4 * P  # fp32: stage 0
    assert gradients(0, 8, gpu=False) == 6 * P  # four micro-batches on a CPU: stage 1
    assert gradients(0, 16, gpu=False) == 6 * P / 16  # two: stage 2


def test_loss_memory_matches_the_op():
    # the published recipe's head is frozen: one chunk of logits, hidden states and their gradient
    T = 8192
    assert parts()["loss"] == 2 * 4096 * V + 2 * 2 * T * H
    # trained, in bf16: 8,192 = 2·H rows are no more than a float32 gradient; twice as many are summed in it
    assert parts("model.lora=null")["loss"] == 2 * T * V + 2 * V * H + 2 * 2 * T * H
    longer = parts("model.lora=null", "stages.0.pack_capacity=16384")["loss"]
    assert longer == 2 * 4096 * V + (4 + 2) * V * H + 2 * 2 * 2 * T * H


@pytest.mark.parametrize(("limit_gib", "mode"), [(None, "none"), (141, "none"), (48, "selective"), (27, "full")])
def test_auto_is_the_least_recomputation_that_fits(limit_gib, mode):
    config, stage = paper()
    assert (
        resolve_activation_checkpointing(
            config, stage, QWEN3_8B, MemoryBudget(1, "bf16", limit_gib)
        ).model.activation_checkpointing
        == mode
    )


def test_an_explicit_choice_is_kept():
    config, stage = paper("model.activation_checkpointing=full")
    assert resolve_activation_checkpointing(config, stage, QWEN3_8B, MemoryBudget(1, "bf16", 141)) == config


@pytest.mark.parametrize(
    ("overrides", "ranks", "limit_gib", "remedy"),
    [
        (["model.activation_checkpointing=none"], 1, 50, "model.activation_checkpointing=selective; or"),
        (["model.lora=null", "engine.zero_stage=1"], 8, 41, "engine.zero_stage=2; or"),
        (["model.lora=null"], 8, 40, "engine.zero_stage=3; or"),
        (["model.lora=null"], 1, 48, "engine.zero_stage=1 engine.offload_optimizer=cpu"),
        (["model.lora.quantize=nf4"], 1, 10, "engine.offload_optimizer=cpu model.activation_offload=true; or"),
        ([], 1, 4, "no setting of this model would fit on this many ranks"),
    ],
)
def test_error_names_a_setting_that_fits(overrides, ranks, limit_gib, remedy):
    config, stage = paper(*overrides)
    with pytest.raises(ConfigError) as error:
        check_fits(config, stage, QWEN3_8B, MemoryBudget(ranks, "bf16", limit_gib))
    assert f" GiB per rank, but a rank has {limit_gib:.1f} GiB" in str(error.value)
    assert remedy in str(error.value)
    check_fits(config, stage, QWEN3_8B, MemoryBudget(ranks, "bf16", None))


def test_raised_before_weights_are_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("delib_fast.training.run.build_stage_model", lambda *_: pytest.fail("weights were loaded"))
    assert run(tiny(tmp_path), "engine.memory_gib=0.001") == 2
    output = capsys.readouterr().err
    assert "stage 'msm' is estimated to need" in output
    assert "engine.memory_gib=0 to skip this check" in output
