"""Muon for the hidden matrices and AdamW for the other parameters, on whole weights or on ZeRO's shards of them.

    for each matrix W (rows, columns) with gradient G, momentum M, learning rate η and weight decay λ:
        M ← β·M + (1 − β)·G
        U ← newton_schulz((1 − β)·G + β·M)                      # close to the nearest orthogonal matrix
        W ← (1 − η·λ)·W − η · 0.2·√max(rows, columns) · U

This is `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`, which computes the Newton–Schulz iteration (in bf16) and the
factor. The factor gives a Muon step the size of an AdamW step, so that both share one learning rate and one weight
decay (arXiv 2502.16982); the algorithm is K. Jordan's (kellerjordan.github.io/posts/muon).

This module adds ZeRO. Momentum and decay are elementwise, but Newton–Schulz needs whole matrices. A matrix that is
whole on one rank (most are at ZeRO 1 and 2) is orthogonalized there. The others (all of them at ZeRO 3) are processed
in rounds of one matrix per rank: an all-to-all brings each matrix to one rank, and a second one returns the pieces of
the result. Each matrix is orthogonalized once, and a rank holds one whole matrix at a time.

DeepSpeed 0.19.8 has its own Muon. It is not used, because it lacks the factor, clips the orthogonalized step instead of
the gradient, and reports the norm of that step as the gradient norm, in which the step guard would never see a spike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from delib_fast.ops import FusedLossHead

MOMENTUM = "momentum_buffer"


def hidden_matrices(module: nn.Module) -> list[nn.Parameter]:
    """The trainable matrices that map hidden states to hidden states, which Muon trains.

    These are the two-dimensional parameters except those of embeddings and the head, and the three-dimensional stacks
    of experts' matrices.
    """
    excluded = {
        id(p)
        for part in module.modules()
        if isinstance(part, nn.Embedding | FusedLossHead)
        for p in part.parameters(recurse=False)
    }
    return [
        p
        for name, p in module.named_parameters()
        if p.requires_grad and id(p) not in excluded and (_ndim(p) == 2 or (_ndim(p) == 3 and "experts" in name))
    ]


def muon_direction(momentum: Tensor) -> Tensor:
    """The direction of a Muon step, per unit of learning rate: 0.2·√max(rows, columns) · newton_schulz(momentum).

    Args:
        momentum: float32, (rows, columns) or a stack (n, rows, columns) whose matrices are independent.
    Returns:
        A new tensor of the same shape and dtype; zeros for zeros.
    """
    negative = torch.zeros_like(momentum)
    rows_columns = momentum.shape[-2:]
    matrices = [nn.Parameter(matrix) for matrix in negative.view(-1, *rows_columns)]  # they share its memory
    for matrix, gradient in zip(matrices, momentum.view(-1, *rows_columns), strict=True):
        matrix.grad = gradient
    torch.optim.Muon(matrices, lr=1.0, weight_decay=0.0, momentum=0.0, adjust_lr_fn="match_rms_adamw").step()
    return negative.neg_()


class Span(NamedTuple):
    """A contiguous range of a flattened matrix."""

    start: int
    numel: int


class Fragment(NamedTuple):
    """Where this rank stores its span of a parameter. A holder is a tensor that the torch optimizer steps."""

    holder: Tensor
    offset: int
    """The position of the span's first number in the flattened holder."""
    span: Span


class Matrix(NamedTuple):
    """How ZeRO shards one matrix."""

    shape: tuple[int, ...]
    offset: int
    """The position of this rank's span in its holder."""
    spans: tuple[Span, ...]
    """The span of each rank, in rank order; together they are the matrix, in order."""


class Muon(torch.optim.Optimizer):
    """Muon for some parameters and AdamW for the others, in one optimizer that DeepSpeed can wrap.

    If the step guard sets `found_inf`, a step leaves weights and moments unchanged, without waiting for the device.

    Args:
        matrices: the parameters that Muon trains; see `hidden_matrices`.
        rest: the parameter groups that AdamW trains.
        momentum, weight_decay: Muon's β and λ.
        adamw: creates a fused AdamW from parameter groups.
    """

    def __init__(
        self,
        matrices: Sequence[nn.Parameter],
        rest: Sequence[dict[str, Any]],
        *,
        momentum: float,
        weight_decay: float,
        adamw: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
    ) -> None:
        groups: list[dict[str, Any]] = [
            {"params": list(matrices), "weight_decay": weight_decay, "momentum": momentum, "hidden": True}
        ]
        rest = [group for group in rest if group["params"]]
        self._adamw = adamw(list(rest)) if rest else None
        if self._adamw is not None:  # its groups have all the settings that its step reads
            groups += [group | {"hidden": False} for group in self._adamw.param_groups]
        super().__init__(groups, {"lr": 0.0})
        self._moments = {id(p): (MOMENTUM,) for p in matrices}
        self._layout: dict[int, list[Matrix]] | None = None
        self._device = torch.device("cpu")
        self._step_supports_amp_scaling = True
        self.found_inf: Tensor | None = None

    def moments(self, parameter: nn.Parameter) -> tuple[str, ...]:
        """The names of the tensors that the optimizer keeps for a parameter."""
        return self._moments.get(id(parameter), ("exp_avg", "exp_avg_sq"))

    def bind(self, zero: Any, stage: int, device: torch.device) -> None:
        """Record how ZeRO shards each matrix, and the device on which ranks exchange pieces. A collective."""
        self._device, self._layout = device, {}
        if stage == 0:
            return
        parameters, fragments = [], []
        for i, group in enumerate(grouped_parameters(zero, stage)):
            for parameter in (p for p in group if id(p) in self._moments):
                parameters.append(parameter)
                fragments.append(
                    _zero3_fragment(zero, parameter)
                    if stage == 3
                    else _flat_fragment(self.param_groups[i]["params"][0], parameter)
                )
        mine = torch.tensor([list(fragment.span) for fragment in fragments], device=device).reshape(-1, 2)
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mine)
        spans = [[Span(*span) for span in rank.tolist()] for rank in everyone]
        for i, (parameter, fragment) in enumerate(zip(parameters, fragments, strict=True)):
            matrix = Matrix(_shape(parameter), fragment.offset, tuple(rank[i] for rank in spans))
            self._layout.setdefault(id(fragment.holder), []).append(matrix)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if group["hidden"]:
                for holder in group["params"]:
                    self._step_holder(group, holder)
            elif self._adamw is not None:
                self._adamw.param_groups, self._adamw.state = [group], self.state
                self._adamw.found_inf = self.found_inf  # type: ignore[attr-defined]
                self._adamw.step()

    def _step_holder(self, group: dict[str, Any], holder: Tensor) -> None:
        """Step one matrix, or this rank's flat shard of many."""
        state = self.state[holder]
        if MOMENTUM not in state:
            state[MOMENTUM] = torch.zeros_like(holder)
        if self._layout is None or holder.grad is None:  # DeepSpeed's own step with zero gradients, to allocate state
            return
        gradient, good = holder.grad.to(holder.dtype), torch.ones((), dtype=holder.dtype, device=holder.device)
        if self.found_inf is not None:
            good = (self.found_inf == 0).to(good)
            gradient = gradient.where(good > 0, 0.0)
        momentum, beta = state[MOMENTUM], group["momentum"]
        momentum.lerp_(gradient, (1 - beta) * good)
        nesterov = gradient.lerp(momentum, beta)
        if holder.ndim > 1:
            direction = muon_direction(nesterov)
        else:
            direction = self._sharded_direction(nesterov, self._layout.get(id(holder), []))
        holder.mul_(1 - group["lr"] * group["weight_decay"] * good)
        holder.sub_(direction * (group["lr"] * good))

    # --- shards of matrices ---------------------------------------------------------------------------------

    def _sharded_direction(self, flat: Tensor, matrices: Sequence[Matrix]) -> Tensor:
        """The direction of every matrix that `flat` has a piece of, at that piece's position; zero elsewhere.

        A collective.
        """
        rank, ranks = dist.get_rank(), dist.get_world_size()
        out = torch.zeros_like(flat)
        whole = [m for m in matrices if sum(span.numel > 0 for span in m.spans) == 1]
        for matrix in whole:
            if numel := matrix.spans[rank].numel:
                piece = flat.narrow(0, matrix.offset, numel).to(self._device)
                direction = muon_direction(piece.view(matrix.shape))
                out.narrow(0, matrix.offset, numel).copy_(direction.view(-1))
        split = [m for m in matrices if sum(span.numel > 0 for span in m.spans) > 1]
        for first in range(0, len(split), ranks):
            self._exchange_round(flat, out, split[first : first + ranks], rank, ranks)
        return out

    def _exchange_round(self, flat: Tensor, out: Tensor, matrices: Sequence[Matrix], rank: int, ranks: int) -> None:
        """Process at most one split matrix per rank: gather it on its rank, and return the pieces of its direction."""
        mine = [m.spans[rank].numel for m in matrices] + [0] * (ranks - len(matrices))
        pieces = [flat.narrow(0, m.offset, numel) for m, numel in zip(matrices, mine, strict=False)]
        theirs = [span.numel for span in matrices[rank].spans] if rank < len(matrices) else [0] * ranks
        whole = flat.new_empty(sum(theirs), device=self._device)  # the pieces of all ranks, in order
        dist.all_to_all_single(whole, torch.cat(pieces).to(self._device), theirs, mine)
        if rank < len(matrices):
            whole = muon_direction(whole.view(matrices[rank].shape)).view(-1)
        back = flat.new_empty(sum(mine), device=self._device)
        dist.all_to_all_single(back, whole, mine, theirs)
        for matrix, numel, start in zip(matrices, mine, accumulate([0, *mine]), strict=False):
            out.narrow(0, matrix.offset, numel).copy_(back.narrow(0, start, numel))


# --- where ZeRO stores a parameter --------------------------------------------------------------------------


def grouped_parameters(zero: Any, stage: int) -> list[list[nn.Parameter]]:
    """The model's parameters as ZeRO 1 to 3 flattens them: one list for each of its groups (or parts of groups)."""
    groups = zero.fp16_groups if stage == 3 else getattr(zero, "bit16_groups", None)
    found: list[list[nn.Parameter]] = zero.bf16_groups if groups is None else groups  # its bf16 wrapper, at stage 1
    return found


def _flat_fragment(holder: Tensor, parameter: Any) -> Fragment:
    """Stages 1 and 2: a rank holds a contiguous range of all parameters of a group, one after another."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return Fragment(holder, 0, Span(0, 0))
    in_holder, in_parameter = mapping.hp_fragment_address, mapping.lp_fragment_address
    return Fragment(holder, in_holder.start, Span(in_parameter.start, in_parameter.numel))


def _zero3_fragment(zero: Any, parameter: Any) -> Fragment:
    """Stage 3: a rank holds an equal part of every parameter; the last rank's part is padded."""
    group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
    start = min(size * dist.get_rank(), parameter.ds_numel)
    return Fragment(
        zero.fp32_partitioned_groups_flat[group], offset, Span(start, min(size, parameter.ds_numel - start))
    )


def _ndim(parameter: nn.Parameter) -> int:
    return len(_shape(parameter))


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The parameter's full shape, also after ZeRO 3 has sharded it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
