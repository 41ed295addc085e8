"""The definition of linear_cross_entropy in plain torch, for any float dtype and device, with gradients by autograd.

T packed tokens, H hidden size, V vocabulary, L listed rows.
"""

import torch
from torch import Tensor


def linear_cross_entropy_reference(
    hidden: Tensor,  # (T, H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (T,) int64
    loss_weights: Tensor | None = None,  # (T,)
    *,
    ignore_index: int = -100,
    loss_positions: Tensor | None = None,  # (L,) int64
    softcap: float = 0.0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss_sum = Σ weight · loss over the supervised rows, and nll and correct of every row.

    Logits and losses are float32, or float64 for float64 inputs.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    supervised = targets != ignore_index
    if loss_weights is not None:
        supervised = supervised & (loss_weights != 0)
    if loss_positions is not None:
        supervised = supervised & torch.zeros_like(supervised).index_fill(0, loss_positions, True)
    # Unsupervised rows are replaced, not multiplied by zero: before the product because hidden may contain NaN, after
    # it because weight may contain inf.
    rows = torch.where(supervised[:, None], hidden, 0).to(wide)
    logits = torch.where(supervised[:, None], rows @ weight.to(wide).T, 0)  # (T, V)
    if softcap:
        logits = softcap * (logits / softcap).tanh()
    target = torch.where(supervised, targets, 0)
    log_p = logits.log_softmax(1)
    row_nll = torch.where(supervised, -log_p.gather(1, target[:, None]).squeeze(1), 0)
    row_loss = row_nll
    if label_smoothing:
        row_loss = (1 - label_smoothing) * row_loss - label_smoothing * torch.where(supervised, log_p.mean(1), 0)
    if z_loss:
        row_loss = row_loss + z_loss * torch.where(supervised, logits.logsumexp(1), 0) ** 2
    weighted = row_loss if loss_weights is None else row_loss * torch.where(supervised, loss_weights, 0).to(wide)
    return weighted.sum(), row_nll.detach(), supervised & (logits.argmax(1) == target)
