"""Weights and moments by name: the same at every ZeRO stage and number of ranks, and exact across a resume."""

from __future__ import annotations

import pytest
from helpers.launch import result_of


@pytest.fixture(scope="module")
def deviations(tmp_path_factory, fork_server):
    folder = tmp_path_factory.mktemp("state")
    found = {}
    for world_size in (1, 2):  # in this order: two ranks resume what one rank saved
        first = fork_server.run("state_worker:main", [folder], world_size=world_size, LAUNCHED="yes")[0]
        found[world_size] = result_of(first)
    return found


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resume_is_bitwise(deviations, world_size, precision, stage):
    assert deviations[world_size][f"{precision} z{stage} resumed"] == 0.0


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_stages_agree(deviations, world_size, stage):
    """Three AdamW steps in fp32: only the order of sums differs, and Adam magnifies that."""
    assert deviations[world_size][f"fp32 z{stage} against z0"] < 1e-6


def test_ranks_agree(deviations):
    assert deviations[2]["fp32 against 1 rank"] < 1e-6


@pytest.mark.parametrize("world_size", [1, 2])
def test_resume_at_another_stage_and_number_of_ranks(deviations, world_size):
    assert deviations[world_size]["fp32 resumed elsewhere"] < 1e-6
