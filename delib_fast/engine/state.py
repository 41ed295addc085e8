"""The training state in full: fp32 weights and optimizer moments by parameter name, independent of the ZeRO stage.

ZeRO keeps fragments of flat buffers, whose layout depends on the stage and the number of ranks. This module gathers
each parameter in full (a collective), so that a checkpoint can be read at any stage and number of ranks.
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

from delib_fast.engine.import_deepspeed import deepspeed
from delib_fast.engine.muon import MOMENTUM, grouped_parameters
from delib_fast.engine.optimizer import moments_of


class TrainingState:
    """Access to the weights and moments of one DeepSpeed engine by parameter name.

    Args:
        module: the module that DeepSpeed trains.
        optimizer: the torch optimizer.
        zero: DeepSpeed's wrapper around the optimizer; at stage 0 in fp32 the optimizer itself.
        stage: the ZeRO stage.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, zero: Any, stage: int) -> None:
        self._module = module
        self._optimizer = optimizer
        self._zero = zero
        self._stage = stage
        self._moments = {id(p): moments_of(optimizer, p) for p in module.parameters()}
        self._allocate_state()

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The trained parameters with their names."""
        return [(name, p) for name, p in self._module.named_parameters() if p.requires_grad]

    def tensors(self) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        """Every key with a function that gathers its tensor. Every rank must call the functions in this order.

        The keys are `weight/NAME` and, for each moment, `MOMENT/NAME`. Tensors are fp32.
        """
        for name, parameter in self.named_parameters():
            yield f"weight/{name}", partial(self._get, parameter, None)
            for moment in self._moments[id(parameter)]:
                yield f"{moment}/{name}", partial(self._get, parameter, moment)

    def weight(self, parameter: nn.Parameter) -> Tensor:
        """The full weight of a parameter: fp32 if it is trained, in its own dtype if it is frozen. A collective."""
        if parameter.requires_grad:
            return self._get(parameter, None)
        with deepspeed.zero.GatheredParameters([parameter], enabled=self._stage == 3):
            return parameter.detach().to("cpu", copy=True)

    def restore(
        self,
        read: Callable[[str], Tensor],
        optimizer_steps: int,
        heartbeat: Callable[[str], None] = lambda activity: None,
    ) -> None:
        """Set every weight and moment, and the optimizer's step count. A collective.

        Args:
            read: returns the full tensor of a key; see `tensors`.
            optimizer_steps: the optimizer steps that were made; skipped steps do not count.
            heartbeat: called before each tensor is read and set.
        Raises:
            ValueError: a tensor has another shape than the model's parameter; the message has its key.
        """
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                for moment in (None, *self._moments[id(parameter)]):
                    key = f"{moment or 'weight'}/{name}"
                    heartbeat(f"reading {key} from a checkpoint")
                    self._set(key, parameter, read(key), moment)
        self._set_optimizer_steps(optimizer_steps)
        self._refresh_gathered()

    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Set the fp32 weights of some trained parameters, of which the module holds rounded copies. A collective."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name in weights:
                    self._set(f"weight/{name}", parameter, weights[name], None)
        self._refresh_gathered()

    def _refresh_gathered(self) -> None:
        persistent = getattr(self._zero, "persistent_parameters", [])
        if persistent:  # ZeRO 3 keeps small parameters gathered, and they still hold the old values
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)

    def _set_optimizer_steps(self, steps: int) -> None:
        for state in self._optimizer.state.values():
            if "step" in state:
                state["step"].fill_(steps)

    # --- one parameter --------------------------------------------------------------------------------------

    def _get(self, parameter: nn.Parameter, moment: str | None) -> Tensor:
        """A moment of a parameter in full, or its weight if `moment` is None."""
        replica = self._replica(parameter, moment)
        if replica is not None:
            return replica.detach().to(torch.float32)
        full: Tensor
        if moment is None:
            full = safe_get_full_fp32_param(parameter)
        else:
            full = safe_get_full_optimizer_state(parameter, moment)
        return full.detach().view(_full_shape(parameter))

    def _set(self, key: str, parameter: Any, value: Tensor, moment: str | None) -> None:
        if tuple(value.shape) != _full_shape(parameter):
            raise ValueError(
                f"the saved tensor {key!r} has the shape {tuple(value.shape)}, but the model's has "
                f"{_full_shape(parameter)}: another model wrote it"
            )
        value = value.to(torch.float32)
        replica = self._replica(parameter, moment)
        if replica is not None:
            replica.copy_(value)
        elif self._stage == 3:
            shard = self._zero3_shard(parameter, value)
            parameter._z3_optimizer.set_local_hp_param(shard, parameter, moment)
            if moment is None:
                parameter.ds_tensor.data.copy_(shard)
        elif moment is None:
            safe_set_full_fp32_param(parameter, value)
            parameter.data.copy_(value)
        else:
            safe_set_full_optimizer_state(parameter, value, moment)

    def _zero3_shard(self, parameter: Any, value: Tensor) -> Tensor:
        """This rank's shard of a full tensor, flat, padded as ZeRO 3 pads the last rank's."""
        size = parameter.partition_numel()
        rank = parameter._z3_optimizer._get_param_partition_rank(parameter)
        shard = torch.zeros(size, dtype=value.dtype)
        own = value.flatten()[size * rank : size * (rank + 1)]
        shard[: own.numel()] = own
        return shard.to(parameter.ds_tensor.device)

    def _replica(self, parameter: nn.Parameter, moment: str | None) -> Tensor | None:
        """At ZeRO stage 0, this rank's own copy of the whole weight or moment; None at the other stages."""
        if self._stage != 0:
            return None
        if moment is None:
            return parameter.data
        replica: Tensor = self._optimizer.state[parameter][moment]
        return replica

    # --- allocation -----------------------------------------------------------------------------------------

    def _allocate_state(self) -> None:
        """Allocate the optimizer's state as its first step would, without counting a step.

        At some stages DeepSpeed makes a step for that when it is constructed, and counts it; at others it does not.
        AdamW's bias correction would then depend on the stage.
        """
        for group, (holder, moments) in enumerate(self._holders()):
            state = self._optimizer.state[holder]
            if moments and not state:
                if MOMENTUM not in moments:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=holder.device)
                with self._swapped_in(group):
                    state.update({moment: torch.zeros_like(holder) for moment in moments})
        link_state = getattr(self._zero, "_lazy_init_hp_params_optimizer_state", None)
        if link_state is not None:
            link_state()
        self._set_optimizer_steps(0)

    @contextlib.contextmanager
    def _swapped_in(self, group: int) -> Iterator[None]:
        """Hold a ZeRO 3 group in memory while the block runs, if the `deepspeed:` block offloads it to NVMe.

        A swapped-out holder has no elements, and moments that are allocated like it crash DeepSpeed's first step.
        """
        swapped = self._stage == 3 and self._zero._swappable_optimizer_subgroup(group)
        if swapped:
            self._zero._optimizer_states_and_gradient_swap_in(group)
        yield
        if swapped:
            self._zero._optimizer_states_and_gradient_swap_out(group)

    def _holders(self) -> Iterator[tuple[Tensor, tuple[str, ...]]]:
        """The tensors that the torch optimizer steps, each with the names of its moments."""
        if self._stage == 0:
            yield from ((p, self._moments[id(p)]) for group in self._optimizer.param_groups for p in group["params"])
            return
        holders = [holder for group in self._optimizer.param_groups for holder in group["params"]]
        if self._stage == 3:  # stage 3 passes one of these at a time to the optimizer
            holders = list(self._zero.fp32_partitioned_groups_flat)
        for holder, parameters in zip(holders, grouped_parameters(self._zero, self._stage), strict=True):
            yield holder, self._moments[id(parameters[0])]


def _full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
