"""A step's gradient is that of Σ w·nll / Σ w over all its tokens, however the tokens are split.

Three SGD steps in fp32 on real DeepSpeed ranks, against one big batch in plain torch. The deviation is relative to how
far training moved each parameter, which the gradient determines. Relative to the parameter's size, an error would be
hidden.
"""

from __future__ import annotations

import pytest
from helpers.launch import result_of, run_ranks

CASES = [(stage, capacity) for stage in (0, 1, 2, 3) for capacity in (64, 256, 1024)]


@pytest.fixture(scope="module")
def deviations(tmp_path_factory):
    found = {}
    for world_size in (1, 2, 4):
        first = run_ranks(["tests/engine/invariance_worker.py", str(tmp_path_factory.mktemp("run"))], world_size)[0]
        found[world_size] = result_of(first)
    return found


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("stage", "capacity"), CASES)
def test_splitting_does_not_matter(deviations, world_size, stage, capacity):
    assert deviations[world_size][f"z{stage} capacity {capacity}"] <= 1e-5


@pytest.mark.parametrize("case", ["z0 parts 4", "z1 parts 2", "z2 parts 4", "z3 parts 2", "z3 parts 1, 4, 2"])
def test_sequence_parallelism_does_not_matter(deviations, case):
    """2 × 2 ranks, or 4 that split one pack (2 kv heads). Catches a wrong factor, normalizer or resume."""
    assert deviations[4][case] <= 1e-5
