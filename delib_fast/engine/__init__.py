"""Training on DeepSpeed ZeRO: the only package that imports deepspeed."""

from delib_fast.engine.engine import Engine, Ranks, native_precision

__all__ = ["Engine", "Ranks", "native_precision"]
