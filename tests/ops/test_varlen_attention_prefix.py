"""varlen_attention with shared prefixes: outputs and gradients as with each text written out in a row of its own."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch

from delib_fast.ops import BackendUnavailable, varlen_attention
from delib_fast.ops.varlen_attention import _cpu, _torch
from delib_fast.ops.varlen_attention._prefix import ancestors, plan

# (lengths, prefix); each case is there to catch something.
CASES = {
    "one prompt, three completions": ([9, 4, 6, 1], [-1, 0, 0, 0]),
    "two prompts, mixed order": ([9, 5, 4, 6, 3, 2], [-1, -1, 0, 1, 0, 1]),  # completions of one are not neighbours
    "nothing shared": ([5, 3, 7], [-1, -1, -1]),
    "some share": ([5, 30, 7, 8, 2], [-1, -1, 1, 1, -1]),
    "a tree": ([6, 4, 3, 5, 2, 3], [-1, 0, 1, 1, 0, 2]),  # a prefix has a prefix: keys serve several groups
    "empty ones": ([0, 4, 0, 3, 2, 0], [-1, 0, 1, 1, 2, 4]),  # an empty prefix, an empty run between, an empty leaf
    "long prompt": ([150, 3, 40, 17, 5], [-1, 0, 0, 0, -1]),  # and a padding tail
}


def cu(lengths) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def inputs(lengths, heads=(4, 2), dim=16, dtype=torch.float32) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [
        torch.randn(sum(lengths), h, dim, generator=draw, dtype=torch.float64).to(dtype)
        for h in (heads[0], heads[1], heads[1], heads[0])
    ]


def shared(backend, lengths, prefix, q, k, v, g, **kwargs) -> list[torch.Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = varlen_attention(*leaves, cu(lengths), max(lengths), prefix=prefix, backend=backend, **kwargs)
    return [out.detach(), *torch.autograd.grad(out, leaves, g)]


def written_out(lengths, prefix, q, k, v, g, **kwargs) -> list[torch.Tensor]:
    """Each run in a row of its own, behind copies of all that it continues; only its own outputs are read."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    places = list(torch.arange(sum(lengths)).split(lengths))
    outs = []
    for run in range(len(lengths)):
        row = torch.cat([places[i] for i in (*ancestors(prefix, run), run)])
        alone = varlen_attention(*(x[row] for x in leaves), cu([len(row)]), len(row), backend="reference", **kwargs)
        outs.append(alone[len(row) - lengths[run] :])
    out = torch.cat(outs)
    return [out.detach(), *torch.autograd.grad(out, leaves, g)]


def assert_close(ours, exact, torchs, dtype, factor=3.0) -> None:
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    for name, a, b, c in zip(("out", "dq", "dk", "dv"), ours, exact, torchs, strict=True):
        allowed = factor * (c.double() - b).abs().max() + 32 * eps * max(1.0, b.abs().max())
        off = (a.double() - b).abs().max()
        assert off <= allowed, f"{name} is off by {off:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize(("lengths", "prefix"), CASES.values(), ids=CASES)
def test_shared_equals_written_out(lengths, prefix, heads, dtype) -> None:
    data = inputs(lengths, heads, dtype=dtype)
    exact = written_out(lengths, prefix, *(x.double() for x in data))
    torchs = written_out(lengths, prefix, *data)
    ours = shared("cpu", lengths, prefix, *data)
    assert [x.dtype for x in ours] == [dtype] * 4
    assert_close(ours, exact, torchs, dtype)


@pytest.mark.parametrize("window", [None, 1, 3, 7, 200])
@pytest.mark.parametrize(("lengths", "prefix"), CASES.values(), ids=CASES)
def test_the_reference_is_written_out(lengths, prefix, window) -> None:
    data = inputs(lengths, dtype=torch.float64)
    ours = shared("reference", lengths, prefix, *data, window=window)
    for a, b in zip(ours, written_out(lengths, prefix, *data, window=window), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dim", [64, 80, 128])
def test_head_dims_and_scale(dim) -> None:
    lengths, prefix = CASES["some share"]
    data = inputs(lengths, dim=dim)
    exact = written_out(lengths, prefix, *(x.double() for x in data), scale=0.07)
    assert_close(
        shared("cpu", lengths, prefix, *data, scale=0.07),
        exact,
        written_out(lengths, prefix, *data, scale=0.07),
        torch.float32,
    )


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradcheck(backend) -> None:
    lengths, prefix = [3, 2, 0, 2, 2], [-1, 0, 0, 1, -1]
    q, k, v, _ = (x.requires_grad_() for x in inputs(lengths, (2, 1), 4, torch.float64))
    assert torch.autograd.gradcheck(
        lambda *x: varlen_attention(*x, cu(lengths), 3, prefix=prefix, backend=backend), (q, k, v)
    )


def test_opcheck() -> None:
    lengths, prefix = CASES["a tree"]
    q, k, v, _ = (x.requires_grad_() for x in inputs(lengths, dim=8))
    who = plan(tuple(cu(lengths).tolist()), tuple(prefix), q.device)
    torch.library.opcheck(
        torch.ops.delib_fast.varlen_attention_prefix_cpu.default, (q, k, v, cu(lengths), max(lengths), 0.3, *who)
    )


def test_compile_fullgraph() -> None:
    lengths, prefix = CASES["two prompts, mixed order"]
    q, k, v, g = inputs(lengths)
    host, cu_seqlens = tuple(cu(lengths).tolist()), cu(lengths)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    compiled = torch.compile(
        lambda *x: varlen_attention(*x, cu_seqlens, 9, cu_seqlens_host=host, prefix=tuple(prefix)) * 2,
        fullgraph=True,
        backend="aot_eager",
    )
    eager = shared("cpu", lengths, prefix, q, k, v, 2 * g)
    out = compiled(*leaves)
    for a, b in zip([out.detach() / 2, *torch.autograd.grad(out, leaves, g)], eager, strict=True):
        torch.testing.assert_close(a, b)


def test_completions_do_not_see_each_other() -> None:
    lengths, prefix = [6, 5, 5, 4], [-1, 0, 0, -1]
    data = inputs(lengths)
    clean = shared("cpu", lengths, prefix, *data)
    for x in data[:3]:
        x[6:11] = float("nan")
    out = shared("cpu", lengths, prefix, *data)[0]
    rest = [*range(6), *range(11, 20)]
    assert torch.equal(out[rest], clean[0][rest])


def test_deterministic_and_non_contiguous() -> None:
    lengths, prefix = CASES["a tree"]
    data = inputs(lengths)
    first = shared("cpu", lengths, prefix, *data)
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in data]
    for tensors in (data, strided):
        assert all(torch.equal(a, b) for a, b in zip(first, shared("cpu", lengths, prefix, *tensors), strict=True))


def test_the_torch_backend_by_its_halves(monkeypatch) -> None:
    """Without a GPU: its translation of layouts and arguments, over stand-ins for torch's two ops."""
    import torch.nn.attention.varlen  # registers the real ones, once

    lengths, prefix = CASES["a tree"]
    q, k, v, g = inputs(lengths)

    class TorchAttn:
        @staticmethod
        def _varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size):
            assert window_size in ([-1, 0], [-1, -1])
            out, lse = _cpu._half(q, k, v, cu_q, cu_k, max_q, max_k, window_size == [-1, 0], scale)
            return out, lse.squeeze(-1).T.contiguous(), None

        @staticmethod
        def _varlen_attn_backward(d_out, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, causal, rng, scale, window_size):
            assert not causal
            assert lse.shape == (q.shape[1], q.shape[0])
            assert lse.is_contiguous()
            return _cpu._half_backward(
                d_out, q, k, v, out, lse.T.unsqueeze(-1), cu_q, cu_k, max_q, max_k, window_size == [-1, 0], scale
            )

    monkeypatch.setattr(torch.ops, "torch_attn", TorchAttn, raising=False)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = _torch.varlen_attention(*leaves, cu(lengths), max(lengths), prefix=prefix)
    for a, b in zip(
        [out.detach(), *torch.autograd.grad(out, leaves, g)], shared("cpu", lengths, prefix, q, k, v, g), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ([-1, 0], "prefix must have one entry a run; it has 2 for 3 runs"),
        ([-1, 1, 0], "prefix[1] is 1; a run continues one that stands before it, or none (-1)"),
        ([-1, -2, 0], "prefix[1] is -2; a run continues one that stands before it, or none (-1)"),
        (
            torch.tensor([-1, 0, 0]),
            "prefix must be host ints, one a run: the run that it continues, or -1; it is Tensor",
        ),
    ],
)
def test_refuses(prefix, message) -> None:
    q, k, v, _ = inputs([3, 2, 2])
    with pytest.raises(ValueError, match=r".") as error:
        varlen_attention(q, k, v, cu([3, 2, 2]), 3, prefix=prefix)
    assert str(error.value) == message


def test_a_window_takes_the_reference() -> None:
    lengths, prefix = CASES["some share"]
    data = inputs(lengths)
    with pytest.raises(BackendUnavailable, match="a sliding window across a shared prefix is not done by two"):
        shared("cpu", lengths, prefix, *data, window=4)
    ours = shared("auto", lengths, prefix, *data, window=4)
    for a, b in zip(ours, written_out(lengths, prefix, *data, window=4), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("lengths", "prefix"), CASES.values(), ids=CASES)
def test_gpu_matches_reference(lengths, prefix, dim) -> None:
    data = inputs(lengths, dim=dim, dtype=torch.bfloat16)
    on_gpu = [x.cuda() for x in data]
    if reason := _torch.why_not(*on_gpu[:3], None, True):
        pytest.skip(reason)
    leaves = [x.requires_grad_() for x in on_gpu[:3]]
    out = varlen_attention(*leaves, cu(lengths).cuda(), max(lengths), prefix=prefix, backend="torch")
    ours = [x.cpu() for x in (out.detach(), *torch.autograd.grad(out, leaves, on_gpu[3]))]
    assert_close(
        ours,
        written_out(lengths, prefix, *(x.double() for x in data)),
        written_out(lengths, prefix, *data),
        torch.bfloat16,
    )
