"""The precision that a device computes natively."""

from __future__ import annotations

from typing import Literal

import torch


def native_precision(device: torch.device) -> Literal["bf16", "fp32"]:
    """The precision that a device computes natively: bf16 or fp32. A CPU that emulates bf16 is many times slower."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() and _has_bf16_units() else "fp32"


def _has_bf16_units() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
