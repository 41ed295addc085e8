"""Muon for the hidden matrices and AdamW for all else, on whole weights or on the parts that ZeRO makes of them.

    of each matrix W (rows, columns) with gradient G, momentum M and learning rate η:
        M ← β·M + (1 − β)·G
        U ← newton_schulz((1 − β)·G + β·M)                      # nearly the nearest orthogonal matrix
        W ← (1 − η·λ)·W − η · 0.2·√max(rows, columns) · U

The step is K. Jordan's (kellerjordan.github.io/posts/muon); decay and the factor, which gives an update the size of an
AdamW update, so that one learning rate and one decay serve both, are of arXiv 2502.16982 (Moonlight).

Momentum and decay act on numbers; Newton–Schulz acts on whole matrices. A matrix that lies whole in one rank's part
(most do at ZeRO 1 and 2) is done there. The others (all, at ZeRO 3) go in rounds of one matrix a rank: an all-to-all
brings each to the rank that does it, and another brings every rank its piece of the update. No matrix is done twice,
and a rank holds one at a time.

DeepSpeed 0.19.8 has a Muon of its own. It is not used: it clips the orthogonalised update instead of the gradient and
takes its norm for the gradient's, so that the guard sees no spike; and it has no factor for AdamW's rate.
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
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # steepest at zero, for few steps; singular values end in 0.7 to 1.2
_STEPS = 5
_ADAMW_RMS = 0.2  # root mean square of an AdamW update, as arXiv 2502.16982 measures it


def newton_schulz(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """U·V' of matrix = U·S·V', roughly (singular values 0.7 to 1.2). matrix: (…, rows, columns), each by itself.

    Five steps of a quintic polynomial; 20·rows·columns·min(rows, columns) FLOPs and more. Computed, and returned, in
    `dtype`; zeros stay zeros.
    """
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(dtype)  # the norm in the matrix's own precision
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def hidden_matrices(module: nn.Module) -> list[nn.Parameter]:
    """The trainable matrices that map hidden states to hidden states: all of two dimensions but embeddings and head,
    and stacks of experts' matrices (three dimensions)."""
    ends = {
        id(p)
        for part in module.modules()
        if isinstance(part, nn.Embedding | FusedLossHead)
        for p in part.parameters(recurse=False)
    }
    return [
        p
        for name, p in module.named_parameters()
        if p.requires_grad and id(p) not in ends and (_ndim(p) == 2 or (_ndim(p) == 3 and "experts" in name))
    ]


class Span(NamedTuple):
    """What one rank holds of a flattened matrix."""

    start: int
    numel: int


class Matrix(NamedTuple):
    shape: tuple[int, ...]
    offset: int
    """of this rank's piece in its holder"""
    spans: tuple[Span, ...]
    """of each rank, in the matrix's order"""


class Muon(torch.optim.Optimizer):
    """Args:
        matrices: updated by Muon. rest: AdamW's parameter groups.
        dtype: what Newton–Schulz computes in, bf16 or fp32.
        adamw: makes the optimizer of the rest from its groups (fused).
    A verdict of the guard (`found_inf`) leaves everything as it is, without a wait for the device.
    """

    def __init__(
        self,
        matrices: Sequence[nn.Parameter],
        rest: Sequence[dict[str, Any]],
        *,
        momentum: float,
        weight_decay: float,
        dtype: torch.dtype,
        adamw: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
    ) -> None:
        groups: list[dict[str, Any]] = [
            {"params": list(matrices), "weight_decay": weight_decay, "momentum": momentum, "hidden": True}
        ]
        rest = [group for group in rest if group["params"]]
        self._adamw = adamw(list(rest)) if rest else None
        if self._adamw is not None:  # with all that its step looks for
            groups += [group | {"hidden": False} for group in self._adamw.param_groups]
        super().__init__(groups, {"lr": 0.0})
        self._names = {id(p): (MOMENTUM,) for p in matrices}
        self._dtype = dtype
        self._layout: dict[int, list[Matrix]] | None = None
        self._device = torch.device("cpu")
        self._step_supports_amp_scaling = True
        self.found_inf: Tensor | None = None

    def moments(self, parameter: nn.Parameter) -> tuple[str, ...]:
        """Names of the parameter's state."""
        return self._names.get(id(parameter), ("exp_avg", "exp_avg_sq"))

    def bind(self, zero: Any, stage: int, device: torch.device) -> None:
        """Learn where ZeRO put each matrix, and where to exchange pieces. A collective."""
        self._device, self._layout = device, {}
        if stage == 0:
            return
        ours, found = [], []
        for i, group in enumerate(grouped_parameters(zero, stage)):
            for parameter in (p for p in group if id(p) in self._names):
                ours.append(parameter)
                found.append(
                    _zero3_place(zero, parameter)
                    if stage == 3
                    else _flat_place(self.param_groups[i]["params"][0], parameter)
                )
        mine = torch.tensor([[start, numel] for _, _, start, numel in found], device=device).reshape(-1, 2)
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mine)
        spans = [[Span(*span) for span in rank.tolist()] for rank in everyone]
        for i, (parameter, (holder, offset, _, _)) in enumerate(zip(ours, found, strict=True)):
            matrix = Matrix(_shape(parameter), offset, tuple(rank[i] for rank in spans))
            self._layout.setdefault(id(holder), []).append(matrix)

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
        """One step of a matrix, or of this rank's part of many, flat."""
        state = self.state[holder]
        if MOMENTUM not in state:
            state[MOMENTUM] = torch.zeros_like(holder)
        if self._layout is None or holder.grad is None:  # DeepSpeed's own step with zero gradients, to allocate
            return
        gradient, good = holder.grad.to(holder.dtype), torch.ones((), dtype=holder.dtype, device=holder.device)
        if self.found_inf is not None:
            good = (self.found_inf == 0).to(good)
            gradient = gradient.where(good > 0, 0.0)
        momentum, beta = state[MOMENTUM], group["momentum"]
        momentum.add_((gradient - momentum) * ((1 - beta) * good))
        update = gradient.lerp(momentum, beta)
        if holder.ndim > 1:
            update = self._orthogonal(update, tuple(holder.shape))
        else:
            update = self._orthogonal_pieces(update, self._layout.get(id(holder), []))
        holder.mul_(1 - group["lr"] * group["weight_decay"] * good)
        holder.sub_(update * (group["lr"] * good))

    def _orthogonal(self, update: Tensor, shape: tuple[int, ...]) -> Tensor:
        scale = _ADAMW_RMS * max(shape[-2:]) ** 0.5
        return newton_schulz(update.view(shape), self._dtype).to(update.dtype).mul_(scale)

    # --- pieces of matrices ---------------------------------------------------------------------------------

    def _orthogonal_pieces(self, flat: Tensor, matrices: Sequence[Matrix]) -> Tensor:
        """The update of each matrix that this rank holds a piece of, where the piece lies in `flat`; zero elsewhere."""
        rank, ranks = dist.get_rank(), dist.get_world_size()
        out = torch.zeros_like(flat)
        whole = [m for m in matrices if sum(span.numel > 0 for span in m.spans) == 1]
        for matrix in whole:
            if numel := matrix.spans[rank].numel:
                piece = flat.narrow(0, matrix.offset, numel).to(self._device)
                out.narrow(0, matrix.offset, numel).copy_(self._orthogonal(piece, matrix.shape).reshape(-1))
        split = [m for m in matrices if sum(span.numel > 0 for span in m.spans) > 1]
        for first in range(0, len(split), ranks):
            self._round(flat, out, split[first : first + ranks], rank, ranks)
        return out

    def _round(self, flat: Tensor, out: Tensor, matrices: Sequence[Matrix], rank: int, ranks: int) -> None:
        """At most one split matrix a rank: to the rank that does it, and back."""
        mine = [m.spans[rank].numel for m in matrices] + [0] * (ranks - len(matrices))
        pieces = [flat.narrow(0, m.offset, numel) for m, numel in zip(matrices, mine, strict=False)]
        theirs = [span.numel for span in matrices[rank].spans] if rank < len(matrices) else [0] * ranks
        whole = flat.new_empty(sum(theirs), device=self._device)  # the ranks' pieces follow one another
        dist.all_to_all_single(whole, torch.cat(pieces).to(self._device), theirs, mine)
        if rank < len(matrices):
            whole = self._orthogonal(whole, matrices[rank].shape).reshape(-1)
        back = flat.new_empty(sum(mine), device=self._device)
        dist.all_to_all_single(back, whole, mine, theirs)
        for matrix, numel, start in zip(matrices, mine, accumulate([0, *mine]), strict=False):
            out.narrow(0, matrix.offset, numel).copy_(back.narrow(0, start, numel))


# --- where ZeRO put a parameter: (holder, offset in it, start in the parameter, how many numbers) -------------------


def grouped_parameters(zero: Any, stage: int) -> list[list[nn.Parameter]]:
    """The model's parameters as ZeRO (1 to 3) lays them into flat tensors: those of its groups, or parts of groups."""
    if stage == 3:
        return zero.fp16_groups
    return zero.bit16_groups if hasattr(zero, "bit16_groups") else zero.bf16_groups  # of its wrapper for bf16, stage 1


def _flat_place(holder: Tensor, parameter: Any) -> tuple[Tensor, int, int, int]:
    """At stages 1 and 2: a rank holds a stretch of all parameters of a group, one after another."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return holder, 0, 0, 0
    there, here = mapping.hp_fragment_address, mapping.lp_fragment_address
    return holder, there.start, here.start, here.numel


def _zero3_place(zero: Any, parameter: Any) -> tuple[Tensor, int, int, int]:
    """At stage 3: a rank holds an equal part of every parameter, the last one's padded."""
    group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
    start = min(size * dist.get_rank(), parameter.ds_numel)
    return zero.fp32_partitioned_groups_flat[group], offset, start, min(size, parameter.ds_numel - start)


def _ndim(parameter: nn.Parameter) -> int:
    return len(_shape(parameter))


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Of the parameter before ZeRO 3 cut it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
