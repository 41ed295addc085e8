"""Gather a weight that FSDP2 or tensor parallelism shards as a DTensor, and reduce its gradient once."""

from torch import Tensor


def is_sharded(tensor: Tensor | None) -> bool:
    """Return whether `tensor` is a DTensor, without importing torch.distributed.tensor."""
    return any(kind.__name__ == "DTensor" for kind in type(tensor).__mro__)


def gather_weight(weight: Tensor) -> Tensor:
    """Return a DTensor as a plain tensor that is whole on every rank; return any other tensor unchanged.

        backward: each rank's gradient of the whole tensor is *summed* over the ranks, and each keeps its own shard

    Args:
        weight: (V, H) DTensor, sharded or replicated over any mesh, or a plain tensor.

    Returns:
        (V, H) plain tensor. Gather once per step, and pass the result to all calls of linear_cross_entropy whose losses
        are added before one backward pass. The gradient is then reduced only once as well.

    Numerics: the reduction is a sum, as everywhere in ops: the loss of a step is the sum over all ranks divided by the
    normaliser of all ranks. (The hooks of fully_shard average instead. A head that FSDP2 gathers does not call this.)

    Cost: one all-gather of V·H elements in the forward pass, one reduce-scatter in the backward pass.
    """
    if not is_sharded(weight):
        return weight
    from torch.distributed.tensor import DTensor, Partial  # slow to import

    assert isinstance(weight, DTensor)
    return weight.full_tensor(grad_placements=[Partial()] * weight.device_mesh.ndim)
