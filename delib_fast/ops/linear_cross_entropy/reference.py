"""What linear_cross_entropy means, in plain torch: any float dtype, any device, gradients by autograd.

T packed tokens, H hidden size, V vocabulary, L listed tokens.
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
    """loss_sum = Σ w·loss over the supervised rows, nll and correct of every row; logits in float32 or float64."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    live = targets != ignore_index
    if loss_weights is not None:
        live = live & (loss_weights != 0)
    if loss_positions is not None:
        live = live & torch.zeros_like(live).index_fill(0, loss_positions, True)
    # dead rows are replaced, not multiplied by zero: before the product for NaN in hidden, after it for inf in weight
    rows = torch.where(live[:, None], hidden, 0).to(wide)
    logits = torch.where(live[:, None], rows @ weight.to(wide).T, 0)  # (T, V)
    if softcap:
        logits = softcap * (logits / softcap).tanh()
    target = torch.where(live, targets, 0)
    log_p = logits.log_softmax(1)
    row_nll = torch.where(live, -log_p.gather(1, target[:, None]).squeeze(1), 0)
    row_loss = row_nll
    if label_smoothing:
        row_loss = (1 - label_smoothing) * row_loss - label_smoothing * torch.where(live, log_p.mean(1), 0)
    if z_loss:
        row_loss = row_loss + z_loss * torch.where(live, logits.logsumexp(1), 0) ** 2
    weighted = row_loss if loss_weights is None else row_loss * torch.where(live, loss_weights, 0).to(wide)
    return weighted.sum(), row_nll.detach(), live & (logits.argmax(1) == target)
