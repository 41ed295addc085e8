"""Helpers of the varlen_attention tests: inputs and the accuracy criterion."""

from itertools import accumulate

import torch
from torch import Tensor


def offsets(lengths: list[int]) -> Tensor:
    """cu_seqlens for sequences of these lengths."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def inputs(lengths: list[int], heads=(4, 2), dim=16, dtype=torch.float32, seed=0, value_dim=None) -> list[Tensor]:
    """q, k, v and an upstream gradient."""
    generator = torch.Generator().manual_seed(seed)
    value_dim = value_dim or dim
    return [
        torch.randn(sum(lengths), h, d, generator=generator, dtype=torch.float64).to(dtype)
        for h, d in ((heads[0], dim), (heads[1], dim), (heads[1], value_dim), (heads[0], value_dim))
    ]


def sinks_of(heads: int, dtype=torch.float32) -> Tensor:
    """Sinks (heads,) between -1 and 2: from a small share of the softmax to a large one."""
    return torch.linspace(-1, 2, heads, dtype=torch.float64).to(dtype)


def assert_as_accurate_as_torch(ours, exact, torchs, dtype, factor=3.0) -> None:
    """max|ours - float64| <= factor · max|torch in the same dtype - float64| + a few roundings in the compute dtype.

    The last term is relative to the magnitude of the inputs (1) if the true gradient is almost zero.
    """
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    for name, a, b, c in zip(("out", "dq", "dk", "dv", "dsinks")[: len(ours)], ours, exact, torchs, strict=True):
        allowed = factor * (c.double() - b).abs().max() + 32 * eps * max(1.0, b.abs().max())
        error = (a.double() - b).abs().max()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"
