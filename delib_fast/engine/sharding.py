"""Moves a module to the device: whole at ZeRO stages 0 to 2, sharded parameter by parameter at stage 3."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from delib_fast.config import ConfigError
from delib_fast.engine.import_deepspeed import deepspeed

_DIRECT_IO_ALIGNMENT = 512  # bytes; reads that bypass the page cache need memory at multiples of it


def shard_parameters(
    module: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    settings: dict[str, Any],
    stage: int,
    heartbeat: Callable[[str], None] = lambda activity: None,
) -> None:
    """Move a module to the device in its compute dtype: whole, or at ZeRO 3 only this rank's shard of each parameter.

    At ZeRO 3, one parameter at a time is moved to the device, broadcast from rank 0 and sharded, so that no device ever
    holds the whole model. If the parameters are deferred (`models.deferred`), no host holds it either: rank 0 reads
    each parameter when its turn comes. A collective.

    Args:
        dtype: the dtype of floating-point parameters and buffers; others keep theirs.
        settings: DeepSpeed's configuration; see `deepspeed_json`.
        stage: the ZeRO stage.
        heartbeat: called before each parameter is sharded.
    """
    if stage < 3:
        module.to(device=device, dtype=dtype)
        return
    zero = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=settings, dtype=dtype)
    for name, parameter in module.named_parameters():
        heartbeat(f"sharding {name}")
        parameter_dtype = dtype if parameter.is_floating_point() else parameter.dtype
        parameter.data = _materialize(parameter, parameter_dtype, device)
        zero._convert_to_zero_parameters([parameter])  # as Init does with the parameters of a module that it receives
    module.to(dtype=dtype)  # ZeRO shards only parameters; this casts the buffers
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.to(device))


def _materialize(parameter: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The parameter's weight on the device. Only rank 0 reads a deferred one; other ranks get uninitialized memory."""
    if not hasattr(parameter, "deferred"):
        weight: Tensor = parameter.data.to(device, dtype)
        return weight
    read = parameter.deferred
    del parameter.deferred
    if read is None or dist.get_rank() > 0:
        return torch.empty(parameter.shape, dtype=dtype, device=device)
    weight = read().to(device, dtype, copy=True)  # a copy, because the tensor that was read is a memory-mapped file
    return weight


def refuse_misaligned_swap(zero: Any, module: nn.Module) -> None:
    """Refuse a model whose gradients DeepSpeed would swap to NVMe (`deepspeed:` block) and read back wrongly.

    DeepSpeed 0.19 reads a gradient into its group's buffer without the page cache. If the gradient does not start at a
    multiple of 512 bytes, that read fails, and DeepSpeed uses whatever the buffer contained. Gradients are aligned
    where every rank's shard of each matrix is a multiple of 128 numbers, as in most models.

    Raises:
        ConfigError: a gradient is not aligned; the message names it.
    """
    swapper = getattr(zero, "optimizer_swapper", None)
    if swapper is None:
        return
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        group, offset, numel = zero.grad_position[zero.get_param_id(parameter)]
        start = int(offset) * swapper.swap_element_size
        swapped = zero._swappable_optimizer_subgroup(group) and swapper.is_swappable_tensor(numel=int(numel))
        if swapped and start % _DIRECT_IO_ALIGNMENT:
            raise ConfigError(
                f"deepspeed.zero_optimization.offload_optimizer.device is nvme, and the gradient of {name} would start "
                f"at byte {start:,} of its group, which is not a multiple of {_DIRECT_IO_ALIGNMENT}: DeepSpeed cannot "
                "read it from a disk; set engine.offload_optimizer to cpu instead, or use another number of ranks"
            )
