"""One of two ranks that shard the weight of the head as a DTensor. test_linear_cross_entropy_sharded.py starts both."""

import atexit
import sys
import time

import torch
import torch.distributed as dist
from loss_cases import gradients, make_case
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from delib_fast.ops import FusedLossHead, gather_weight, linear_cross_entropy

PARTS = (slice(0, 11), slice(11, 37))  # uneven, so that averaging over ranks would be wrong


def check_functional(mesh, placement, case, mine, full):
    sharded = distribute_tensor(case.weight.detach(), mesh, [placement]).requires_grad_()
    weight = gather_weight(sharded)
    first = slice(mine.start, mine.start + 4)
    rest = slice(mine.start + 4, mine.stop)
    losses = [
        linear_cross_entropy(case.hidden[p], weight, case.targets[p], case.loss_weights[p]).loss_sum
        for p in (first, rest)
    ]
    (gradient,) = torch.autograd.grad(sum(losses), sharded)  # two calls, one gather, one reduction
    assert isinstance(gradient, DTensor)
    torch.testing.assert_close(gradient.full_tensor(), full)


def check_head(mesh, placement, case, mine, full):
    """A head whose Parameter is a DTensor gathers it in its forward pass."""
    parameter = torch.nn.Parameter(distribute_tensor(case.weight.detach(), mesh, [placement]))
    head = FusedLossHead(parameter)
    head(case.hidden[mine], case.targets[mine], case.loss_weights[mine]).loss_sum.backward()
    torch.testing.assert_close(head.weight.grad.full_tensor(), full)


def check_fully_shard(mesh, case, mine, full):
    """FSDP2's hooks gather the weight for the forward pass, and average its gradient over the ranks."""
    head = fully_shard(FusedLossHead(torch.nn.Parameter(case.weight.detach().clone())), mesh=mesh)
    head(case.hidden[mine], case.targets[mine], case.loss_weights[mine]).loss_sum.backward()
    torch.testing.assert_close(head.weight.grad.full_tensor() * mesh.size(), full)


def main() -> None:
    dist.init_process_group("gloo")
    atexit.register(time.sleep, 0.1)  # as in Ranks: otherwise a gloo thread may abort the process at exit
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(3)
    case = make_case(device="cpu")
    (full,) = gradients(linear_cross_entropy(*case), case.weight)
    for placement in (Shard(0), Replicate()):
        check_functional(mesh, placement, case, PARTS[rank], full)
        check_head(mesh, placement, case, PARTS[rank], full)
    check_fully_shard(mesh, case, PARTS[rank], full)
    dist.destroy_process_group()
    print("ok", file=sys.stderr)


if __name__ == "__main__":
    main()
