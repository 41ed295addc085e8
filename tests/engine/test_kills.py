"""A sample of the kill matrix: SIGKILL at disk operations and at random moments, on 1 and 2 ranks. Runs are resumed
with the same command. `--full` doubles the sample, and `kill_matrix.py` runs the complete matrix."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from kill_matrix import Matrix

pytestmark = pytest.mark.slow


def sample(matrix: Matrix, *, most: int, seed: int, must: str) -> list[tuple[int, str]]:
    """At most `most` of a run's operations, in order, with all whose label contains `must`."""
    kept = [operation for operation in matrix.operations if must in operation[1] or operation[0] > 0]
    rest = [operation for operation in matrix.operations if operation not in kept]
    drawn = random.Random(seed).sample(rest, min(len(rest), max(0, most - len(kept))))
    return [operation for operation in matrix.operations if operation in kept or operation in drawn]


def test_one_rank_survives_every_kill(tmp_path, fork_server, full):
    from kill_matrix import Matrix

    matrix = Matrix(fork_server, tmp_path, world_size=1)
    matrix.kill_at_operations(sample(matrix, most=30 if full else 15, seed=0, must="checkpoints/aft"))
    matrix.kill_at_random(6 if full else 3, random.Random(0))
    assert matrix.killed_at.total() >= (36 if full else 18)


def test_two_ranks_under_zero_3_survive_every_kill(tmp_path, fork_server, full):
    from kill_matrix import Matrix

    matrix = Matrix(fork_server, tmp_path, world_size=2, zero_stage=3)
    matrix.kill_at_operations(
        sample(matrix, most=8 if full else 4, seed=1, must="rename checkpoints/aft/.writing-step-N")
    )
    matrix.kill_at_random(4 if full else 2, random.Random(1))
    assert matrix.killed_at.total() >= (12 if full else 6)
