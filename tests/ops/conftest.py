"""For every test of an op: Triton runs on the CPU, and memory that nobody has written holds NaN."""

import os
from collections.abc import Iterator

import pytest
import torch
from loss_cases import FUSED, NAMES, skip_if_unavailable

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic algorithms ask of cuBLAS


@pytest.fixture(autouse=True)
def poisoned_empty() -> Iterator[None]:
    """torch.empty* returns NaN (or the largest integer), also where C++ calls it: what an op forgets to write
    shows. PyTorch does so under deterministic algorithms, which is how the ops are tested anyway."""
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
    """Every backend of linear_cross_entropy; those that cannot run here skip and say why."""
    skip_if_unavailable(request.param)
    return request.param


@pytest.fixture(params=FUSED)
def fused(request: pytest.FixtureRequest) -> str:
    """Every backend of linear_cross_entropy but the reference."""
    skip_if_unavailable(request.param)
    return request.param
