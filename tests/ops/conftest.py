"""For every test of an op: Triton runs on the CPU, and memory that nobody has written holds NaN."""

import os
from collections.abc import Iterator

import pytest
import torch

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
