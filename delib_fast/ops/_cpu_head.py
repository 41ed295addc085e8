"""What the C++ backends of the fused heads share (csrc/fused_head)."""

import torch
from torch import Tensor

from delib_fast.ops._library import WHY_NO_COMPILED

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BFLOAT16_GEMMS: bool = WHY_NO_COMPILED is None and torch.ops.delib_fast.has_bfloat16_gemms()


def empty_dz(weight: Tensor, num_rows: int) -> Tensor:
    """Return an uninitialised dz (V, K), the layout of the C++ backends."""
    return weight.new_empty(weight.shape[0], (num_rows + 15) // 16 * 16)  # must match leading_dimension in head.h


def why_not(hidden: Tensor, weight: Tensor) -> str | None:
    """Return the reason that a C++ backend cannot run these tensors, or None."""
    if hidden.device.type != "cpu":
        return f"the tensors are on {hidden.device.type}"
    if hidden.dtype not in DTYPES:
        return f"{hidden.dtype} is not supported"
    return WHY_NO_COMPILED
