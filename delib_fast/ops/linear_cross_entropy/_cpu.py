"""The C++ backend (csrc/linear_cross_entropy), which runs CPU tensors if the compiled module is available."""

import torch
from torch import Tensor

from delib_fast.ops._gradient_in_forward import keep_dz_if_smaller
from delib_fast.ops._library import WHY_NO_COMPILED
from delib_fast.ops.linear_cross_entropy._call import LossCall, LossResults, define

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BFLOAT16_GEMMS: bool = WHY_NO_COMPILED is None and torch.ops.delib_fast.has_bfloat16_gemms()


def _empty_dz(weight: Tensor, num_rows: int) -> Tensor:
    return weight.new_empty(weight.shape[0], (num_rows + 15) // 16 * 16)  # must match leading_dimension in cpu.h


# gemm: "widened" (every GEMM in float32) or "bfloat16" (for AMX and AVX-512 BF16)
define("cpu", _empty_dz, extra=', str gemm="widened"')


def why_not(hidden: Tensor, weight: Tensor) -> str | None:
    """Return the reason that this backend cannot run these tensors, or None."""
    if hidden.device.type != "cpu":
        return f"the tensors are on {hidden.device.type}"
    if hidden.dtype not in DTYPES:
        return f"{hidden.dtype} is not supported"
    return WHY_NO_COMPILED


def run(call: LossCall) -> LossResults:
    """Compute the loss and its gradients."""
    if call.hidden.dtype == torch.bfloat16 and BFLOAT16_GEMMS:
        call = keep_dz_if_smaller(call)
        return LossResults(*torch.ops.delib_fast.linear_cross_entropy_cpu(*call, gemm="bfloat16"))
    return LossResults(*torch.ops.delib_fast.linear_cross_entropy_cpu(*call))
