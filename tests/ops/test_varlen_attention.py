"""varlen_attention compared with its definition: the reference in float64, one sequence at a time."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from attention_cases import assert_as_accurate_as_torch, bfloat16_digest, inputs, offsets, run, run_eager, sinks_of

from delib_fast.ops import BackendUnavailable, varlen_attention
from delib_fast.ops._library import WHY_NO_COMPILED
from delib_fast.ops.varlen_attention import _cpu, _flash, _torch, reference

LENGTHS = {
    "one sequence": [37],
    "many short sequences": [1, 2, 3, 5, 8, 4, 2, 1, 1, 6, 3],  # all in one padded batch
    "empty sequences": [0, 7, 0, 0, 12, 0],  # at both ends and in the middle
    "one-token sequences": [1, 1, 1, 1],
    "padding": [30, 19, 15],  # the padding is a sequence of its own
    "very unequal": [150, 3, 131, 40, 39, 1],  # several batches, with the sequences in another order
}
HEADS = {"mha": (2, 2), "gqa": (4, 2), "mqa": (3, 1)}


# What changes the scores or the values, beside scale and window; (D, Dv) is (16, 16) if it is not given.
OPTIONS = {
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "smaller values": {"dims": (48, 32)},
    "larger values": {"dims": (16, 32)},
    "odd dims": {"dims": (24, 8), "sinks": True},  # torch's kernel, which needs equal dims
    "all": {"softcap": 1.5, "sinks": True, "dims": (32, 16)},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("window", [None, 1, 5, 200])
def test_matches_reference(lengths, heads, window, dtype) -> None:
    data = inputs(lengths, heads, dtype=dtype)
    exact = run("reference", lengths, *(x.double() for x in data), window=window)
    torchs = run_eager(lengths, *data, window=window)
    ours = run("cpu", lengths, *data, window=window)
    assert [x.dtype for x in ours] == [dtype] * 4
    assert_as_accurate_as_torch(ours, exact, torchs, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("window", [None, 5, 60])
def test_options_match_reference(window, options, dtype) -> None:
    """Sequences span several blocks of queries and keys; with a window, blocks are skipped or partly visible."""
    lengths = [290, 3, 131, 40, 0, 1]
    dim, value_dim = options.get("dims", (16, 16))
    data = inputs(lengths, (4, 2), dim, dtype, value_dim=value_dim)
    if "sinks" in options:
        data.append(sinks_of(4, dtype))
    more = {"window": window, "softcap": options.get("softcap")}
    exact = run("reference", lengths, *(x.double() for x in data), **more)
    if more["softcap"] and dtype in (torch.float64, torch.float16):
        with pytest.raises(BackendUnavailable, match="with a softcap it supports float32 and bfloat16"):
            run("cpu", lengths, *data, **more)
        return
    ours = run("cpu", lengths, *data, **more)
    assert [x.dtype for x in ours] == [dtype] * len(ours)
    assert ours[0].shape == (465, 4, value_dim)
    assert_as_accurate_as_torch(ours, exact, run_eager(lengths, *data, **more), dtype)


def test_a_sink_is_a_key_whose_value_is_zero() -> None:
    """out·σ(lse − sink), with the log-sum-exp of the scores; and a sink of -inf has no effect."""
    lengths = [9, 4]
    q, k, v, g = inputs(lengths, (2, 2))
    sinks = torch.tensor([0.5, float("-inf")])
    starts = [0] * 9 + [9] * 4
    lse = torch.stack([(q[i] * k[start : i + 1]).sum(-1).div(4).logsumexp(0) for i, start in enumerate(starts)])
    plain = run("cpu", lengths, q, k, v, g)[0]
    expected = plain * torch.sigmoid(lse - sinks).unsqueeze(-1)
    for backend in ("cpu", "reference"):
        out, *_, d_sinks = run(backend, lengths, q, k, v, g, sinks)
        torch.testing.assert_close(out, expected)
        assert torch.equal(out[:, 1], run(backend, lengths, q, k, v, g)[0][:, 1])
        assert d_sinks[1] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_head_dims(dim, dtype) -> None:
    lengths = [40, 1, 90]
    data = inputs(lengths, (4, 2), dim, dtype)
    exact = run("reference", lengths, *(x.double() for x in data))
    assert_as_accurate_as_torch(run("cpu", lengths, *data), exact, run_eager(lengths, *data), dtype)


def bfloat16_loops() -> int:
    """The number of loops for bfloat16 that this processor and system run: AVX-512 BF16 and AMX."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    may_use_tiles = "amx_bf16" in flags and ctypes.CDLL(None).syscall(158, 0x1023, 18) == 0  # arch_prctl, for AMX
    return ("avx512_bf16" in flags) + may_use_tiles


def test_each_instruction_set_is_as_accurate_as_torch() -> None:
    """AMX, AVX-512 BF16 and float32 loops, as far as this processor has them; their results differ by roundings."""
    digests = {bfloat16_digest()}
    for isa in ("AVX512_CORE_BF16", "AVX512_CORE"):
        path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
        environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa, "PYTHONPATH": path}
        program = "import attention_cases; print(attention_cases.bfloat16_digest())"
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (isa, done.stderr)
        digests.add(done.stdout.strip())
    if WHY_NO_COMPILED is None and "ONEDNN_MAX_CPU_ISA" not in os.environ:
        assert len(digests) == 1 + bfloat16_loops()


def test_window_longer_than_a_block() -> None:
    """With a window, queries are processed in blocks, and the keys of two blocks overlap."""
    lengths = [700, 300, 290]
    data = inputs(lengths, (2, 1), 16)
    for window in (127, 128, 129, 250):
        exact = run("reference", lengths, *(x.double() for x in data), window=window)
        torchs = run_eager(lengths, *data, window=window)
        assert_as_accurate_as_torch(run("cpu", lengths, *data, window=window), exact, torchs, torch.float32)


def test_scale() -> None:
    data = inputs([9, 4])
    exact = run("reference", [9, 4], *(x.double() for x in data), scale=0.3)
    assert_as_accurate_as_torch(
        run("cpu", [9, 4], *data, scale=0.3), exact, run_eager([9, 4], *data, scale=0.3), torch.float32
    )


def test_reference_is_masked_attention() -> None:
    """The definition itself, compared with one dense mask over the pack."""
    lengths, window = [5, 0, 3, 1, 8], 3
    q, k, v, _ = inputs(lengths, dtype=torch.float64)
    sequence = torch.repeat_interleave(torch.arange(5), torch.tensor(lengths))
    position = torch.arange(17)
    mask = (sequence[:, None] == sequence) & (position[:, None] >= position) & (position[:, None] - position < window)
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)), attn_mask=mask, enable_gqa=True
    )[0].transpose(0, 1)
    ours = reference.varlen_attention(q, k, v, offsets(lengths), 8, window=window)
    torch.testing.assert_close(ours, dense, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("value_dim", [4, 3, 6])
def test_gradcheck(backend, window, value_dim) -> None:
    lengths = [4, 0, 1, 3]
    q, k, v, _ = (x.requires_grad_() for x in inputs(lengths, (2, 1), 4, torch.float64, value_dim=value_dim))
    softcap = 1.5 if backend == "reference" else None  # the C++ loops have no float64
    assert torch.autograd.gradcheck(
        lambda q, k, v, sinks: varlen_attention(
            q, k, v, offsets(lengths), 4, window=window, softcap=softcap, sinks=sinks, backend=backend
        ),
        (q, k, v, sinks_of(2, torch.float64).requires_grad_()),
    )
    assert torch.autograd.gradcheck(
        lambda *x: varlen_attention(*x, offsets(lengths), 4, window=window, backend=backend), (q, k, v)
    )


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("sinks", [None, sinks_of(4)], ids=["no sinks", "sinks"])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_opcheck(window, sinks, softcap) -> None:
    lengths = [6, 2, 0, 5]
    q, k, v, _ = (x.requires_grad_() for x in inputs(lengths, (4, 2), 16, value_dim=32))
    sinks = None if sinks is None else sinks.clone().requires_grad_()
    torch.library.opcheck(
        torch.ops.delib_fast.varlen_attention_cpu.default, (q, k, v, sinks, offsets(lengths), 6, 0.3, window, softcap)
    )


def test_compile_fullgraph() -> None:
    lengths = [6, 2, 0, 5]
    q, k, v, g, sinks = [*inputs(lengths, dim=32, value_dim=16), sinks_of(4)]
    leaves = [x.requires_grad_() for x in (q, k, v, sinks)]
    compiled = torch.compile(
        lambda *x: varlen_attention(*x[:3], cu_seqlens, 6, window=4, softcap=2.0, sinks=x[3]) * 2,
        fullgraph=True,
        backend="aot_eager",
    )
    cu_seqlens = offsets(lengths)
    out = compiled(*leaves)
    eager = run("cpu", lengths, q, k, v, 2 * g, sinks, window=4, softcap=2.0)
    torch.testing.assert_close(out.detach(), 2 * eager[0])
    for ours, theirs in zip(torch.autograd.grad(out, leaves, g), eager[1:], strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_no_tokens(backend) -> None:
    q, k, v, g = inputs([0, 0])
    out, *grads = run(backend, [0, 0], q, k, v, g)
    assert out.shape == q.shape
    assert [x.shape for x in grads] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_nan_in_another_sequence_does_not_leak(backend) -> None:
    lengths = [6, 5, 6, 4]  # one kernel call computes the first three
    data = [*inputs(lengths), sinks_of(4)]
    data[3][6:11] = 0
    *clean, clean_d_sinks = run(backend, lengths, *data)
    for x in data[:3]:
        x[6:11] = float("nan")
    rest = torch.cat([torch.arange(6), torch.arange(11, 21)])
    *tensors, d_sinks = run(backend, lengths, *data)
    for a, b in zip(tensors, clean, strict=True):
        assert torch.equal(a[rest], b[rest])
    if backend == "cpu":  # autograd of the reference multiplies the NaN by zero
        assert torch.isfinite(d_sinks).all()
        torch.testing.assert_close(d_sinks, clean_d_sinks)


def test_a_sequence_in_a_pack_equals_the_sequence_alone() -> None:
    lengths = [20, 33, 40]
    data = inputs(lengths)
    packed = run("cpu", lengths, *data)
    alone = run("cpu", [33], *(x[20:53] for x in data))
    for a, b in zip(packed, alone, strict=True):
        torch.testing.assert_close(a[20:53], b, rtol=1e-5, atol=1e-6)


def test_non_contiguous() -> None:
    """transformers passes a transposed (1, H, T, D); its gradients have the same strides."""
    lengths = [9, 14]
    data = inputs(lengths)
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in data]
    spaced = [torch.stack([x, x], dim=-1)[..., 0] for x in data]
    for other in (strided, spaced):
        assert not other[0].is_contiguous()
        leaves = [x.requires_grad_() for x in other[:3]]
        out = varlen_attention(*leaves, offsets(lengths), 14)
        ours = [out, *torch.autograd.grad(out, leaves, other[3])]
        assert all(torch.equal(a, b) for a, b in zip(ours, run("cpu", lengths, *data), strict=True))


def test_deterministic() -> None:
    lengths = [120, 64, 64, 3, 3, 90]
    data = [*inputs(lengths, (8, 2), 64), sinks_of(8)]
    for softcap in (None, 2.0):
        first = run("cpu", lengths, *data, softcap=softcap)
        for _ in range(3):
            again = run("cpu", lengths, *data, softcap=softcap)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_every_token_is_written() -> None:
    """Outputs are allocated with torch.empty, which contains NaN in these tests."""
    for lengths in LENGTHS.values():
        for window in (None, 2):
            assert all(torch.isfinite(x).all() for x in run("cpu", lengths, *inputs(lengths), window=window))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["torch", "flash"])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gpu_options_match_reference(options, window, backend) -> None:
    lengths = [290, 3, 131, 40, 1]
    dim, value_dim = options.get("dims", (64, 64))
    data = [x.cuda() for x in inputs(lengths, (4, 2), dim, torch.bfloat16, value_dim=value_dim)]
    sinks = [sinks_of(4, torch.bfloat16).cuda()] if "sinks" in options else []
    more = {"window": window, "softcap": options.get("softcap")}
    module = {"torch": _torch, "flash": _flash}[backend]
    if reason := module.why_not(*data[:3], window, False, bool(more["softcap"]), bool(sinks)):
        pytest.skip(reason)

    def on_gpu(name, tensors):
        leaves = [x.detach().clone().requires_grad_() for x in (*tensors[:3], *tensors[4:])]
        out = varlen_attention(
            *leaves[:3], offsets(lengths).cuda(), 290, sinks=leaves[3] if sinks else None, backend=name, **more
        )
        return [out.detach(), *torch.autograd.grad(out, leaves, tensors[3])]

    exact = on_gpu("reference", [x.double() for x in (*data, *sinks)])
    torchs = [x.cuda() for x in run_eager(lengths, *(x.cpu() for x in (*data, *sinks)), **more)]
    assert_as_accurate_as_torch(on_gpu(backend, [*data, *sinks]), exact, torchs, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["torch", "flash"])
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("window", [None, 1, 5, 200])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_gpu_matches_reference(lengths, window, dim, backend) -> None:
    data = [x.cuda() for x in inputs(lengths, (4, 2), dim, torch.bfloat16)]
    backends = {"torch": _torch, "flash": _flash}
    if reason := backends[backend].why_not(*data[:3], window):
        pytest.skip(reason)

    def on_gpu(name, tensors):
        leaves = [x.detach().clone().requires_grad_() for x in tensors[:3]]
        out = varlen_attention(*leaves, offsets(lengths).cuda(), max(lengths), window=window, backend=name)
        return [out.detach(), *torch.autograd.grad(out, leaves, tensors[3])]

    exact = on_gpu("reference", [x.double() for x in data])
    torchs = [x.cuda() for x in run_eager(lengths, *(x.cpu() for x in data), window=window)]
    assert_as_accurate_as_torch(on_gpu(backend, data), exact, torchs, torch.bfloat16)


@pytest.mark.skipif(_cpu.WHY_NO_COMPILED is not None, reason=f"{_cpu.WHY_NO_COMPILED}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "dim"), [((4, 2), 48), ((3, 1), 80), ((2, 2), 256)])
def test_compiled_loops(heads, dim, dtype) -> None:
    """The C++ loops agree with the reference, and a NaN in one sequence does not reach another.

    Sequences span several blocks of keys (128) and queries (32) and are not multiples of either. Head dims are not all
    multiples of two vectors. Inputs are transposed views, as in a model.
    """
    lengths = [257, 1, 130, 33]
    data = inputs(lengths, heads, dim, dtype)
    assert _cpu.compiled_supports(*data[:3], [0, *accumulate(lengths)], 0.0)
    views = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in data]
    ours = run("cpu", lengths, *views)
    exact = run("reference", lengths, *(x.double() for x in data))
    assert_as_accurate_as_torch(ours, exact, run_eager(lengths, *data), dtype)
    poisoned = data[0].clone()
    poisoned[257] = float("nan")
    again = run("cpu", lengths, poisoned, *data[1:])
    others = [i for i in range(sum(lengths)) if i != 257]
    for before, after in zip(ours, again, strict=True):
        assert torch.equal(before[others], after[others]), "one sequence affects another, or two calls differ"
