"""The C++ backend (csrc/linear_cross_entropy), which runs CPU tensors if the compiled module is available."""

import torch

from delib_fast.ops._cpu_head import BFLOAT16_GEMMS, empty_dz, why_not
from delib_fast.ops._gradient_in_forward import keep_dz_if_smaller
from delib_fast.ops.linear_cross_entropy._call import LossCall, LossResults, define

__all__ = ["BFLOAT16_GEMMS", "run", "why_not"]

# gemm: "widened" (every GEMM in float32) or "bfloat16" (for AMX and AVX-512 BF16)
define("cpu", empty_dz, extra=', str gemm="widened"')


def run(call: LossCall) -> LossResults:
    """Compute the loss and its gradients."""
    op = torch.ops.delib_fast.linear_cross_entropy_cpu
    if call.hidden.dtype == torch.bfloat16 and BFLOAT16_GEMMS:
        return LossResults(*op(*keep_dz_if_smaller(call), gemm="bfloat16"))
    return LossResults(*op(*call))
