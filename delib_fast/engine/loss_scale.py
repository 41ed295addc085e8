"""The dynamic loss scale of fp16: DeepSpeed's rule, applied between steps and saved in checkpoints.

Gradients would underflow in fp16, so the loss is multiplied by a power of two and the gradients are divided by it
before the optimizer step. If a scale makes the gradients overflow, the step is skipped and the scale is halved; after a
number of steps without an overflow it is doubled.
"""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class DeferredLossScaler(DynamicLossScaler):  # type: ignore[misc]  # deepspeed is not typed
    """DeepSpeed's dynamic loss scaler, with a scale that changes only between steps.

    DeepSpeed 0.19 changes the scale during a step, before it divides the gradients by it. A step that doubles the scale
    then uses half of its gradient, and compares half of its norm with the clipping threshold. At the smallest scale
    DeepSpeed raises a bare Exception; here the step guard counts the bad step and logs its rows.

    Args:
        original: the scaler to replace; its settings and state are copied.
    """

    def __init__(self, original: DynamicLossScaler) -> None:
        self.__dict__.update(vars(original))
        self.raise_error_at_min_scale = False
        self._overflow: bool | None = None

    def update_scale(self, overflow: bool) -> None:
        """Remember whether the gradients overflowed. DeepSpeed calls this during a step."""
        self._overflow = overflow

    def update(self) -> bool:
        """Lower or raise the scale for the next step. Call it after a step.

        Returns:
            Whether the step was skipped because the scale was too high. It is false at the smallest scale: there the
            step itself is bad.
        """
        overflow, self._overflow = self._overflow, None
        if overflow is None:
            return False
        due_to_loss_scale = overflow and self.cur_scale > self.min_scale
        super().update_scale(overflow)
        return bool(due_to_loss_scale)

    def state(self) -> dict[str, Any]:
        """The state to save in a checkpoint, as JSON values."""
        return {name: getattr(self, name) for name in _STATE}

    def restore(self, state: dict[str, Any]) -> None:
        """Set the state that `state` returned."""
        self.__dict__.update({name: state[name] for name in _STATE})


def defer_loss_scaler(zero: Any) -> DeferredLossScaler | None:
    """Replace the dynamic loss scaler of a ZeRO optimizer. Returns None if the loss has no scale or a constant one."""
    if not isinstance(getattr(zero, "loss_scaler", None), DynamicLossScaler):
        return None
    scaler = DeferredLossScaler(zero.loss_scaler)
    zero.loss_scaler = scaler
    return scaler
