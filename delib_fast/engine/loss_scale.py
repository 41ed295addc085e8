"""The loss scale of fp16: DeepSpeed's rule for it, settled after the update and kept in checkpoints.

Gradients of fp16 would underflow, so the loss is multiplied by a power of two, and gradients divided by it before the
update. A scale that makes them overflow is halved, and the update left out; one that was good for a while is doubled.
"""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class DeferredLossScaler(DynamicLossScaler):
    """DeepSpeed's, with a scale that changes between updates only.

    DeepSpeed 0.19 changes it in the update, before it divides the gradients by it: an update that doubles the scale is
    made with half of its gradient, and its norm is held against the clipping with half of its length. And at the
    smallest scale it raises a bare Exception, where the guard counts bad updates, and names their rows.
    """

    def __init__(self, theirs: DynamicLossScaler) -> None:
        self.__dict__.update(vars(theirs))
        self.raise_error_at_min_scale = False
        self._overflow: bool | None = None

    def update_scale(self, overflow: bool) -> None:
        self._overflow = overflow

    def update(self) -> bool:
        """After an update: lower or raise the scale for the next. Returns whether the scale, too high, is what this
        update was left out for: where it can't fall any more, it isn't."""
        overflow, self._overflow = self._overflow, None
        if overflow is None:
            return False
        due_to_loss_scale = overflow and self.cur_scale > self.min_scale
        super().update_scale(overflow)
        return due_to_loss_scale

    def state(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _STATE}

    def restore(self, state: dict[str, Any]) -> None:
        self.__dict__.update({name: state[name] for name in _STATE})


def defer_loss_scaler(zero: Any) -> DeferredLossScaler | None:
    """Put it in the place of DeepSpeed's; None where the loss is not scaled, or by a factor that never changes."""
    if not isinstance(getattr(zero, "loss_scaler", None), DynamicLossScaler):
        return None
    zero.loss_scaler = DeferredLossScaler(zero.loss_scaler)
    return zero.loss_scaler
