"""The C++ backend (csrc/linear_kl_divergence), which runs CPU tensors if the compiled module is available."""

import torch

from delib_fast.ops._cpu_head import BFLOAT16_GEMMS, empty_dz, why_not
from delib_fast.ops._gradient_in_forward import keep_dz_if_smaller
from delib_fast.ops.linear_kl_divergence._call import DivergenceCall, DivergenceResults, define

__all__ = ["run", "why_not"]

# gemm: "widened" (every GEMM in float32) or "bfloat16" (for AMX and AVX-512 BF16)
define("cpu", empty_dz, extra=', str gemm="widened"')


def run(call: DivergenceCall) -> DivergenceResults:
    """Compute the loss and its gradients."""
    op = torch.ops.delib_fast.linear_kl_divergence_cpu
    if call.hidden.dtype == torch.bfloat16 and BFLOAT16_GEMMS:
        return DivergenceResults(*op(*keep_dz_if_smaller(call), gemm="bfloat16"))
    return DivergenceResults(*op(*call))
