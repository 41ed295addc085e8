"""Settings and fixtures of all tests."""

from __future__ import annotations

import os

# As in delib_fast/train.py; it must be set before any test imports torch.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# One thread: sums then have one order, so that runs of this process are bitwise identical to those of forked ranks.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# Must be set before triton is imported: it decides then whether its functions are interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Keep encoded data in a temporary folder, also for the processes that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELIB_FAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The run directory of a small run that was not interrupted. Other runs are compared with it."""
    from helpers.tiny_run import run, tiny

    folder = tmp_path_factory.mktemp("finished")
    assert run(tiny(folder)) == 0
    return folder / "run"


@pytest.fixture(scope="session")
def fork_server():
    """Starts ranks in processes that have already imported everything; see `helpers.forking`."""
    from helpers.forking import ForkServer

    with ForkServer() as server:
        yield server
