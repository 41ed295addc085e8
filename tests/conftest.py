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


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run sweeps and attacks whole; without it, a sample of each")


@pytest.fixture(scope="session")
def full(request) -> bool:
    """Whether `--full` was given: sweeps and attacks then run whole, and otherwise a representative sample of each."""
    return request.config.getoption("--full")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--full"):
        for item in items:
            if "full" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="a long form; run with --full"))


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
