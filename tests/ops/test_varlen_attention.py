"""varlen_attention compared with its definition: the reference in float64, one sequence at a time."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from attention_cases import assert_as_accurate_as_torch, inputs, offsets

from delib_fast.ops import BackendUnavailable, varlen_attention
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


def run(backend, lengths, q, k, v, g, **kwargs) -> list[torch.Tensor]:
    """Output and the three gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = varlen_attention(*leaves, offsets(lengths), max(lengths, default=0), backend=backend, **kwargs)
    return [out.detach(), *torch.autograd.grad(out, leaves, g)]


def run_eager(lengths, q, k, v, g, scale=None, window=None) -> list[torch.Tensor]:
    """Plain torch in the dtype of the inputs, as in most models: the baseline for the accuracy of a backend."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    outs = []
    for qr, kr, vr in zip(*(x.split(lengths) for x in leaves), strict=True):
        kr, vr = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (kr, vr))
        distance = torch.arange(len(qr))[:, None] - torch.arange(len(qr))
        hidden = (distance < 0) | (distance >= (window or len(qr)))
        scores = torch.einsum("qhd,khd->hqk", qr, kr) * (scale or q.shape[-1] ** -0.5)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        outs.append(torch.einsum("hqk,khd->qhd", weights, vr))
    out = torch.cat(outs)
    return [out.detach(), *torch.autograd.grad(out, leaves, g)]


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


@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_head_dims(dim) -> None:
    lengths = [40, 1, 90]
    data = inputs(lengths, (4, 2), dim)
    exact = run("reference", lengths, *(x.double() for x in data))
    assert_as_accurate_as_torch(run("cpu", lengths, *data), exact, run_eager(lengths, *data), torch.float32)


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
def test_gradcheck(backend, window) -> None:
    lengths = [4, 0, 1, 3]
    q, k, v, _ = (x.requires_grad_() for x in inputs(lengths, (2, 1), 4, torch.float64))
    assert torch.autograd.gradcheck(
        lambda *x: varlen_attention(*x, offsets(lengths), 4, window=window, backend=backend), (q, k, v)
    )


@pytest.mark.parametrize("window", [0, 3])
def test_opcheck(window) -> None:
    lengths = [6, 2, 0, 5]
    q, k, v, _ = (x.requires_grad_() for x in inputs(lengths, (4, 2), 8))
    torch.library.opcheck(
        torch.ops.delib_fast.varlen_attention_cpu.default, (q, k, v, offsets(lengths), 6, 0.3, window)
    )


def test_compile_fullgraph() -> None:
    lengths = [6, 2, 0, 5]
    q, k, v, g = inputs(lengths)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    compiled = torch.compile(
        lambda *x: varlen_attention(*x, cu_seqlens=cu_seqlens, max_seqlen=6) * 2, fullgraph=True, backend="aot_eager"
    )
    cu_seqlens = offsets(lengths)
    out = compiled(*leaves)
    eager = run("cpu", lengths, q, k, v, 2 * g)
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
    data = inputs(lengths)
    clean = run(backend, lengths, *data)
    for x in data:
        x[6:11] = float("nan")
    rest = torch.cat([torch.arange(6), torch.arange(11, 21)])
    for a, b in zip(run(backend, lengths, *data), clean, strict=True):
        assert torch.equal(a[rest], b[rest])


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
    data = inputs(lengths, (8, 2), 64)
    first = run("cpu", lengths, *data)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run("cpu", lengths, *data), strict=True))


def test_every_token_is_written() -> None:
    """Outputs are allocated with torch.empty, which contains NaN in these tests."""
    for lengths in LENGTHS.values():
        for window in (None, 2):
            assert all(torch.isfinite(x).all() for x in run("cpu", lengths, *inputs(lengths), window=window))


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
            "q (T, Hq, D), k and v (T, Hkv, D) must agree in T and D; they are (6, 4, 16), (7, 2, 16) and (7, 2, 16)",
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


def test_why_not_depends_only_on_device_and_dtype() -> None:
    q, k, v, _ = inputs([3])
    for backend in (_torch, _flash):
        assert backend.why_not(q, k, v, None) == "it needs CUDA tensors; these are on cpu"
    meta = [x.to("meta") for x in (q, k, v)]
    assert _cpu.why_not(*meta, None) == "it needs CPU tensors; these are on meta"


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
    assert _cpu.compiled_supports(data[0], data[1], [0, *accumulate(lengths)], 0)
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


def test_a_single_sequence_uses_the_kernel_of_torch() -> None:
    """One sequence with one kv head is a single task for the C++ loops; torch's kernel uses all threads."""
    q, k, *_ = inputs([64], (2, 1), 16)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert not _cpu.compiled_supports(q, k, [0, 64], 0)
    finally:
        torch.set_num_threads(threads)
