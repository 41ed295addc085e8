"""The Triton backend: _chunked.py around the kernel of _triton_kernel.py."""

from typing import Any

import torch

from delib_fast.ops._chunks import empty_dz
from delib_fast.ops._gradient_in_forward import keep_dz_if_smaller
from delib_fast.ops._triton_head import why_not
from delib_fast.ops.linear_cross_entropy._call import LossCall, LossResults, define
from delib_fast.ops.linear_cross_entropy._chunked import run_chunks

__all__ = ["run", "why_not"]

define("triton", empty_dz)


def _kernel(*args: Any) -> LossResults:
    # Imported at the first launch, because triton reads TRITON_INTERPRET when a kernel is defined.
    from delib_fast.ops.linear_cross_entropy._triton_kernel import launch

    return run_chunks(launch, LossCall(*args))


for _key in ("CUDA", "CPU"):  # CPU: with Triton's interpreter
    torch.library.impl("delib_fast::linear_cross_entropy_triton", _key, _kernel)


def run(call: LossCall) -> LossResults:
    """Compute the loss and its gradients."""
    return LossResults(*torch.ops.delib_fast.linear_cross_entropy_triton(*keep_dz_if_smaller(call)))
