"""Measurements that the tests of the fused heads share: FLOPs of matrix products, and peak memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


def gemm_flops(call: Callable[[], Any]) -> int:
    """FLOPs of the matrix products that the profiler records during `call`."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        call()
    flops = 0
    for event in profiler.events():
        if event.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            matrices = [shape for shape in event.input_shapes if len(shape) == 2]
            if event.name != "aten::mm":  # the first matrix is the one that is added
                matrices = matrices[1:]
            (m, k), (_, n) = matrices[:2]
            flops += 2 * m * k * n
    return flops


def peak_extra_mib(call: Callable[[], Any]) -> float:
    """Peak memory during `call` minus the memory in use before it, in MiB. Skips the test if it cannot be measured."""
    torch.ops.delib_fast.release_buffers()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    except OSError as error:
        pytest.skip(f"the high-water mark cannot be reset: {error}")
    before = _status_mib("VmRSS")
    call()
    return _status_mib("VmHWM") - before


def _status_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) / 1024
