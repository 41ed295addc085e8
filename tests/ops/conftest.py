"""Fixtures of the op tests. Triton runs on the CPU, and uninitialised memory contains NaN."""

import os
from collections.abc import Iterator

import pytest
import torch
from loss_cases import FUSED, NAMES, skip_if_unavailable

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by cuBLAS for deterministic algorithms


@pytest.fixture(autouse=True)
def poisoned_empty() -> Iterator[None]:
    """Fill torch.empty* with NaN (or the largest integer), also if C++ calls it, so that unwritten outputs are found.

    PyTorch does this if deterministic algorithms are enabled, as they are in all of these tests.
    """
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(20)


@pytest.fixture(params=NAMES)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend of linear_cross_entropy; one that cannot run on this machine is skipped with the reason."""
    skip_if_unavailable(request.param)
    return request.param


@pytest.fixture(params=FUSED)
def fused(request: pytest.FixtureRequest) -> str:
    """Each backend of linear_cross_entropy except the reference."""
    skip_if_unavailable(request.param)
    return request.param
