"""Skips bad steps. They are found on the device, skipped on the device, and reported when metrics are read.

A step is bad if its loss or its gradient norm is not finite or, with `spike_factor`, if the norm is that many times the
running mean of earlier norms. One such step would ruin the weights and every optimizer moment permanently, so it must
be detected before the optimizer changes them, and the check must not make the host wait for the device:

- A non-finite loss multiplies its gradient by NaN, and the reduction carries the NaN to every rank. (The gradient of an
  infinite loss can be finite, and then only one rank would know.)
- The norm of the reduced gradient is the same tensor on every rank, so all ranks reach the same verdict.
- torch's fused optimizers accept the verdict as a tensor (`found_inf`, intended for loss scaling) and skip weights,
  moments and step count inside the kernel. For other optimizers the host waits for the verdict and does not call them.

DeepSpeed 0.19 silently skips non-finite steps at ZeRO 1 to 3, and applies them at stage 0. Here every stage has the
same verdicts, which `read` fetches in one transfer when a metrics record is due.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_DECAY = 0.98  # of the running mean of the norm: a time constant of 50 steps
_WARMUP = 20  # good steps before a norm can be called a spike


@dataclass(frozen=True)
class StepVerdict:
    """Whether one step was skipped, and why."""

    step: int
    """The step's index in its stage, from 0."""
    skipped: bool
    norm: float | None
    """The gradient norm before clipping; None if it is not finite."""
    mean_norm: float | None
    """The running mean that the norm was compared with; None during the first steps."""
    due_to_loss_scale: bool = False
    """The step was skipped only because fp16 tried a loss scale that was too high."""


class StepGuard:
    """Decides for each step of an optimizer whether it is skipped.

    Args:
        optimizer: a torch optimizer; its `step` method is wrapped.
        norm: returns the global norm of the gradient that the optimizer is about to apply, the same on every rank.
        device: where the verdicts are computed.
        spike_factor: skip a step whose norm is more than this many times the running mean; None disables the check.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        norm: Callable[[], Tensor | float | None],
        device: torch.device,
        spike_factor: float | None,
    ) -> None:
        self._optimizer, self._norm, self._device = optimizer, norm, device
        self._spike_factor = spike_factor
        self._supports_found_inf = bool(getattr(optimizer, "_step_supports_amp_scaling", False))
        self._plain_step = optimizer.step
        optimizer.step = self._guarded_step  # type: ignore[method-assign]
        self._bad: Tensor | None = None
        self._verdicts: list[tuple[tuple[int, bool], Tensor, Tensor, Tensor]] = []
        self._packs: list[tuple[int, int, Tensor]] = []
        self._mean_norm, self._good, self._skipped = (self._scalar(0.0) for _ in range(3))

    # --- during a step: nothing here waits for the device ---------------------------------------------------

    def watch(self, step: int, nll: Tensor) -> None:
        """Remember the position of the first non-finite nll in a micro-batch. nll: (T,)."""
        positions = torch.arange(nll.numel(), device=nll.device)
        first = positions.where(~nll.isfinite(), nll.numel()).amin() if nll.numel() else positions.sum()
        pack = self._packs[-1][1] + 1 if self._packs and self._packs[-1][0] == step else 0
        self._packs.append((step, pack, torch.where(first < nll.numel(), first, -1)))

    @staticmethod
    def propagate_nan(loss: Tensor) -> Tensor:
        """The same loss, with a gradient of NaN if the loss is not finite."""
        return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)

    def end_step(self, step: int, applied: bool, due_to_loss_scale: bool = False) -> None:
        """Record the verdict on a step.

        Args:
            applied: whether DeepSpeed called the optimizer.
            due_to_loss_scale: whether it did not because fp16's loss scale was too high.
        """
        if not applied or self._bad is None:
            norm, bad = self._scalar(torch.nan), self._scalar(1.0)
        else:
            norm, bad = self._last_norm, self._bad
        self._verdicts.append(
            ((step, due_to_loss_scale), norm, bad, self._mean_norm.where(self._good >= _WARMUP, torch.nan))
        )
        mean = torch.where(self._good > 0, _DECAY * self._mean_norm + (1 - _DECAY) * norm, norm)
        self._mean_norm = self._mean_norm.where(bad > 0, mean)
        self._good = self._good + (1 - bad)
        self._skipped = self._skipped + bad
        self._bad = None

    def _guarded_step(self, *args: Any, **options: Any) -> Any:
        if self._bad is None:  # ZeRO 3 calls the optimizer once for each of its groups: one verdict for all of them
            norm = self._norm()
            self._last_norm = self._scalar(torch.nan if norm is None else norm)
            self._bad = self._is_bad(self._last_norm)
        if self._supports_found_inf:
            self._optimizer.found_inf = self._bad  # type: ignore[attr-defined]
        elif bool(self._bad):
            return None
        return self._plain_step(*args, **options)

    def _is_bad(self, norm: Tensor) -> Tensor:
        """1.0 if a step of this gradient norm must be skipped, else 0.0."""
        bad = ~norm.isfinite()
        if self._spike_factor is not None:
            bad = bad | ((norm > self._spike_factor * self._mean_norm) & (self._good >= _WARMUP))
        return bad.float()

    def _scalar(self, value: Tensor | float) -> Tensor:
        if isinstance(value, Tensor):
            return value.detach().to(self._device, torch.float32).reshape(())
        return torch.full((), float(value), device=self._device)

    # --- when metrics are read ------------------------------------------------------------------------------

    def read(self) -> tuple[list[StepVerdict], dict[int, list[tuple[int, int]]]]:
        """Fetch what was recorded since the last call. Waits for the device once.

        Returns:
            The verdicts; and for each step in which this rank had a non-finite loss, the pairs of the pack's index and
            the token's position.
        """
        numbers = [n for _, *three in self._verdicts for n in three] + [n for _, _, n in self._packs]
        host = torch.stack([n.double() for n in numbers]).tolist() if numbers else []
        verdicts = []
        for i, ((step, due_to_loss_scale), *_) in enumerate(self._verdicts):
            norm, bad, mean = host[3 * i : 3 * i + 3]
            verdicts.append(
                StepVerdict(
                    step,
                    bool(bad),
                    norm if abs(norm) < float("inf") else None,
                    mean if mean == mean else None,
                    due_to_loss_scale,
                )
            )
        positions: dict[int, list[tuple[int, int]]] = {}
        for (step, pack, _), token in zip(self._packs, host[3 * len(self._verdicts) :], strict=True):
            if token >= 0:
                positions.setdefault(step, []).append((pack, int(token)))
        self._verdicts, self._packs = [], []
        return verdicts, positions

    @property
    def skipped(self) -> int:
        """How many steps were skipped since the stage began. Waits for the device."""
        return int(self._skipped)

    def state(self) -> dict[str, float]:
        """The state to save in a checkpoint, as JSON values. Waits for the device."""
        return {"mean_norm": float(self._mean_norm), "good": float(self._good), "skipped": float(self._skipped)}

    def restore(self, state: dict[str, float]) -> None:
        """Set the state that `state` returned."""
        self._mean_norm, self._good, self._skipped = (
            self._scalar(state[name]) for name in ("mean_norm", "good", "skipped")
        )
