"""Updates that must not be made: found on the device, left out on the device, told when the meters are read.

A step is bad if its loss or the norm of its gradient is not finite, or, with `spike_factor`, if the norm is so many
times the running mean of the steps before. One bad step would ruin the weights and every moment of the optimizer for
good, so it must be left out before the update, and finding out must not cost a wait for the device:

- a loss that is not finite multiplies its gradient by NaN, and the reduction carries that to every rank (the gradient
  of an infinite loss can be finite, and then only one rank would know);
- the norm of the reduced gradient is the same tensor on every rank, so all ranks come to one verdict;
- torch's fused optimizers take the verdict as a tensor (`found_inf`, made for loss scaling) and skip weights, moments
  and step count inside the kernel. Another optimizer is not called, which costs it a wait.

DeepSpeed 0.19 drops non-finite updates itself at ZeRO 1 to 3, and says nothing; at stage 0 it makes them. Here both end
in the same verdict, which `read` fetches in one transfer when a line of metrics is due.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_MEMORY = 0.98  # of the running mean of the norm: it forgets in some 50 steps
_WARM = 20  # good steps before a norm can be called a spike


@dataclass(frozen=True)
class StepVerdict:
    """One update: was it left out, and the norm of its gradient before clipping (None where it wasn't finite)."""

    step: int
    skipped: bool
    norm: float | None
    mean_norm: float | None
    """The running mean it was held against; None while that is not known yet."""
    due_to_loss_scale: bool = False
    """It is no fault of the update: fp16 tried a loss scale that was too high."""


class StepGuard:
    """Watches one optimizer.

    Args:
        optimizer: torch's; its `step` is wrapped.
        norm: the global norm of the gradient that the optimizer is about to apply, the same on every rank.
        spike_factor: leave out a step whose norm is more than so many times the running mean; None never.
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
        self._masks = bool(getattr(optimizer, "_step_supports_amp_scaling", False))  # fused: knows found_inf
        self._plain_step = optimizer.step
        optimizer.step = self._guarded_step  # type: ignore[method-assign]
        self._bad: Tensor | None = None
        self._verdicts: list[tuple[tuple[int, bool], Tensor, Tensor, Tensor]] = []
        self._packs: list[tuple[int, int, Tensor]] = []
        self._mean_norm, self._good, self._skipped = (self._scalar(0.0) for _ in range(3))

    # --- in the step: nothing here waits for the device -----------------------------------------------------

    def watch(self, step: int, nll: Tensor) -> None:
        """Remember where in a micro-batch the first nll is that isn't finite. nll: (T,)."""
        place = torch.arange(nll.numel(), device=nll.device)
        first = place.where(~nll.isfinite(), nll.numel()).amin() if nll.numel() else place.sum()
        pack = self._packs[-1][1] + 1 if self._packs and self._packs[-1][0] == step else 0
        self._packs.append((step, pack, torch.where(first < nll.numel(), first, -1)))

    @staticmethod
    def propagate_nan(loss: Tensor) -> Tensor:
        """The loss, its gradient NaN where the loss is not finite."""
        return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)

    def end_step(self, step: int, applied: bool, due_to_loss_scale: bool = False) -> None:
        """After the update of `step`. applied: whether DeepSpeed let it come to an optimizer step; excused: it did not
        because of fp16's loss scale."""
        if not applied or self._bad is None:
            norm, bad = self._scalar(torch.nan), self._scalar(1.0)
        else:
            norm, bad = self._last_norm, self._bad
        self._verdicts.append(
            ((step, due_to_loss_scale), norm, bad, self._mean_norm.where(self._good >= _WARM, torch.nan))
        )
        started = self._good > 0
        mean = torch.where(started, _MEMORY * self._mean_norm + (1 - _MEMORY) * norm, norm)
        self._mean_norm = self._mean_norm.where(bad > 0, mean)
        self._good = self._good + (1 - bad)
        self._skipped = self._skipped + bad
        self._bad = None

    def _guarded_step(self, *args: Any, **options: Any) -> Any:
        if self._bad is None:  # ZeRO-3 steps its groups one by one: one verdict for all
            norm = self._norm()
            self._last_norm = self._scalar(torch.nan if norm is None else norm)
            self._bad = self._verdict(self._last_norm)
        if self._masks:
            self._optimizer.found_inf = self._bad  # type: ignore[attr-defined]
        elif bool(self._bad):
            return None
        return self._plain_step(*args, **options)

    def _verdict(self, norm: Tensor) -> Tensor:
        bad = ~norm.isfinite()
        if self._spike_factor is not None:
            bad = bad | ((norm > self._spike_factor * self._mean_norm) & (self._good >= _WARM))
        return bad.float()

    def _scalar(self, value: Tensor | float) -> Tensor:
        if isinstance(value, Tensor):
            return value.detach().to(self._device, torch.float32).reshape(())
        return torch.full((), float(value), device=self._device)

    # --- when the meters are read ---------------------------------------------------------------------------

    def read(self) -> tuple[list[StepVerdict], dict[int, list[tuple[int, int]]]]:
        """The verdicts since the last call, and of this rank's packs with a loss that isn't finite, by step, which
        pack and at which token. Waits for the device, once."""
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
        places: dict[int, list[tuple[int, int]]] = {}
        for (step, pack, _), token in zip(self._packs, host[3 * len(self._verdicts) :], strict=True):
            if token >= 0:
                places.setdefault(step, []).append((pack, int(token)))
        self._verdicts, self._packs = [], []
        return verdicts, places

    @property
    def skipped(self) -> int:
        """Updates left out since the stage began. Waits for the device."""
        return int(self._skipped)

    def state(self) -> dict[str, float]:
        return {"mean_norm": float(self._mean_norm), "good": float(self._good), "skipped": float(self._skipped)}

    def restore(self, state: dict[str, float]) -> None:
        self._mean_norm, self._good, self._skipped = (
            self._scalar(state[name]) for name in ("mean_norm", "good", "skipped")
        )
