"""What the fused heads do with hidden states and weights before a backend sees them: autocast, bias, scale."""

import torch
import torch.nn.functional as F
from torch import Tensor

BIAS_COLUMNS = 8  # the bias and seven columns of zeros, so that rows of 16-bit numbers stay aligned for the GEMMs


def autocast(tensor: Tensor) -> Tensor:
    """Return the tensor in the dtype of autocast, if it is enabled; float64 is never converted."""
    device = tensor.device.type
    if not torch.is_autocast_enabled(device) or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def with_bias(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Append a column of ones to `hidden` and the bias to `weight`, so that one product adds the bias."""
    ones = F.pad(hidden.new_ones(hidden.shape[0], 1), (0, BIAS_COLUMNS - 1))
    column = F.pad(bias[:, None], (0, BIAS_COLUMNS - 1))
    return torch.cat([hidden, ones], 1), torch.cat([weight, column], 1)
