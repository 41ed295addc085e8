"""Training on DeepSpeed ZeRO: the only package that imports deepspeed."""

from delib_fast.engine.engine import Engine
from delib_fast.engine.ranks import Ranks, native_precision
from delib_fast.engine.step_guard import StepVerdict

__all__ = ["Engine", "Ranks", "StepVerdict", "native_precision"]
