"""Causal attention within each sequence of a pack."""

from collections.abc import Sequence

from torch import Tensor

from delib_fast.ops._dispatch import Backend, choose
from delib_fast.ops.varlen_attention import _cpu, _flash, _torch, reference
from delib_fast.ops.varlen_attention._checks import check_cu_seqlens, check_options, check_prefix, check_tensors

__all__ = ["BACKENDS", "varlen_attention"]

# In order of speed.
BACKENDS = (
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
    softcap: float | None = None,
    sinks: Tensor | None = None,
    cu_seqlens_host: Sequence[int] | None = None,
    prefix: Sequence[int] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attend from every token to itself and the earlier tokens of its own sequence.

        for start, end in pairwise(cu_seqlens):                    # with prefix: keys of the prefixes come first
            scores = scale · q[start:end] @ k[start:end]ᵀ          # each kv head serves Hq / Hkv query heads
            scores = softcap · tanh(scores / softcap)              # with softcap
            scores[i, j] = -inf  where  j > i  or  j ≤ i - window
            out[start:end] = softmax(scores) @ v[start:end]        # with sinks: e^sink is added to softmax's divisor

    Args:
        q: (T, Hq, D), floating point.
        k: (T, Hkv, D), dtype and device of q. Hq is a multiple of Hkv.
        v: (T, Hkv, Dv), dtype and device of q. Dv may differ from D (multi-head latent attention).
        cu_seqlens: (N+1,) int32 on the same device: the sequence boundaries, from 0 to T in non-decreasing order. A
            sequence may be empty. Padding at the end must be a sequence of its own.
        max_seqlen: length of the longest sequence in tokens, an int on the host.
        scale: factor of the scores; D^-0.5 by default.
        window: number of tokens that a token attends to, including itself (sliding_window in transformers); None for
            all.
        softcap: bound of the scores, above 0; None for no bound.
        sinks: (Hq,), floating point on the same device: the logit of one more key per head, whose value is zero. It
            takes part in every softmax once, also with a prefix.
        cu_seqlens_host: the values of cu_seqlens on the host, if known. They are then checked without a device sync.
        prefix: N ints on the host. prefix[i] is the index of an earlier sequence that sequence i continues, or -1. The
            tokens of sequence i then also attend to all of that sequence, and to the sequences that it continues in
            turn. So several completions can share one prompt, which is computed once; its gradients are the sums over
            all completions. A window includes the prefix.
        backend: "auto", "flash" (an installed flash-attention package), "torch" (varlen_attn), "cpu" or "reference".

    Returns:
        (T, Hq, Dv), dtype of q. Differentiable in q, k, v and sinks.

    Raises:
        ValueError: shapes, dtypes, devices or sequences do not match, or the backend does not exist.
        BackendUnavailable: the requested backend cannot run these inputs.

    Numerics: scores, softmax and sums are float32 (float64 for float64 inputs). On a CPU 16-bit inputs are computed in
        float32 throughout. A shared prefix is exact: two attentions are merged by their log-sum-exp, in the forward and
        the backward pass. Sinks are merged in the same way. Their gradient is a float32 sum over all tokens; tokens
        whose upstream gradient is zero are left out.
    Determinism: the cpu and reference backends are deterministic; torch and flash accumulate dq in varying order.
    Cost: Hq·(D + Dv)·Σ L² FLOPs forward for sequences of length L, 2.5 times that backward; O(T) memory. Where a
        backend's kernels need Dv = D, the smaller is padded with zeros and costs as much as the larger. The reference
        needs O(max_seqlen²) memory.
    Source: FlashAttention-2, arXiv 2307.08691; sinks: arXiv 2309.17453; softcap: Gemma 2, arXiv 2408.00118.
    """
    check_tensors(q, k, v, cu_seqlens, max_seqlen)
    check_options(q, window, softcap, sinks)
    if cu_seqlens_host is not None:
        check_cu_seqlens(cu_seqlens_host, q.shape[0], max_seqlen)
    if prefix is not None:
        check_prefix(prefix, cu_seqlens.shape[0] - 1)
        if all(parent < 0 for parent in prefix):
            prefix = None
    chosen = choose(
        "varlen_attention",
        BACKENDS,
        backend,
        q,
        k,
        v,
        window,
        prefix is not None,
        softcap is not None,
        sinks is not None,
    )
    out: Tensor = chosen.run(
        q,
        k,
        v,
        cu_seqlens,
        max_seqlen,
        scale=scale,
        window=window,
        softcap=softcap,
        sinks=sinks,
        cu_seqlens_host=cu_seqlens_host,
        prefix=prefix,
    )
    return out
