"""The Triton backend: _chunked.py around the kernel of _triton_kernel.py."""

from typing import Any

import torch

from delib_fast.ops._chunks import empty_dz
from delib_fast.ops._gradient_in_forward import keep_dz_if_smaller
from delib_fast.ops._triton_head import why_not
from delib_fast.ops.linear_kl_divergence._call import DivergenceCall, DivergenceResults, define
from delib_fast.ops.linear_kl_divergence._chunked import run_chunks

__all__ = ["run", "why_not"]

define("triton", empty_dz)


def _kernel(*args: Any) -> DivergenceResults:
    # Imported at the first launch, because triton reads TRITON_INTERPRET when a kernel is defined.
    from delib_fast.ops.linear_kl_divergence._triton_kernel import launch

    return run_chunks(launch, DivergenceCall(*args))


for _key in ("CUDA", "CPU"):  # CPU: with Triton's interpreter
    torch.library.impl("delib_fast::linear_kl_divergence_triton", _key, _kernel)


def run(call: DivergenceCall) -> DivergenceResults:
    """Compute the loss and its gradients."""
    return DivergenceResults(*torch.ops.delib_fast.linear_kl_divergence_triton(*keep_dz_if_smaller(call)))
