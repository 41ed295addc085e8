"""What every test shares."""

from __future__ import annotations

import os

# As in delib_fast/train.py, and here before any test imports torch: tests share a small machine.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
if "PYTEST_XDIST_WORKER" in os.environ:  # as many workers as cores: a thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# Before anything imports triton: its own library of functions is made interpretable, or not, when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Encoded data of the tests stays among the tests' files, also that of the processes they start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELIB_FAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of a small run that nothing disturbed; the others must equal it."""
    from helpers.tiny_run import run, tiny

    folder = tmp_path_factory.mktemp("finished")
    assert run(tiny(folder)) == 0
    return folder / "run"


@pytest.fixture(scope="session")
def fork_server():
    """Ranks that start in a moment (`forking`)."""
    from helpers.forking import ForkServer

    with ForkServer() as server:
        yield server
