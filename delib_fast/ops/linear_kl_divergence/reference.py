"""The definition of linear_kl_divergence in plain torch, for any float dtype and device, with gradients by autograd.

T packed tokens, H and Ht hidden sizes of student and teacher, V vocabulary, L listed rows.
"""

import math

import torch
from torch import Tensor


def linear_kl_divergence_reference(
    hidden: Tensor,  # (T, H)
    weight: Tensor,  # (V, H)
    teacher_hidden: Tensor,  # (T, Ht)
    teacher_weight: Tensor,  # (V, Ht)
    loss_weights: Tensor,  # (T,)
    nll_weights: Tensor,  # (T,)
    *,
    targets: Tensor | None = None,  # (T,) int64
    ignore_index: int = -100,
    loss_positions: Tensor | None = None,  # (L,) int64
    direction: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    softcap: float = 0.0,
    teacher_softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return loss_sum = Σ loss_weights · divergence + nll_weights · nll, and each row's divergence, nll, teacher_nll.

    Logits and losses are float32, or float64 for float64 inputs.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    has_target = torch.zeros_like(loss_weights, dtype=torch.bool) if targets is None else targets != ignore_index
    live = (loss_weights != 0) | ((nll_weights != 0) & has_target)
    if loss_positions is not None:
        live = live & torch.zeros_like(live).index_fill(0, loss_positions, True)
    x = _logits(hidden, weight, live, wide, softcap)
    with torch.no_grad():
        y = _logits(teacher_hidden, teacher_weight, live, wide, teacher_softcap)
    log_p, log_q = (x / temperature).log_softmax(1), (y / temperature).log_softmax(1)
    if direction == "jsd":
        log_m = torch.logaddexp(log_p + math.log1p(-beta), log_q + math.log(beta))
        row_divergence = beta * _kl(log_q, log_m) + (1 - beta) * _kl(log_p, log_m)
    else:
        row_divergence = _kl(log_q, log_p) if direction == "forward" else _kl(log_p, log_q)
    known = live & has_target
    target = torch.zeros_like(live, dtype=torch.int64) if targets is None else torch.where(known, targets, 0)
    nlls = [torch.where(known, -z.log_softmax(1).gather(1, target[:, None]).squeeze(1), 0) for z in (x, y)]
    loss = torch.where(live & (loss_weights != 0), loss_weights.to(wide) * row_divergence, 0)
    loss = loss + torch.where(known & (nll_weights != 0), nll_weights.to(wide) * nlls[0], 0)
    return loss.sum(), torch.where(live, row_divergence.detach().clamp_min(0), 0), nlls[0].detach(), nlls[1]


def _logits(hidden: Tensor, weight: Tensor, live: Tensor, wide: torch.dtype, softcap: float) -> Tensor:
    # Dead rows are replaced, not multiplied by zero: hidden may contain NaN, and weight may contain inf.
    rows = torch.where(live[:, None], hidden, 0).to(wide)
    logits = torch.where(live[:, None], rows @ weight.to(wide).T, 0)
    return softcap * (logits / softcap).tanh() if softcap else logits


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Return Σ a · (log a - log b), in which an a of 0 adds nothing."""
    zero = log_a == -torch.inf
    difference = torch.where(zero, 0, log_a) - torch.where(zero, 0, log_b)
    return torch.where(zero, 0, log_a.exp() * difference).sum(1)
