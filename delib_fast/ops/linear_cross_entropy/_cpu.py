"""The C++ backend: csrc/linear_cross_entropy, chosen on a CPU wherever the compiled module is there."""

from typing import Any

import torch
from torch import Tensor

from delib_fast.ops._library import WHY_NO_COMPILED
from delib_fast.ops.linear_cross_entropy._gradient_in_forward import Results, define

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# gemm: "auto", or for tests "widened" (every GEMM in float32) or "bfloat16" (the path of AMX and AVX-512 BF16)
define("linear_cross_entropy_cpu", more=', str gemm="auto"')


def why_not(hidden: Tensor, weight: Tensor) -> str | None:
    if hidden.device.type != "cpu":
        return f"the tensors are on {hidden.device.type}"
    if hidden.dtype not in DTYPES:
        return f"it has no {hidden.dtype}"
    return WHY_NO_COMPILED


def run(*args: Any) -> Results:
    return torch.ops.delib_fast.linear_cross_entropy_cpu(*args)
