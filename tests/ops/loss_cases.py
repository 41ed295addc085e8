"""Helpers of the linear_cross_entropy tests: inputs, an eager baseline, the accuracy criterion and the backends.

T packed tokens, H hidden size, V vocabulary.
"""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from delib_fast.ops import LossOutput
from delib_fast.ops.linear_cross_entropy import BACKENDS

NAMES = [pytest.param(b.name, marks=pytest.mark.gpu) if b.name == "cuda" else b.name for b in BACKENDS]
FUSED = [name for name in NAMES if name != "reference"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Case(NamedTuple):
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    loss_weights: Tensor

    def to(self, dtype: torch.dtype) -> "Case":
        hidden, weight = (t.detach().to(dtype).requires_grad_(t.requires_grad) for t in self[:2])
        return Case(hidden, weight, self.targets, self.loss_weights)


def make_case(T=37, H=24, V=103, dtype=torch.float32, unsupervised=0.3, device=DEVICE) -> Case:
    """Random inputs in which about this share of the rows is unsupervised, half of it by target and half by weight."""
    hidden = torch.randn(T, H, device=device).to(dtype).requires_grad_()
    weight = torch.randn(V, H, device=device).to(dtype).requires_grad_()
    targets = torch.randint(V, (T,), device=device)
    targets[torch.rand(T, device=device) < unsupervised / 2] = -100
    loss_weights = 0.1 + torch.rand(T, device=device)
    loss_weights[torch.rand(T, device=device) < unsupervised / 2] = 0
    return Case(hidden, weight, targets, loss_weights)


def supervised(case: Case) -> Tensor:
    """The positions of the supervised rows."""
    return ((case.targets != -100) & (case.loss_weights != 0)).nonzero().squeeze(1)


def gradients(output: LossOutput, *leaves: Tensor, scale: float = 1.0, **keywords) -> tuple[Tensor, ...]:
    return torch.autograd.grad(output.loss_sum * scale, leaves, **keywords)


def eager(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """nll and both gradients, as in an ordinary trainer: logits in the dtype of the inputs, then a float32 loss."""
    rows = supervised(case)
    wide = torch.promote_types(case.hidden.dtype, torch.float32)
    logits = F.linear(case.hidden[rows], case.weight).to(wide)
    nll = F.cross_entropy(logits, case.targets[rows], reduction="none")
    grads = torch.autograd.grad((nll * case.loss_weights[rows]).sum(), (case.hidden, case.weight))
    return torch.zeros_like(case.loss_weights, dtype=wide).index_copy(0, rows, nll.detach()), *grads


def skip_if_unavailable(backend: str) -> None:
    candidate = next(b for b in BACKENDS if b.name == backend)
    tensor = torch.empty(1, 1, device=DEVICE)
    if reason := candidate.why_not(tensor, tensor):
        pytest.skip(f"{backend}: {reason}")


def sample_if_interpreted(backend: str, full: bool, sampled: bool) -> None:
    """Skip a case of the interpreted Triton backend, which takes a second, unless it is sampled or --full is given."""
    if backend == "triton" and DEVICE == "cpu" and not (full or sampled):
        pytest.skip("a long form with the interpreter; run with --full")


def assert_no_worse(ours: Tensor, theirs: Tensor, exact: Tensor, name: str, factor: float = 2.0) -> None:
    """max|ours - float64| <= factor · max|torch in the same dtype - float64| + a few ulps of the largest value."""
    assert ours.isfinite().all(), name
    error, baseline = ((t.double() - exact).abs().max().item() for t in (ours, theirs))
    ulps = 64 if ours.dtype == torch.float64 else 4  # the float64 result depends on the summation order, too
    floor = ulps * torch.finfo(ours.dtype).eps * exact.abs().max().item()
    assert error <= factor * baseline + floor, f"{name}: error {error:.3g}, torch's {baseline:.3g}"
