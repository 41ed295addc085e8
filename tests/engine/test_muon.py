"""Muon: the steps of torch.optim.Muon, at every ZeRO stage and number of ranks, and exact across a resume."""

from __future__ import annotations

import pytest
import torch
from helpers.launch import result_of


@pytest.fixture(scope="module")
def found(tmp_path_factory, fork_server):
    folder, found = tmp_path_factory.mktemp("muon"), {}
    for world_size in (1, 2):  # in this order: two ranks resume what one rank saved
        first = fork_server.run("muon_worker:main", [folder], world_size=world_size, LAUNCHED="yes")[0]
        found[world_size] = result_of(first)
    return found


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_matches_torch(found, world_size, stage):
    """Catches a matrix assembled in the wrong order, AdamW on a matrix, Muon on the embedding, another momentum or
    factor. Weights are about 0.1 in size, and a step changes them by 0.02 · 0.2."""
    assert found[world_size][f"z{stage} one step"] < 2e-6
    assert found[world_size][f"z{stage} three steps"] < 2e-5


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resume_offload_and_a_skipped_step_are_exact(found, world_size, stage):
    assert found[world_size][f"z{stage} resumed"] == 0.0
    assert found[world_size][f"z{stage} bad step skipped"] == 0.0
    assert found[world_size].get(f"z{stage} offloaded", 0.0) == 0.0


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_is_close(found, world_size, stage):
    """With gradients in bf16, each matrix changes in nearly the same direction as in fp32."""
    assert found[world_size][f"z{stage} bf16"] > 0.85


@pytest.mark.parametrize("world_size", [1, 2])
def test_resume_at_another_stage_and_number_of_ranks(found, world_size):
    assert found[world_size]["resumed elsewhere"] < 2e-5


@pytest.mark.parametrize("shape", [(5, 17), (17, 5), (8, 8), (3, 5, 17)])
def test_direction_has_the_singular_vectors_of_the_momentum(shape):
    """The singular vectors of the momentum, with singular values near 1, times the factor; each matrix of a stack by
    itself. Catches a step of torch.optim.Muon that adds its own momentum, decay or another factor."""
    from delib_fast.engine.muon import muon_direction

    torch.manual_seed(0)
    momentum = torch.randn(shape)
    direction = muon_direction(momentum)
    u, _, vt = torch.linalg.svd(momentum.double(), full_matrices=False)
    found = u.mT @ direction.double() @ vt.mT / (0.2 * max(shape[-2:]) ** 0.5)
    values = found.diagonal(dim1=-2, dim2=-1)
    assert (found - torch.diag_embed(values)).abs().max() < 0.05, (
        "the singular vectors changed by more than bf16's error"
    )
    assert values.min() > 0.3
    assert values.max() < 1.3
    assert muon_direction(torch.zeros(shape)).abs().max() == 0
    if len(shape) == 3:
        assert all(torch.equal(muon_direction(m), d) for m, d in zip(momentum, direction, strict=True))


def config(**tree):
    from delib_fast.config.load import parse_config

    return parse_config(
        {
            "run_dir": "-",
            "model": {"path": "-"},
            "data": {"a": "-"},
            "stages": [{"kind": "msm", "train": ["a"], "optimizer": {"name": "muon"}}],
        }
        | tree
    )


def test_muon_refuses_lora():
    from delib_fast.config import ConfigError

    with pytest.raises(ConfigError) as error:
        config(model={"path": "-", "lora": {"r": 8}})
    assert "stages.msm.optimizer.name: muon cannot be used: it orthogonalizes whole matrices" in str(error.value)
    assert "set adamw" in str(error.value)


def test_muon_refuses_nvme():
    from delib_fast.config import ConfigError
    from delib_fast.engine.deepspeed_json import deepspeed_json

    offload = {"offload_optimizer": {"device": "nvme", "nvme_path": "/disk"}}
    made = config(engine={"zero_stage": 3}, deepspeed={"zero_optimization": offload})
    with pytest.raises(ConfigError, match=r"muon needs whole matrices in memory; set optimizer\.name to adamw"):
        deepspeed_json(made, made.stages[0], 1)
