"""Weights that FSDP2 or tensor parallelism keep sharded, as DTensors: gathered once, gradient reduced once."""

from torch import Tensor


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether it is a DTensor; does not import torch.distributed.tensor where nobody has."""
    return any(kind.__name__ == "DTensor" for kind in type(tensor).__mro__)


def gather_weight(weight: Tensor) -> Tensor:
    """The whole of a DTensor, a plain tensor on every rank; anything else as it is.

        backward: every rank's gradient of the whole is *summed* over the ranks, each keeping its own shard

    Args:
        weight: (V, H) DTensor, sharded or replicated over any mesh, or a plain tensor.

    Returns:
        (V, H) plain tensor. Gather once a step and hand the result to every call of linear_cross_entropy whose
        losses are added before one backward pass: then the gradient is reduced once as well.

    Numerics: a sum, as everything in ops: the loss of a step is the sum over ranks divided by the normaliser of all
    ranks. (fully_shard's own hooks average instead: with a head that FSDP2 itself gathers, this is not called.)

    Cost: one all-gather of V·H forward, one reduce-scatter backward.
    """
    if not is_sharded(weight):
        return weight
    from torch.distributed.tensor import DTensor, Partial

    assert isinstance(weight, DTensor)
    return weight.full_tensor(grad_placements=[Partial()] * weight.device_mesh.ndim)
