"""What the Triton backends of the fused heads share."""

import importlib.util
import os

import torch
from torch import Tensor

from delib_fast.ops import _dispatch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Looked up once, at import: torch.compile traces `why_not`.
_INSTALLED = importlib.util.find_spec("triton") is not None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(hidden: Tensor, weight: Tensor) -> str | None:
    """Return the reason that a Triton backend cannot run these tensors, or None."""
    if not _INSTALLED:
        return "triton is not installed"
    if not _dispatch.on_gpu(hidden) and not (hidden.device.type == "cpu" and _interpreted()):
        return f"the tensors are on {hidden.device.type}, and TRITON_INTERPRET is not 1"
    if hidden.dtype not in DTYPES:
        return f"{hidden.dtype} is not supported"
    return None
