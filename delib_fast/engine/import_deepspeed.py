"""Imports DeepSpeed once, without the log lines and the compiled op that this project does not use."""

from __future__ import annotations

import logging
import os
import warnings

import torch

from delib_fast.engine.jit_builds import guard_builds

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("DS_LOG_LEVEL", "warning")  # deepspeed reads it when it creates its logger
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import deepspeed

# DeepSpeed calls collectives by names that torch 2.13 deprecates. The user cannot do anything about it.
warnings.filterwarnings("ignore", message="`torch.distributed.*` is deprecated", category=FutureWarning)

for _name in ("DeepSpeed", "deepspeed"):
    logging.getLogger(_name).setLevel(logging.WARNING)

# On a CPU, DeepSpeed compiles a shared-memory all-reduce for inference when it starts. That takes half a minute and a
# compiler, and training never calls it.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
guard_builds(deepspeed.ops.op_builder.builder.OpBuilder)

__all__ = ["deepspeed"]
