"""The torch dtype of each precision.

The package `delib_fast.config` does not import this module, so reading a configuration does not import torch.
"""

from __future__ import annotations

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
