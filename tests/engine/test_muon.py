"""Muon: a step against float64 by hand, the same at every ZeRO stage and rank count, exact across a resume."""

from __future__ import annotations

import pytest
import torch
from helpers.launch import result_of

from delib_fast.config import ConfigError
from delib_fast.config.load import parse_config
from delib_fast.engine.muon import newton_schulz


@pytest.fixture(scope="module")
def found(tmp_path_factory, fork_server):
    folder, found = tmp_path_factory.mktemp("muon"), {}
    for world_size in (1, 2):  # in this order: two ranks take over what one saved
        first = fork_server.run("muon_worker:main", [folder], world_size=world_size, LAUNCHED="yes")[0]
        found[world_size] = result_of(first)
    return found


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_matches_float64(found, world_size, stage):
    """Catches a matrix put together in the wrong order, AdamW on a matrix, or Muon on the embedding. Weights are of
    size 0.1 and a step changes them by 0.02 · 0.2."""
    assert found[world_size][f"z{stage} one step"] < 2e-6
    assert found[world_size][f"z{stage} three steps"] < 2e-5


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_exact_where_it_must_be(found, world_size, stage):
    assert found[world_size][f"z{stage} resumed"] == 0.0
    assert found[world_size][f"z{stage} bad step left out"] == 0.0
    assert found[world_size].get(f"z{stage} offloaded", 0.0) == 0.0


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_half_precision_is_near(found, world_size, stage):
    """Newton–Schulz in bf16 on gradients in bf16 changes each matrix nearly as float64 does."""
    assert found[world_size][f"z{stage} bf16"] > 0.85


@pytest.mark.parametrize("world_size", [1, 2])
def test_another_stage_and_rank_count_take_over(found, world_size):
    assert found[world_size]["taken over"] < 2e-5


@pytest.mark.parametrize("shape", [(5, 17), (17, 5), (8, 8), (3, 5, 17)])
def test_newton_schulz(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    u, _, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    found = u.mT @ newton_schulz(matrix, torch.float32).double() @ vt.mT
    values = found.diagonal(dim1=-2, dim2=-1)
    assert (found - torch.diag_embed(values)).abs().max() < 1e-5, "the singular vectors changed"
    assert values.min() > 0.3
    assert values.max() < 1.3
    assert newton_schulz(torch.zeros(shape), torch.float32).abs().max() == 0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model": {"path": "-", "lora": {"r": 8}}}, "stages.0.optimizer.name: muon can't be used: model.lora"),
        ({"engine": {"zero_stage": 3, "offload_optimizer": "nvme", "nvme_path": "/disk"}}, "offload_optimizer is nvme"),
    ],
)
def test_refuses(keys, message):
    with pytest.raises(ConfigError) as error:
        parse_config(
            {
                "run_dir": "-",
                "model": {"path": "-"},
                "data": {"a": "-"},
                "stages": [{"kind": "msm", "train": ["a"], "optimizer": {"name": "muon"}}],
            }
            | keys
        )
    assert message in str(error.value)
    assert "set adamw" in str(error.value)
