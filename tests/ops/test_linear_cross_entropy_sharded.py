"""The weight of the head as a DTensor: two ranks, and the errors for a DTensor that is not gathered."""

from pathlib import Path

import pytest
import torch
from helpers.launch import run_ranks

from delib_fast.ops import gather_weight, linear_cross_entropy

HERE = Path(__file__).parent


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed")
def test_two_ranks_equal_one():
    run_ranks([str(HERE / "programs" / "sharded_worker.py")], 2, CUDA_VISIBLE_DEVICES="", PYTHONPATH=str(HERE))


def test_a_plain_weight_is_returned_unchanged():
    weight = torch.nn.Parameter(torch.randn(5, 3))
    assert gather_weight(weight) is weight


def test_a_dtensor_argument_raises():
    class DTensor(torch.Tensor):
        pass

    weight = torch.randn(9, 4).as_subclass(DTensor)
    with pytest.raises(ValueError, match=r"weight is a DTensor; gather it once per step, weight = gather_weight"):
        linear_cross_entropy(torch.randn(3, 4), weight, torch.arange(3))
    hidden = torch.randn(3, 9).as_subclass(DTensor)
    with pytest.raises(ValueError, match=r"hidden is a DTensor; pass the rows of this rank, hidden\.to_local\(\)"):
        linear_cross_entropy(hidden, torch.randn(9, 9), torch.arange(3))
