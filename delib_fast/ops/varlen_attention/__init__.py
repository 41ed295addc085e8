"""Causal attention inside each run of a pack."""

from collections.abc import Sequence

from torch import Tensor

from delib_fast.ops._dispatch import Backend, choose
from delib_fast.ops.varlen_attention import _cpu, _flash, _torch, reference
from delib_fast.ops.varlen_attention._checks import check_prefix, check_runs, check_tensors

# In order of speed, where they can run at all.
_BACKENDS = (
    Backend("flash", _flash.varlen_attention, _flash.why_not),
    Backend("torch", _torch.varlen_attention, _torch.why_not),
    Backend("cpu", _cpu.varlen_attention, _cpu.why_not),
    Backend("reference", reference.varlen_attention, lambda *_: None),
)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    window: int | None = None,
    cu_seqlens_host: Sequence[int] | None = None,
    prefix: Sequence[int] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of every token to itself and the tokens before it in its own run, and to no other run.

        for start, end in pairwise(cu_seqlens):                    # with prefix: keys of the prefixes first
            scores = scale · q[start:end] @ k[start:end]ᵀ          # each kv head serves Hq / Hkv query heads
            scores[i, j] = -inf  where  j > i  or  j ≤ i - window
            out[start:end] = softmax(scores) @ v[start:end]

    Args:
        q: (T, Hq, D), floating.
        k, v: (T, Hkv, D), the dtype and device of q. Hq is a multiple of Hkv.
        cu_seqlens: (N+1,) int32 on the same device, from 0 to T, never falling; a run may be empty. A padding
            tail must be a run of its own.
        max_seqlen: tokens in the longest run, a host int.
        scale: factor of the scores; D^-0.5 by default.
        window: tokens that one token sees, itself included (what transformers calls sliding_window); None for
            all.
        cu_seqlens_host: the values of cu_seqlens on the host, if known: they are checked then, without a
            sync.
        prefix: N host ints: the run that each run continues, which stands before it, or -1. Its tokens then also see
            all of that run, and of the runs which that one continues: several completions of one prompt, the prompt
            computed once. Gradients of the prompt come from all of them. A window counts through the prefix.
        backend: "auto", or "flash" (an installed flash-attention package), "torch" (varlen_attn), "cpu" or
            "reference".
    Returns:
        (T, Hq, D), dtype of q. Differentiable in q, k and v.
    Raises:
        ValueError: shapes, dtypes, devices or runs that don't fit, or an unknown backend.
        BackendUnavailable: the backend asked for can't run these tensors, and why.

    Numerics: scores, softmax and sums in float32 (float64 for float64); on the CPU all of half precision in
        float32.
        A shared prefix is exact too: two attentions, merged by their log-sum-exp, forward and backward.
    Deterministic on the CPU; "torch" and "flash" add up dq in an order that varies. Cost: 2·Hq·D·Σ L² FLOPs
    forward, 2.5 times that backward, O(T) memory; "reference" takes O(max_seqlen²).
    Source: FlashAttention-2, arXiv 2307.08691.
    """
    check_tensors(q, k, v, cu_seqlens, max_seqlen, window)
    if cu_seqlens_host is not None:
        check_runs(cu_seqlens_host, q.shape[0], max_seqlen)
    if prefix is not None:
        check_prefix(prefix, cu_seqlens.shape[0] - 1)
        if all(parent < 0 for parent in prefix):
            prefix = None
    chosen = choose("varlen_attention", _BACKENDS, backend, q, k, v, window, prefix is not None)
    return chosen.run(
        q, k, v, cu_seqlens, max_seqlen, scale=scale, window=window, cu_seqlens_host=cu_seqlens_host, prefix=prefix
    )
