"""What `delib-fast env` prints: versions, the device, and which backends of the fused ops can run on it."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("delib-fast", "torch", "triton", "deepspeed", "transformers", "flash-attn", "liger-kernel")


def describe() -> str:
    """Several lines: versions, the device, and the backends of each op, with the reason if one cannot run."""
    import torch

    lines = [f"python        {platform.python_version()}"]
    lines += [f"{name:<13} {_version(name)}" for name in PACKAGES]
    lines.append(f"device        {_device(torch)}")
    for op, reasons in _backends(torch).items():
        lines.append(op)
        lines += [f"  {name:<11} {'runs' if why is None else 'no: ' + why}" for name, why in reasons.items()]
    return "\n".join(lines)


def one_line() -> str:
    """One line for the end of an installation: versions, the device, and what is slower without a compiler."""
    import torch

    from delib_fast.ops._library import WHY_NO_COMPILED

    slower = ""
    if WHY_NO_COMPILED is not None:
        slower = "; without the C++ extension (install g++ and rebuild): the loss and the packing are slower on a CPU"
    return f"delib_fast {_version('delib-fast')} on torch {torch.__version__}, {_device(torch)}{slower}"


def _backends(torch: Any) -> dict[str, dict[str, str | None]]:
    """For each op and backend, why it cannot run bf16 tensors on this machine's device; None if it can."""
    from delib_fast.ops.linear_cross_entropy import BACKENDS as LOSS
    from delib_fast.ops.varlen_attention import BACKENDS as ATTENTION

    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden = torch.zeros(2, 64, dtype=torch.bfloat16, device=device)
    q = torch.zeros(2, 1, 64, dtype=torch.bfloat16, device=device)
    return {
        "linear_cross_entropy": {b.name: b.why_not(hidden, hidden) for b in LOSS},
        "varlen_attention": {b.name: b.why_not(q, q, q, None) for b in ATTENTION},
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _device(torch: Any) -> str:
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name(0))
    capability = torch.backends.cpu.get_cpu_capability()
    return f"CPU ({capability}, {os.cpu_count()} cores)"
