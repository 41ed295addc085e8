"""The training state, whole: fp32 weights and optimizer moments by parameter name, whatever the ZeRO stage.

ZeRO keeps fragments of flat buffers that only make sense at one stage and one number of ranks. Here each
parameter is assembled in full (a collective over the ranks), so that what is saved can be read at any other
stage and number of ranks, without pickle.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn

from delib_fast.engine.cpu_adam import CPUAdam
from delib_fast.engine.import_deepspeed import deepspeed
from delib_fast.engine.muon import MOMENTUM, grouped_parameters
from delib_fast.engine.optimizer import moments_of


class TrainingState:
    """Access to one DeepSpeed engine's weights and moments by parameter name."""

    def __init__(self, module: nn.Module, basic: torch.optim.Optimizer, zero: Any, stage: int) -> None:
        self._module = module
        self._basic = basic  # the torch optimizer
        self._zero = zero  # DeepSpeed's wrapper around it (or the same object)
        self._stage = stage
        self._moments = {id(p): moments_of(basic, p) for p in module.parameters()}
        self._prime()

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self._module.named_parameters() if p.requires_grad]

    def tensors(self) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        """Every (key, function that assembles the tensor). All ranks must call the functions in this order."""
        for name, parameter in self.named_parameters():
            yield f"weight/{name}", partial(self._get, parameter, None)
            for moment in self._moments[id(parameter)]:
                yield f"{moment}/{name}", partial(self._get, parameter, moment)

    def weight(self, parameter: nn.Parameter) -> Tensor:
        """The parameter in full: fp32 if it is trained, as it is if frozen. A collective: call it on all ranks."""
        if parameter.requires_grad:
            return self._get(parameter, None)
        with deepspeed.zero.GatheredParameters([parameter], enabled=self._stage == 3):
            return parameter.detach().to("cpu", copy=True)

    def restore(self, read: Callable[[str], Tensor], optimizer_steps: int) -> None:
        """Set every weight and moment from `read(key)` (full tensors) and the optimizer's step count."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                for key in (None, *self._moments[id(parameter)]):
                    self._set(parameter, read(f"{key or 'weight'}/{name}"), key)
        self.set_optimizer_steps(optimizer_steps)
        self._refresh_gathered()

    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Set the fp32 weights of these trained parameters: exactly, where the module itself holds them rounded."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name in weights:
                    self._set(parameter, weights[name], None)
        self._refresh_gathered()

    def _refresh_gathered(self) -> None:
        persistent = getattr(self._zero, "persistent_parameters", [])
        if persistent:  # ZeRO-3 keeps small parameters gathered; they still hold the old values
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)

    def set_optimizer_steps(self, steps: int) -> None:
        for state in self._basic.state.values():
            if isinstance(state.get("step"), Tensor):
                state["step"].fill_(steps)
            elif "step" in state:  # of DeepSpeed's CPU Adam
                state["step"] = steps

    # --- one parameter --------------------------------------------------------------------------------------

    def _get(self, parameter: nn.Parameter, moment: str | None) -> Tensor:
        fragment = self._replicated(parameter, moment)
        if fragment is not None:
            return fragment.detach().to(torch.float32)
        if moment is None:
            full = safe_get_full_fp32_param(parameter)
        else:
            full = safe_get_full_optimizer_state(parameter, moment)
        return full.detach().view(_full_shape(parameter))

    def _set(self, parameter: Any, value: Tensor, moment: str | None) -> None:
        if tuple(value.shape) != _full_shape(parameter):
            raise ValueError(f"a saved tensor has shape {tuple(value.shape)}, the model has {_full_shape(parameter)}")
        value = value.to(torch.float32)
        fragment = self._replicated(parameter, moment)
        if fragment is not None:
            fragment.copy_(value)
        elif self._stage == 3:
            piece = self._zero3_partition(parameter, value)
            parameter._z3_optimizer.set_local_hp_param(piece, parameter, moment)
            if moment is None:
                parameter.ds_tensor.data.copy_(piece)
        elif moment is None:
            safe_set_full_fp32_param(parameter, value)
            parameter.data.copy_(value)
        else:
            safe_set_full_optimizer_state(parameter, value, moment)

    def _zero3_partition(self, parameter: Any, value: Tensor) -> Tensor:
        """This rank's slice of a full tensor, padded as ZeRO-3 pads the last rank's."""
        size = parameter.partition_numel()
        rank = parameter._z3_optimizer._get_param_partition_rank(parameter)
        piece = torch.zeros(size, dtype=value.dtype)
        mine = value.flatten()[size * rank : size * (rank + 1)]
        piece[: mine.numel()] = mine
        return piece.to(parameter.ds_tensor.device)

    def _replicated(self, parameter: nn.Parameter, moment: str | None) -> Tensor | None:
        """The tensor that holds the whole parameter (or moment) on this rank, at ZeRO stage 0; else None."""
        if self._stage != 0:
            return None
        return parameter.data if moment is None else self._basic.state[parameter][moment]

    def _prime(self) -> None:
        """Allocate the optimizer's state where its first step would, and count no step for it.

        DeepSpeed takes a step for that at construction at some stages and not at others, and counts it: AdamW's
        bias correction would differ between stages.
        """
        for group, (holder, moments) in enumerate(self._holders()):
            state = self._basic.state[holder]
            if moments and not state:
                if MOMENTUM not in moments:
                    state["step"] = (
                        0
                        if isinstance(self._basic, CPUAdam)
                        else torch.zeros((), dtype=torch.float32, device=holder.device)
                    )
                with self._off_the_disk(group):
                    state.update({moment: torch.zeros_like(holder) for moment in moments})
        link = getattr(self._zero, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:
            link()
        self.set_optimizer_steps(0)

    @contextlib.contextmanager
    def _off_the_disk(self, group: int) -> Iterator[None]:
        """Within this a group of ZeRO 3, if it is one that is offloaded to a disk, is in memory; then it is written."""
        swapped = self._stage == 3 and self._zero._swappable_optimizer_subgroup(group)
        if swapped:
            self._zero._optimizer_states_and_gradient_swap_in(group)
        yield
        if swapped:
            self._zero._optimizer_states_and_gradient_swap_out(group)

    def _holders(self) -> Iterator[tuple[Tensor, tuple[str, ...]]]:
        """The tensors that the torch optimizer steps, with the names of the moments of each."""
        if self._stage == 0:
            yield from ((p, self._moments[id(p)]) for group in self._basic.param_groups for p in group["params"])
            return
        holders = [holder for group in self._basic.param_groups for holder in group["params"]]
        if self._stage == 3:  # there it is handed one of these at a time
            holders = list(self._zero.fp32_partitioned_groups_flat)
        for holder, parameters in zip(holders, grouped_parameters(self._zero, self._stage), strict=True):
            yield holder, self._moments[id(parameters[0])]


def _full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
