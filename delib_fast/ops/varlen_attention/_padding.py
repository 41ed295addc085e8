"""Value heads of another size than query and key heads, for kernels that need one size."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad


def same_head_dims(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pad the last dim of q and k (…, D) or of v (…, Dv) with zeros to the larger of the two.

    Zeros in q and k add nothing to a score, and zeros in v only add columns to the output, which the caller drops. The
    caller must pass the scale of the attention, since its default depends on D.
    """
    missing = q.shape[-1] - v.shape[-1]
    if missing > 0:
        return q, k, pad(v, (0, missing))
    if missing < 0:
        return pad(q, (0, -missing)), pad(k, (0, -missing)), v
    return q, k, v
