"""The arguments that varlen_attention refuses, and which backend computes what."""

from __future__ import annotations

import pytest
import torch
from attention_cases import inputs, offsets, run

from delib_fast.ops import BackendUnavailable, _dispatch, varlen_attention
from delib_fast.ops.varlen_attention import BACKENDS, _cpu, _flash, _torch


def call(**changes):
    q, k, v, _ = inputs([3, 4])
    arguments = {"q": q, "k": k, "v": v, "cu_seqlens": offsets([3, 4]), "max_seqlen": 4} | changes
    return varlen_attention(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(7, 64)}, "q, k and v must be (T, heads, D); they are (7, 64), (7, 2, 16) and (7, 2, 16)"),
        (
            {"q": torch.zeros(6, 4, 16)},
            "q (T, Hq, D), k (T, Hkv, D) and v (T, Hkv, Dv) must agree in T, Hkv and D; "
            "they are (6, 4, 16), (7, 2, 16) and (7, 2, 16)",
        ),
        (
            {"v": torch.zeros(7, 4, 16)},
            "q (T, Hq, D), k (T, Hkv, D) and v (T, Hkv, Dv) must agree in T, Hkv and D; "
            "they are (7, 4, 16), (7, 2, 16) and (7, 4, 16)",
        ),
        ({"q": torch.zeros(7, 3, 16)}, "the number of query heads (3) must be a multiple of the kv heads (2)"),
        (
            {"q": torch.zeros(7, 4, 16, dtype=torch.float64)},
            "q, k and v must have the same floating-point dtype; "
            "they are torch.float64, torch.float32 and torch.float32",
        ),
        ({"cu_seqlens": torch.tensor([0, 3, 7])}, "cu_seqlens must be (N+1,) int32; it is (3,) torch.int64"),
        (
            {"cu_seqlens": torch.tensor([0, 3, 6], dtype=torch.int32)},
            "cu_seqlens must start at 0 and end at T = 7, with padding as a sequence of its own; "
            "it starts at 0 and ends at 6",
        ),
        (
            {"cu_seqlens": torch.tensor([0, 5, 3, 7], dtype=torch.int32), "max_seqlen": 7},
            "cu_seqlens must not decrease; cu_seqlens[1] is 5 and cu_seqlens[2] is 3",
        ),
        ({"max_seqlen": 3}, "max_seqlen is 3, but a sequence has 4 tokens"),
        ({"max_seqlen": 2, "cu_seqlens_host": (0, 3, 7)}, "max_seqlen is 2, but a sequence has 4 tokens"),
        (
            {"max_seqlen": torch.tensor(4)},
            "max_seqlen must be an int on the host, the length of the longest sequence; got tensor(4)",
        ),
        ({"window": 0}, "window must be at least 1 (the token itself) or None; it is 0"),
        ({"softcap": 0.0}, "softcap must be a finite number above 0, or None; it is 0.0"),
        ({"softcap": float("inf")}, "softcap must be a finite number above 0, or None; it is inf"),
        (
            {"sinks": torch.zeros(2)},
            "sinks must be (4,) floating point, one logit per query head; they are (2,) torch.float32",
        ),
        (
            {"sinks": torch.zeros(4, dtype=torch.int64)},
            "sinks must be (4,) floating point, one logit per query head; they are (4,) torch.int64",
        ),
        (
            {"sinks": torch.zeros(4, device="meta")},
            "sinks and q must be on one device; they are on meta and cpu",
        ),
        (
            {"backend": "tpu"},
            "varlen_attention: backend='tpu' does not exist; choose from auto, flash, torch, cpu, reference",
        ),
    ],
)
def test_invalid_arguments_raise(changes, message) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        call(**changes)
    assert str(error.value) == message


def test_an_unavailable_backend_raises() -> None:
    with pytest.raises(BackendUnavailable) as error:
        call(backend="torch")
    assert str(error.value) == (
        "varlen_attention: backend='torch' cannot run these inputs (torch: it needs CUDA tensors; these are on cpu); "
        "these backends can: cpu, reference"
    )


def test_a_softcap_needs_the_compiled_module(monkeypatch) -> None:
    q, k, v, _ = inputs([3])
    assert _cpu.why_not(q, k, v, None, softcap=True) is None
    monkeypatch.setattr(_cpu, "WHY_NO_COMPILED", "it is not built")
    assert _cpu.why_not(q, k, v, None, softcap=True) == "softcap needs the C++ loops: it is not built"
    assert _cpu.why_not(q, k, v, None, sinks=True) is None


def test_why_not_depends_only_on_device_and_dtype() -> None:
    q, k, v, _ = inputs([3])
    for backend in (_torch, _flash):
        assert backend.why_not(q, k, v, None) == "it needs CUDA tensors; these are on cpu"
    meta = [x.to("meta") for x in (q, k, v)]
    assert _cpu.why_not(*meta, None) == "it needs CPU tensors; these are on meta"


def test_flash_and_torch_refuse_what_their_kernels_lack(monkeypatch) -> None:
    """Judged from sizes and versions only, with tensors that claim to be on an H100."""
    q = inputs([3], dim=64, dtype=torch.bfloat16)[0]

    class OnCuda:
        device, dtype, shape = torch.device("cuda"), torch.bfloat16, q.shape

    class Odd(OnCuda):
        shape = (3, 2, 72 + 4)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    tensors = (OnCuda(), OnCuda(), OnCuda())
    assert _torch.why_not(*tensors, 4, sinks=True) is None
    assert _torch.why_not(*tensors, None, softcap=True) == (
        "varlen_attn has no softcap; a flash-attention package (flash-attn or flash-attn-3) has one"
    )
    assert _torch.why_not(OnCuda(), OnCuda(), Odd(), None) == (
        "it supports head dims that are multiples of 8 and at most 256, not 76"
    )
    packages = {"flash_attn.cute.interface": lambda q, softcap=0.0: None}
    monkeypatch.setattr(_flash, "_INSTALLED", {g.module: g.module in packages for g in _flash._GENERATIONS})
    monkeypatch.setattr(_flash, "_function", packages.__getitem__)
    assert _flash.why_not(*tensors, None) is None
    assert _flash.why_not(*tensors, None, sinks=True) == (
        "its backward function takes no log-sum-exp, which sinks need"
    )
    no_softcap = (
        "the installed flash-attention package has no softcap; flash-attn 2.6 or newer and flash-attn-3 have one"
    )
    assert _flash.why_not(*tensors, None, softcap=True) == no_softcap
    for function, reason in ((lambda q: None, no_softcap), (lambda q, softcap=0.0: None, None)):
        packages["flash_attn.flash_attn_interface"] = function
        monkeypatch.setitem(_flash._INSTALLED, "flash_attn.flash_attn_interface", True)
        assert _flash.why_not(*tensors, None, softcap=True) == reason


FA2, FA3, FA4 = "flash_attn.flash_attn_interface", "flash_attn_interface", "flash_attn.cute.interface"


@pytest.mark.parametrize(
    ("capability", "installed", "expected"),
    [
        ((9, 0), (FA2, FA3, FA4), "flash-attn-3"),  # on Hopper the third generation is the fastest
        ((9, 0), (FA2, FA4), "flash-attn-4"),
        ((9, 0), (FA2,), "flash-attn"),
        ((9, 0), (), None),
        ((10, 0), (FA2, FA3, FA4), "flash-attn-4"),
        ((10, 0), (FA2, FA3), "flash-attn"),
        ((8, 0), (FA2, FA3, FA4), "flash-attn"),
        ((8, 0), (FA3, FA4), None),
    ],
)
def test_the_flash_generation_of_a_gpu(capability, installed, expected, monkeypatch) -> None:
    """The newest package with kernels for the GPU; torch's varlen_attn where there is none."""
    monkeypatch.setattr(_dispatch, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(_flash, "_INSTALLED", {g.module: g.module in installed for g in _flash._GENERATIONS})
    found = _flash._generation(capability[0], False)
    assert (found.name if found else None) == expected
    q, k, v, _ = inputs([20], (4, 2), 64, dtype=torch.bfloat16)
    on_a_gpu = [b for b in BACKENDS if b.name != "cpu"]
    assert _dispatch.choose("op", on_a_gpu, "auto", q, k, v, None).name == ("flash" if expected else "torch")


def test_the_flash_backend_without_a_gpu(monkeypatch) -> None:
    """Value heads are padded, and the scale is that of the query heads; the package is replaced by the cpu backend."""
    lengths = [20, 33]

    def flash(q, k, v, *, cu_seqlens_q, max_seqlen_q, softmax_scale, causal, window_size, softcap=0.0, **_):
        assert causal
        assert q.shape[-1] == k.shape[-1] == v.shape[-1] == 48
        window = window_size[0] + 1 or None
        return varlen_attention(
            q, k, v, cu_seqlens_q, max_seqlen_q, scale=softmax_scale, window=window, softcap=softcap or None
        )

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setitem(_flash._INSTALLED, "flash_attn.flash_attn_interface", True)
    monkeypatch.setattr(_flash, "_function", lambda _: flash)
    for dims, options in (((48, 32), {"softcap": 2.0}), ((32, 48), {"window": 7}), ((48, 16), {})):
        q, k, v, g = inputs(lengths, dim=dims[0], value_dim=dims[1])
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = _flash.varlen_attention(*leaves, offsets(lengths), 33, **options)
        ours = [out.detach(), *torch.autograd.grad(out, leaves, g)]
        for a, b in zip(ours, run("cpu", lengths, q, k, v, g, **options), strict=True):
            torch.testing.assert_close(a, b)


def test_a_single_sequence_uses_the_kernel_of_torch() -> None:
    """One sequence with one kv head is a single task for the C++ loops; torch's kernel uses all threads."""
    q, k, v, _ = inputs([64], (2, 1), 16)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert not _cpu.compiled_supports(q, k, v, [0, 64], 0.0)
        assert _cpu.compiled_supports(q, k, v, [0, 64], 2.0), "only the C++ loops cap scores"
    finally:
        torch.set_num_threads(threads)
