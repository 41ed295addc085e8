"""Import DeepSpeed once, without what it prints and builds that this project does not use."""

from __future__ import annotations

import logging
import os
import warnings

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("DS_LOG_LEVEL", "warning")  # read when deepspeed makes its logger
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import deepspeed

# DeepSpeed still calls collectives by the names that torch 2.13 renamed; the user can do nothing about it.
warnings.filterwarnings("ignore", message="`torch.distributed.*` is deprecated", category=FutureWarning)

for _name in ("DeepSpeed", "deepspeed"):
    logging.getLogger(_name).setLevel(logging.WARNING)

# On a CPU DeepSpeed compiles a shared-memory all-reduce for inference at start: half a minute, a compiler
# needed, and training never calls it.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

__all__ = ["deepspeed"]
