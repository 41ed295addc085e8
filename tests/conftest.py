"""What every test shares."""

from __future__ import annotations

import os

# As in delib_fast/train.py, and here before any test imports torch: tests share a small machine.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import pytest


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Encoded data of the tests stays among the tests' files, also that of the processes they start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELIB_FAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
