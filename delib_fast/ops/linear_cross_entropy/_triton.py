"""The Triton backend: _chunked.py around the kernel of _triton_kernel.py."""

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from delib_fast.ops._chunks import empty_dz
from delib_fast.ops._gradient_in_forward import keep_dz_if_smaller
from delib_fast.ops.linear_cross_entropy._call import LossCall, LossResults, define
from delib_fast.ops.linear_cross_entropy._chunked import run_chunks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

define("triton", empty_dz)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(hidden: Tensor, weight: Tensor) -> str | None:
    """Return the reason that this backend cannot run these tensors, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if hidden.device.type != "cuda" and not (hidden.device.type == "cpu" and _interpreted()):
        return f"the tensors are on {hidden.device.type}, and TRITON_INTERPRET is not 1"
    if hidden.dtype not in DTYPES:
        return f"{hidden.dtype} is not supported"
    return None


def _kernel(*args: Any) -> LossResults:
    # Imported at the first launch, because triton reads TRITON_INTERPRET when a kernel is defined.
    from delib_fast.ops.linear_cross_entropy._triton_kernel import launch

    return run_chunks(launch, LossCall(*args))


for _key in ("CUDA", "CPU"):  # CPU: with Triton's interpreter
    torch.library.impl("delib_fast::linear_cross_entropy_triton", _key, _kernel)


def run(call: LossCall) -> LossResults:
    """Compute the loss and its gradients."""
    return LossResults(*torch.ops.delib_fast.linear_cross_entropy_triton(*keep_dz_if_smaller(call)))
