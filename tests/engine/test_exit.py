"""A successful run exits with code 0, even if gloo's threads still hold tensors."""

from __future__ import annotations

import pytest
from helpers.launch import run_ranks

LAST_OPERATION = """
import atexit, sys, time
import torch, torch.distributed as dist
from delib_fast.engine import Ranks
atexit._clear()  # other handlers may release the GIL by chance
ranks = Ranks("cpu")

@atexit.register
def last_operation():
    sys.setswitchinterval(100)  # no thread gets the GIL unless it is released explicitly
    tensor = torch.ones(1 << 24)
    dist.all_gather([torch.empty_like(tensor) for _ in range(ranks.world_size)], tensor, async_op=True)
    until = time.monotonic() + 1.0
    while time.monotonic() < until:  # meanwhile a gloo thread begins to wait for the GIL, to drop the last reference
        pass
"""


@pytest.mark.parametrize("world_size", [1, 2])
def test_exit_code_is_0_if_a_gloo_thread_has_the_last_reference(world_size):
    run_ranks(["-c", LAST_OPERATION], world_size)
