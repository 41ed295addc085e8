"""Training on DeepSpeed ZeRO: the only package that imports deepspeed.

The names below are imported when they are first used. The launch script can therefore set environment variables that
deepspeed reads on import, and `engine.slurm` and `engine.deepspeed_json` can be imported without deepspeed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from delib_fast.engine.engine import Engine
    from delib_fast.engine.ranks import Ranks
    from delib_fast.engine.step_guard import StepVerdict

__all__ = ["Engine", "Ranks", "StepVerdict"]

_MODULES = {"Engine": "engine", "Ranks": "ranks", "StepVerdict": "step_guard"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
