"""Helpers of the varlen_attention tests: inputs, the op and plain torch with gradients, the accuracy criterion."""

import hashlib
from itertools import accumulate

import torch
from torch import Tensor

from delib_fast.ops import varlen_attention


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


def leaves_of(q, k, v, sinks=None) -> list[Tensor]:
    """Copies of q, k, v, and of sinks if they are given, that require gradients."""
    return [x.detach().clone().requires_grad_() for x in (q, k, v, sinks) if x is not None]


def run(backend, lengths, q, k, v, g, sinks=None, **kwargs) -> list[Tensor]:
    """Output and the three gradients, or four with sinks."""
    leaves = leaves_of(q, k, v, sinks)
    out = varlen_attention(
        *leaves[:3],
        offsets(lengths),
        max(lengths, default=0),
        backend=backend,
        sinks=None if sinks is None else leaves[3],
        **kwargs,
    )
    return [out.detach(), *torch.autograd.grad(out, leaves, g)]


def run_eager(lengths, q, k, v, g, sinks=None, scale=None, window=None, softcap=None) -> list[Tensor]:
    """Plain torch in the dtype of the inputs, as in most models: the baseline for the accuracy of a backend."""
    leaves = leaves_of(q, k, v, sinks)
    outs = []
    for qr, kr, vr in zip(*(x.split(lengths) for x in leaves[:3]), strict=True):
        kr, vr = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (kr, vr))
        distance = torch.arange(len(qr))[:, None] - torch.arange(len(qr))
        hidden = (distance < 0) | (distance >= (window or len(qr)))
        scores = torch.einsum("qhd,khd->hqk", qr, kr) * (scale or q.shape[-1] ** -0.5)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores.masked_fill(hidden, float("-inf"))
        if sinks is not None:
            scores = torch.cat([scores, leaves[3].view(-1, 1, 1).expand(-1, len(qr), 1)], -1)
        weights = scores.softmax(-1)[..., : len(qr)]
        outs.append(torch.einsum("hqk,khd->qhd", weights, vr))
    out = torch.cat(outs)
    return [out.detach(), *torch.autograd.grad(out, leaves, g)]


def assert_as_accurate_as_torch(ours, exact, torchs, dtype, factor=3.0) -> None:
    """max|ours - float64| <= factor · max|torch in the same dtype - float64| + a few roundings in the compute dtype.

    The last term is relative to the magnitude of the inputs (1) if the true gradient is almost zero.
    """
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    for name, a, b, c in zip(("out", "dq", "dk", "dv", "dsinks")[: len(ours)], ours, exact, torchs, strict=True):
        allowed = factor * (c.double() - b).abs().max() + 32 * eps * max(1.0, b.abs().max())
        error = (a.double() - b).abs().max()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def bfloat16_digest() -> str:
    """Check bfloat16 attention of the cpu backend on a few packs, and return a digest of the results.

    The heads are those of SmolLM2-135M (9 query heads, 3 kv heads of 64), and others with a window, a cap and sinks.
    """
    digest = hashlib.sha256()
    for lengths, heads, dims, options in (
        ([130, 1, 64, 97], (9, 3), (64, 64), {}),
        ([200, 65, 32], (2, 1), (48, 80), {"window": 70, "softcap": 1.5}),
        ([129, 40], (4, 2), (16, 16), {"window": 3}),
    ):
        data = inputs(lengths, heads, dims[0], torch.bfloat16, value_dim=dims[1])
        if "softcap" in options:
            data.append(sinks_of(heads[0], torch.bfloat16))
        exact = run("reference", lengths, *(x.double() for x in data), **options)
        ours = run("cpu", lengths, *data, **options)
        assert_as_accurate_as_torch(ours, exact, run_eager(lengths, *data, **options), torch.bfloat16)
        for result in ours:
            digest.update(result.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
