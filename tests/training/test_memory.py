"""The memory estimate: the adapter's share, `auto`, and the error for a run that does not fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers.launch import ROOT
from helpers.tiny_run import run, tiny

from delib_fast.config import REDUCE_BUCKET, ConfigError
from delib_fast.config.load import load_config
from delib_fast.models import ModelShape
from delib_fast.training.memory import (
    MemoryBudget,
    check_fits,
    describe_checkpointing,
    memory_parts,
    resolve_activation_checkpointing,
)

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
    blocks=LAYERS,
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


def test_chunks_of_the_loss_are_larger_where_memory_allows():
    """8,192 rows from 60 GiB on, as the op takes them; a CPU and an unknown GPU have 4,096."""
    from delib_fast.ops._chunks import chunk_rows, gpu_chunk_tokens

    def loss(limit_gib: float | None) -> float:
        config, stage = paper("stages.0.pack_capacity=32768")
        return next(
            p for p in MemoryBudget(1, "bf16", limit_gib).parts(config, stage, QWEN3_8B) if p.name == "loss"
        ).bytes

    hidden = 2 * 2 * 32768 * H
    assert [loss(limit) - hidden for limit in (None, 48, 59.9)] == [2 * 4096 * V] * 3
    assert [loss(limit) - hidden for limit in (60, 79.6, 140)] == [2 * 8192 * V] * 3
    budgets = (MemoryBudget(1, "bf16", 80), MemoryBudget(1, "bf16", 48), MemoryBudget(1, "bf16", 80, gpu=False))
    assert [budget.chunk_tokens for budget in budgets] == [8192, 4096, None]
    assert gpu_chunk_tokens(None) == gpu_chunk_tokens(48 << 30) == 4096
    assert chunk_rows(32768, 0, gpu_chunk_tokens(80 << 30)) == 8192
    assert chunk_rows(9000, 0, gpu_chunk_tokens(80 << 30)) == 4608  # two nearly equal chunks
    assert chunk_rows(9000, 2048, gpu_chunk_tokens(80 << 30)) == 1920  # an explicit choice is a maximum


@pytest.mark.parametrize(
    ("layers", "limit_gib", "expected"),
    [
        ("eager", None, "none"),
        ("eager", 141, "none"),
        ("eager", 60, "selective, in the first 15 layers"),
        ("eager", 30, "selective, in the first 34 layers"),
        ("eager", 27, "full, in the first 35 layers"),
        ("eager", 10, "full"),
        ("compile", 60, "full, in the first 14 layers"),
        ("auto", 60, "full, in the first 14 layers"),  # on a GPU, auto compiles
        ("auto", 141, "none"),
    ],
)
def test_auto_is_the_least_recomputation_that_fits(layers, limit_gib, expected):
    """The least number of layers, and one layer less does not fit into nine tenths of the memory."""
    config, stage = paper(f"model.layers={layers}")
    budget = MemoryBudget(1, "bf16", limit_gib)
    found = resolve_activation_checkpointing(config, stage, QWEN3_8B, budget)
    assert describe_checkpointing(found) == expected
    if (count := found.model.checkpointed_layers) is not None:
        assert budget.needs_gib(found, stage, QWEN3_8B) <= 0.9 * limit_gib
        fewer = found.model_copy(update={"model": found.model.model_copy(update={"checkpointed_layers": count - 1})})
        assert budget.needs_gib(fewer, stage, QWEN3_8B) > 0.9 * limit_gib


def test_auto_checkpoints_all_layers_if_they_cannot_be_told_apart():
    config, stage = paper("model.layers=eager")
    shape = replace(QWEN3_8B, blocks=LAYERS + 1)
    found = resolve_activation_checkpointing(config, stage, shape, MemoryBudget(1, "bf16", 60))
    assert describe_checkpointing(found) == "selective"


def test_what_recomputed_and_kept_layers_need():
    """The first 20 keep their input; the last 16 keep all, and are freed before one of the first is whole again."""
    T, layer = 8192, 2 * (10 * H + 4 * A + 3 * F)
    found = parts("model.activation_checkpointing=full", "model.checkpointed_layers=20")["activations"]
    assert found == T * (20 * 2 * H + 16 * layer)
    assert parts("model.activation_checkpointing=full")["activations"] == T * (36 * 2 * H + layer)


def test_an_explicit_choice_is_kept():
    config, stage = paper("model.activation_checkpointing=full")
    assert resolve_activation_checkpointing(config, stage, QWEN3_8B, MemoryBudget(1, "bf16", 141)) == config


@pytest.mark.parametrize(
    ("overrides", "ranks", "limit_gib", "remedy"),
    [
        (["model.activation_checkpointing=none"], 1, 50, "model.activation_checkpointing=selective; or"),
        (
            ["model.activation_checkpointing=full", "model.checkpointed_layers=2"],
            1,
            30,
            "fit with model.checkpointed_layers=null; or",
        ),
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
