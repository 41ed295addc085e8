"""The C++ backend: csrc/linear_cross_entropy, chosen on a CPU wherever the compiled module is there."""

from typing import Any

import torch
from torch import Tensor

from delib_fast.ops._library import WHY_NO_COMPILED
from delib_fast.ops.linear_cross_entropy._gradient_in_forward import Results, define, keeps_dz

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BFLOAT16_GEMMS: bool = WHY_NO_COMPILED is None and torch.ops.delib_fast.has_bfloat16_gemms()


def _empty_dz(weight: Tensor, num_rows: int) -> Tensor:
    return weight.new_empty(weight.shape[0], (num_rows + 15) // 16 * 16)  # whole cache lines, as leading_dimension


# gemm: "widened" (every GEMM in float32) or "bfloat16" (the path of AMX and AVX-512 BF16)
define("linear_cross_entropy_cpu", _empty_dz, more=', str gemm="widened"')


def why_not(hidden: Tensor, weight: Tensor) -> str | None:
    if hidden.device.type != "cpu":
        return f"the tensors are on {hidden.device.type}"
    if hidden.dtype not in DTYPES:
        return f"it has no {hidden.dtype}"
    return WHY_NO_COMPILED


def run(*args: Any) -> Results:
    if args[0].dtype == torch.bfloat16 and BFLOAT16_GEMMS:
        return torch.ops.delib_fast.linear_cross_entropy_cpu(*args, keeps_dz(*args), gemm="bfloat16")
    return torch.ops.delib_fast.linear_cross_entropy_cpu(*args)
