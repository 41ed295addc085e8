"""Training on DeepSpeed ZeRO: the only package that imports deepspeed."""

from delib_fast.engine.checkpoint_writer import CheckpointWriter
from delib_fast.engine.engine import Engine, Ranks, native_precision
from delib_fast.engine.guard import StepVerdict
from delib_fast.engine.watchdog import Watchdog

__all__ = ["CheckpointWriter", "Engine", "Ranks", "StepVerdict", "Watchdog", "native_precision"]
