"""A share of the kill matrix: SIGKILL at operations on the disk and at random moments, on 1 and 2 ranks, always
resumed by the same command. `kill_matrix.py` runs all of it."""

from __future__ import annotations

import random

import pytest
from kill_matrix import Matrix

pytestmark = pytest.mark.slow


def sample(matrix: Matrix, *, most: int, seed: int, must: str) -> list[tuple[int, str]]:
    """`most` of a run's places in their order, with all whose label holds `must`."""
    kept = [location for location in matrix.locations if must in location[1] or location[0] > 0]
    rest = [location for location in matrix.locations if location not in kept]
    drawn = random.Random(seed).sample(rest, min(len(rest), max(0, most - len(kept))))
    return [location for location in matrix.locations if location in kept or location in drawn]


def test_one_rank(tmp_path, fork_server):
    matrix = Matrix(fork_server, tmp_path, world_size=1)
    matrix.kill_at_places(sample(matrix, most=30, seed=0, must="checkpoints/aft"))
    matrix.kill_at_random(6, random.Random(0))
    assert matrix.killed_at.total() >= 36


def test_two_ranks_under_zero_3(tmp_path, fork_server):
    matrix = Matrix(fork_server, tmp_path, world_size=2, zero_stage=3)
    matrix.kill_at_places(sample(matrix, most=8, seed=1, must="rename checkpoints/aft/.writing-step-N"))
    matrix.kill_at_random(4, random.Random(1))
    assert matrix.killed_at.total() >= 12
