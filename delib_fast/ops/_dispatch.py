"""How an op finds its backend: the fastest that can, or the one asked for by name, or an error with the reasons."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

_log = logging.getLogger("delib_fast.ops")
_logged: set[tuple[str, str]] = set()


class BackendUnavailable(RuntimeError):  # noqa: N818 - what it says, as in the design
    """The backend that was asked for cannot run these inputs here; the message says why, and what can."""


@dataclass(frozen=True)
class Backend:
    """One way to run an op. `why_not` takes what the op takes and judges device, dtype and static sizes only."""

    name: str
    run: Callable[..., Any]
    why_not: Callable[..., str | None]


def choose(op: str, backends: Sequence[Backend], wanted: str, *args: Any) -> Backend:
    """The backend called `wanted`, or with "auto" the first of `backends` that can run `args`.

    `backends` stand in order of speed. Raises ValueError for a name that is none of them, BackendUnavailable
    if the one asked for cannot run, or if none can.
    """
    names = [backend.name for backend in backends]
    if wanted not in ("auto", *names):
        raise ValueError(f"{op}: backend={wanted!r} does not exist; choose from {', '.join(['auto', *names])}")
    reasons: list[str] = []
    for backend in backends:
        if wanted not in ("auto", backend.name):
            continue
        reason = backend.why_not(*args)
        if reason is None:
            if wanted == "auto":
                _log_once(op, backend.name, reasons)
            return backend
        reasons.append(f"{backend.name}: {reason}")
    can = [b.name for b in backends if wanted not in ("auto", b.name) and b.why_not(*args) is None]
    remedy = f"; these inputs can run on {', '.join(can)}" if can else ""
    raise BackendUnavailable(f"{op}: no backend for backend={wanted!r} ({'; '.join(reasons)}){remedy}")


def _log_once(op: str, name: str, passed_over: list[str]) -> None:
    if torch.compiler.is_compiling() or (op, name) in _logged:
        return
    _logged.add((op, name))
    reasons = f" ({'; '.join(passed_over)})" if passed_over else ""
    # the reference is there to be right, not to be used: say so where nobody has asked to hear
    _log.log(logging.WARNING if name == "reference" else logging.INFO, "%s runs on %s%s", op, name, reasons)
