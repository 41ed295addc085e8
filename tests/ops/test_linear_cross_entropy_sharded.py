"""The head's weight as a DTensor, on two real ranks; and what is said to a caller who has not gathered it."""

from pathlib import Path

import pytest
import torch
from helpers.launch import run_ranks

from delib_fast.ops import gather_weight, linear_cross_entropy

HERE = Path(__file__).parent


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_ranks_equal_one():
    run_ranks([str(HERE / "sharded_worker.py")], 2, timeout=120, CUDA_VISIBLE_DEVICES="", PYTHONPATH=str(HERE))


def test_a_plain_weight_is_handed_back():
    weight = torch.nn.Parameter(torch.randn(5, 3))
    assert gather_weight(weight) is weight


def test_what_is_sharded_is_refused_by_name():
    class DTensor(torch.Tensor):
        pass

    weight = torch.randn(9, 4).as_subclass(DTensor)
    with pytest.raises(ValueError, match=r"weight is a DTensor: gather it once a step, weight = gather_weight"):
        linear_cross_entropy(torch.randn(3, 4), weight, torch.arange(3))
    hidden = torch.randn(3, 9).as_subclass(DTensor)
    with pytest.raises(ValueError, match=r"hidden is a DTensor: pass this rank's rows, hidden\.to_local\(\)"):
        linear_cross_entropy(hidden, torch.randn(9, 9), torch.arange(3))
