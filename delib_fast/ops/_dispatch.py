"""The choice of a backend for an op: the fastest one that supports the inputs, or the one that is requested."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

_log = logging.getLogger("delib_fast.ops")
_logged: set[tuple[str, str]] = set()


class BackendUnavailable(RuntimeError):  # noqa: N818 - part of the public API
    """The requested backend cannot run these inputs; the message says why, and which backends can."""


_F = TypeVar("_F", bound=Callable[..., Any])


def constant_under_compile(function: _F) -> _F:
    """Mark a function that torch.compile evaluates instead of tracing it, for example because it imports a module."""
    marked: _F = torch.compiler.assume_constant_result(function)
    return marked


def on_gpu(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is on a CUDA device. Every backend asks here, so that a test can change the answer."""
    return tensor.device.type == "cuda"


@constant_under_compile
def compute_capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability (major, minor) of a CUDA device."""
    return torch.cuda.get_device_capability(device)


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    `why_not` takes the op's tensors and returns the reason that the backend cannot run them, or None if it can. It
    depends only on devices, dtypes and static sizes.
    """

    name: str
    run: Callable[..., Any]
    why_not: Callable[..., str | None]


def choose(op: str, backends: Sequence[Backend], requested: str, *args: Any) -> Backend:
    """Return the backend named `requested`, or for "auto" the first of `backends` that can run `args`.

    Args:
        op: the name of the op, for messages.
        backends: in order of speed, the fastest first.
        requested: "auto" or the name of a backend.
        args: passed to `why_not` of each backend.

    Raises:
        ValueError: no backend has this name.
        BackendUnavailable: the requested backend cannot run these inputs, or none can.
    """
    names = [backend.name for backend in backends]
    if requested not in ("auto", *names):
        raise ValueError(f"{op}: backend={requested!r} does not exist; choose from {', '.join(['auto', *names])}")
    reasons: list[str] = []
    for backend in backends:
        if requested not in ("auto", backend.name):
            continue
        reason = backend.why_not(*args)
        if reason is None:
            if requested == "auto":
                _log_once(op, backend.name, reasons)
            return backend
        reasons.append(f"{backend.name}: {reason}")
    usable = [b.name for b in backends if requested not in ("auto", b.name) and b.why_not(*args) is None]
    remedy = f"; these backends can: {', '.join(usable)}" if usable else ""
    which = "no backend" if requested == "auto" else f"backend={requested!r}"
    verb = "can" if requested == "auto" else "cannot"
    raise BackendUnavailable(f"{op}: {which} {verb} run these inputs ({'; '.join(reasons)}){remedy}")


def _log_once(op: str, name: str, skipped: list[str]) -> None:
    if torch.compiler.is_compiling() or (op, name) in _logged:
        return
    _logged.add((op, name))
    reasons = f" ({'; '.join(skipped)})" if skipped else ""
    # The reference is slow, so falling back to it is a warning.
    _log.log(logging.WARNING if name == "reference" else logging.INFO, "%s runs on %s%s", op, name, reasons)
