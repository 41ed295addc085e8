"""Move a module to the device: whole, or at ZeRO stage 3 sharded parameter by parameter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from delib_fast.engine.import_deepspeed import deepspeed

if TYPE_CHECKING:
    pass


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def shard_parameters(
    module: nn.Module, device: torch.device, dtype: torch.dtype, settings: dict[str, Any], stage: int
) -> None:
    """Bring the module to the device in its compute dtype: whole, or at ZeRO stage 3 this rank's part of each weight.

    There one parameter at a time goes to the device, is taken over from rank 0 and cut into the ranks' parts, so that
    no device ever has to hold the whole model; nor has a host, where the parameters are deferred (`models.deferred`)
    and rank 0 reads each when its turn comes. A collective.
    """
    if stage < 3:
        module.to(device=device, dtype=dtype)
        return
    zero = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=settings, dtype=dtype)
    for parameter in module.parameters():
        kind = dtype if parameter.is_floating_point() else parameter.dtype
        parameter.data = _materialize(parameter, kind, device)
        zero._convert_to_zero_parameters([parameter])  # as Init does to the parameters of a module that it is given
    module.to(dtype=dtype)  # the rest: ZeRO shards parameters alone
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.to(device))


def _materialize(parameter: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The parameter's weight on the device: its own, or one that was deferred, which only rank 0 has to have."""
    if not hasattr(parameter, "deferred"):
        return parameter.data.to(device, dtype)
    read = parameter.deferred
    del parameter.deferred
    if read is None or dist.get_rank() > 0:
        return torch.empty(parameter.shape, dtype=dtype, device=device)
    return read().to(device, dtype, copy=True)  # out of the mapped file
