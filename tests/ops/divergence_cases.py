"""Helpers of the linear_kl_divergence tests: inputs, an eager baseline and the backends.

T packed tokens, H and Ht hidden sizes of student and teacher, V vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from loss_cases import DEVICE
from torch import Tensor

from delib_fast.ops import DivergenceOutput, linear_kl_divergence
from delib_fast.ops.linear_kl_divergence import BACKENDS

NAMES = [backend.name for backend in BACKENDS]
FUSED = [name for name in NAMES if name != "reference"]
DIRECTIONS = ["forward", "reverse", "jsd"]
OPTIONS = [
    pytest.param({"direction": "forward"}, id="forward"),
    pytest.param({"direction": "reverse"}, id="reverse"),
    pytest.param({"direction": "jsd", "beta": 0.3}, id="jsd"),
    pytest.param({"direction": "forward", "temperature": 2.0, "nll_weight": 0.2}, id="forward-tempered-nll"),
    pytest.param({"direction": "reverse", "temperature": 0.7, "nll_weight": 0.2, "softcap": 5.0}, id="reverse-all"),
    pytest.param(
        {"direction": "jsd", "beta": 0.9, "softcap": 4.0, "teacher_softcap": None, "nll_weight": 1.5}, id="jsd-all"
    ),
    pytest.param({"direction": "reverse", "nll_weight": 0.5}, id="reverse-nll"),
]


class Case(NamedTuple):
    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    loss_weights: Tensor
    targets: Tensor

    @property
    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.hidden, self.weight

    def to(self, dtype: torch.dtype) -> "Case":
        moved = [t.detach().to(dtype).requires_grad_(t.requires_grad) for t in self[:4]]
        return Case(*moved, *self[4:])


def make_case(T=24, H=24, V=103, dtype=torch.float32, Ht=19, dead=0.3, device=DEVICE) -> Case:
    """Random inputs in which about this share of the rows is dead, and a fifth of the rows has no target."""
    normal = [torch.randn(*size, device=device).to(dtype) for size in ((T, H), (V, H), (T, Ht), (V, Ht))]
    targets = torch.randint(V, (T,), device=device)
    targets[torch.rand(T, device=device) < 0.2] = -100
    loss_weights = 0.1 + torch.rand(T, device=device)
    loss_weights[torch.rand(T, device=device) < dead] = 0
    return Case(normal[0].requires_grad_(), normal[1].requires_grad_(), *normal[2:], loss_weights, targets)


def live(case: Case) -> Tensor:
    """The positions of the live rows."""
    return case.loss_weights.nonzero().squeeze(1)


def dead(case: Case) -> Tensor:
    return (case.loss_weights == 0).nonzero().squeeze(1)


def divergence(case: Case, backend: str = "auto", **options: Any) -> DivergenceOutput:
    return linear_kl_divergence(*case[:5], targets=case.targets, backend=backend, **options)


def gradients(output: DivergenceOutput, *leaves: Tensor, scale: float = 1.0, **keywords: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(output.loss_sum * scale, leaves, **keywords)


def eager(
    case: Case,
    direction="forward",
    beta=0.5,
    temperature=1.0,
    softcap: float | None = None,
    teacher_softcap: float | str | None = "same",
    nll_weight: float | Tensor = 0.0,
) -> tuple[Tensor, ...]:
    """loss, divergence, nll, teacher_nll and both gradients, as in an ordinary trainer: logits in the dtype of the
    inputs, then torch's functions in float32. The three losses are those of the live rows."""
    rows = live(case)
    wide = torch.promote_types(case.hidden.dtype, torch.float32)
    x = _capped(F.linear(case.hidden[rows], case.weight).to(wide), softcap)
    y = F.linear(case.teacher_hidden[rows], case.teacher_weight).to(wide)
    y = _capped(y, softcap if teacher_softcap == "same" else teacher_softcap)
    log_p, log_q = (x / temperature).log_softmax(1), (y / temperature).log_softmax(1)
    if direction == "jsd":
        log_m = torch.stack([log_p + math.log(1 - beta), log_q + math.log(beta)]).logsumexp(0)
        divergences = beta * _kl(log_q, log_m) + (1 - beta) * _kl(log_p, log_m)
    else:
        divergences = _kl(log_q, log_p) if direction == "forward" else _kl(log_p, log_q)
    targets, weights = case.targets[rows], case.loss_weights[rows].to(wide)
    nlls = [F.cross_entropy(z, targets, reduction="none") for z in (x, y)]
    nll_weights = nll_weight[rows].to(wide) if isinstance(nll_weight, Tensor) else nll_weight * weights
    loss = (weights * divergences + nll_weights * nlls[0]).sum()
    return loss.detach(), divergences.detach(), *(n.detach() for n in nlls), *torch.autograd.grad(loss, case.leaves)


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b)."""
    return F.kl_div(log_b, log_a, reduction="none", log_target=True).sum(1)


RESULTS = ("loss", "divergence", "nll", "teacher_nll", "grad_hidden", "grad_weight")


def results(case: Case, backend: str, **options: Any) -> tuple[Tensor, ...]:
    """What `eager` returns, from a backend."""
    output = divergence(case, backend, **options)
    rows = live(case)
    return output.loss_sum.detach(), *(losses[rows] for losses in output[1:]), *gradients(output, *case.leaves)


def skip_if_unavailable(backend: str, dtype: torch.dtype = torch.float32) -> None:
    tensor = torch.empty(1, 1, device=DEVICE, dtype=dtype)
    if reason := next(b for b in BACKENDS if b.name == backend).why_not(tensor, tensor):
        pytest.skip(f"{backend}: {reason}")


def backend_fixture(names: list[str]) -> Callable[..., str]:
    """A fixture with one parameter per backend; one that cannot run on this machine is skipped with the reason."""

    @pytest.fixture(params=names)
    def name(request: pytest.FixtureRequest) -> str:
        skip_if_unavailable(request.param)
        return request.param

    return name
