"""varlen_attention with shared prefixes, compared with attention over each full text (prefixes and completion).

Sinks on the torch backend use the same op, so they are tested here as well.
"""

from __future__ import annotations

import pytest
import torch
from attention_cases import assert_as_accurate_as_torch, inputs, leaves_of, offsets, run, sinks_of

from delib_fast.ops import BackendUnavailable, varlen_attention
from delib_fast.ops.varlen_attention import _cpu, _torch
from delib_fast.ops.varlen_attention._merged import NO_PREFIX, Layout, _MergedCall, ancestors, plan_prefixes

# (lengths, prefix)
CASES = {
    "one prompt, three completions": ([9, 4, 6, 1], [-1, 0, 0, 0]),
    "two prompts, mixed order": (
        [9, 5, 4, 6, 3, 2],
        [-1, -1, 0, 1, 0, 1],
    ),  # the completions of a prompt are not adjacent
    "no prefix": ([5, 3, 7], [-1, -1, -1]),
    "some sequences share": ([5, 30, 7, 8, 2], [-1, -1, 1, 1, -1]),
    "a tree": ([6, 4, 3, 5, 2, 3], [-1, 0, 1, 1, 0, 2]),  # a prefix has a prefix: its keys are in several groups
    "empty sequences": (
        [0, 4, 0, 3, 2, 0],
        [-1, 0, 1, 1, 2, 4],
    ),  # an empty prefix, an empty sequence in between, an empty leaf
    "long prompt": ([150, 3, 40, 17, 5], [-1, 0, 0, 0, -1]),  # with padding at the end
}


def shared(backend, lengths, prefix, *data, **kwargs) -> list[torch.Tensor]:
    return run(backend, lengths, *data, prefix=prefix, **kwargs)


def separate(lengths, prefix, q, k, v, g, sinks=None, **kwargs) -> list[torch.Tensor]:
    """Attention over one full text at a time: a sequence after copies of its prefixes. Returns its own outputs."""
    leaves = leaves_of(q, k, v, sinks)
    kwargs |= {} if sinks is None else {"sinks": leaves[3]}
    positions = list(torch.arange(sum(lengths)).split(lengths))
    outs = []
    for i, length in enumerate(lengths):
        text = torch.cat([positions[j] for j in (*ancestors(prefix, i), i)])
        alone = varlen_attention(
            *(x[text] for x in leaves[:3]), offsets([len(text)]), len(text), backend="reference", **kwargs
        )
        outs.append(alone[len(text) - length :])
    out = torch.cat(outs)
    return [out.detach(), *torch.autograd.grad(out, leaves, g)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize(("lengths", "prefix"), CASES.values(), ids=CASES)
def test_shared_prefixes_equal_separate_texts(lengths, prefix, heads, dtype) -> None:
    data = inputs(lengths, heads, dtype=dtype)
    exact = separate(lengths, prefix, *(x.double() for x in data))
    torchs = separate(lengths, prefix, *data)
    ours = shared("cpu", lengths, prefix, *data)
    assert [x.dtype for x in ours] == [dtype] * 4
    assert_as_accurate_as_torch(ours, exact, torchs, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("dim", "value_dim"), [(16, 16), (48, 32), (8, 24)])
@pytest.mark.parametrize(("lengths", "prefix"), CASES.values(), ids=CASES)
def test_a_sink_counts_once(lengths, prefix, dim, value_dim, dtype) -> None:
    data = [*inputs(lengths, dim=dim, dtype=dtype, value_dim=value_dim), sinks_of(4, dtype)]
    exact = separate(lengths, prefix, *(x.double() for x in data))
    ours = shared("cpu", lengths, prefix, *data)
    assert_as_accurate_as_torch(ours, exact, separate(lengths, prefix, *data), dtype)


@pytest.mark.parametrize("window", [None, 1, 3, 7, 200])
@pytest.mark.parametrize(("lengths", "prefix"), CASES.values(), ids=CASES)
def test_the_reference_equals_separate_texts(lengths, prefix, window) -> None:
    data = [*inputs(lengths, dtype=torch.float64, value_dim=24), sinks_of(4, torch.float64)]
    ours = shared("reference", lengths, prefix, *data, window=window, softcap=1.5)
    for a, b in zip(ours, separate(lengths, prefix, *data, window=window, softcap=1.5), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dim", [64, 80, 128])
def test_head_dims_and_scale(dim) -> None:
    lengths, prefix = CASES["some sequences share"]
    data = inputs(lengths, dim=dim)
    exact = separate(lengths, prefix, *(x.double() for x in data), scale=0.07)
    assert_as_accurate_as_torch(
        shared("cpu", lengths, prefix, *data, scale=0.07),
        exact,
        separate(lengths, prefix, *data, scale=0.07),
        torch.float32,
    )


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradcheck(backend) -> None:
    lengths, prefix = [3, 2, 0, 2, 2], [-1, 0, 0, 1, -1]
    q, k, v, _ = (x.requires_grad_() for x in inputs(lengths, (2, 1), 4, torch.float64, value_dim=3))
    assert torch.autograd.gradcheck(
        lambda q, k, v, sinks: varlen_attention(
            q, k, v, offsets(lengths), 3, sinks=sinks, prefix=prefix, backend=backend
        ),
        (q, k, v, sinks_of(2, torch.float64).requires_grad_()),
    )
    assert torch.autograd.gradcheck(
        lambda *x: varlen_attention(*x, offsets(lengths), 3, prefix=prefix, backend=backend), (q, k, v)
    )


@pytest.mark.parametrize("sinks", [None, sinks_of(4)], ids=["no sinks", "sinks"])
def test_opcheck(sinks) -> None:
    lengths, prefix = CASES["a tree"]
    q, k, v, _ = (x.requires_grad_() for x in inputs(lengths, dim=8))
    sinks = None if sinks is None else sinks.clone().requires_grad_()
    plan = plan_prefixes(tuple(offsets(lengths).tolist()), tuple(prefix), q.device)
    call = (q, k, v, sinks, offsets(lengths), max(lengths), 0.3)
    torch.library.opcheck(torch.ops.delib_fast.varlen_attention_merged_cpu.default, (*call, 0, *plan))
    torch.library.opcheck(torch.ops.delib_fast.varlen_attention_merged_cpu.default, (*call, 3, *NO_PREFIX))


def test_the_call_tuple_matches_the_schema() -> None:
    arguments = torch.ops.delib_fast.varlen_attention_merged_cpu.default._schema.arguments
    assert [argument.name for argument in arguments] == list(_MergedCall._fields)


def test_compile_fullgraph() -> None:
    lengths, prefix = CASES["two prompts, mixed order"]
    q, k, v, g = inputs(lengths)
    host, cu_seqlens = tuple(offsets(lengths).tolist()), offsets(lengths)
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


def test_completions_do_not_attend_to_each_other() -> None:
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


@pytest.mark.parametrize(
    ("prefix", "sinks", "window", "value_dim"),
    [
        (CASES["a tree"][1], None, None, 16),
        (CASES["a tree"][1], sinks_of(4), None, 16),
        (None, sinks_of(4), None, 16),
        (None, sinks_of(4), 3, 16),
        (None, sinks_of(4), 3, 8),
        (CASES["a tree"][1], sinks_of(4), None, 24),
    ],
)
def test_the_torch_backend_without_a_gpu(prefix, sinks, window, value_dim, monkeypatch) -> None:
    """Layouts and arguments are translated correctly; torch's two ops are replaced by the cpu backend."""
    import torch.nn.attention.varlen  # registers the real ops

    lengths = CASES["a tree"][0]
    q, k, v, g = inputs(lengths, value_dim=value_dim)
    left = -1 if window is None else window - 1

    class TorchAttn:
        @staticmethod
        def _varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size):
            assert q.shape[-1] == k.shape[-1] == v.shape[-1]
            assert window_size in ([left, 0], [-1, -1])
            layout = Layout(cu_q, cu_k, max_q, max_k, window_size[1] == 0, window_size[0] + 1)
            out, lse = _cpu._attention(q, k, v, layout, scale)
            return out, lse.squeeze(-1).T.contiguous(), None

        @staticmethod
        def _varlen_attn_backward(d_out, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, causal, rng, scale, window_size):
            assert not causal
            assert lse.shape == (q.shape[1], q.shape[0])
            assert lse.is_contiguous()
            layout = Layout(cu_q, cu_k, max_q, max_k, window_size[1] == 0, window_size[0] + 1)
            return _cpu._attention_backward(d_out, q, k, v, out, lse.T.unsqueeze(-1), layout, scale)

    monkeypatch.setattr(torch.ops, "torch_attn", TorchAttn, raising=False)
    leaves = leaves_of(q, k, v, sinks)
    more = {} if sinks is None else {"sinks": leaves[3]}
    out = _torch.varlen_attention(*leaves[:3], offsets(lengths), max(lengths), prefix=prefix, window=window, **more)
    expected = shared("reference", lengths, prefix, q, k, v, g, sinks, window=window)
    for a, b in zip([out.detach(), *torch.autograd.grad(out, leaves, g)], expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ([-1, 0], "prefix must have one entry per sequence; it has 2 for 3 sequences"),
        ([-1, 1, 0], "prefix[1] is 1; it must be the index of an earlier sequence, or -1 for none"),
        ([-1, -2, 0], "prefix[1] is -2; it must be the index of an earlier sequence, or -1 for none"),
        (
            torch.tensor([-1, 0, 0]),
            "prefix must be ints on the host, one per sequence: the index of the sequence that it continues, or -1; "
            "it is a Tensor",
        ),
    ],
)
def test_an_invalid_prefix_raises(prefix, message) -> None:
    q, k, v, _ = inputs([3, 2, 2])
    with pytest.raises(ValueError, match=r".") as error:
        varlen_attention(q, k, v, offsets([3, 2, 2]), 3, prefix=prefix)
    assert str(error.value) == message


def test_a_window_or_a_softcap_uses_the_reference() -> None:
    lengths, prefix = CASES["some sequences share"]
    data = inputs(lengths)
    with pytest.raises(BackendUnavailable, match="a sliding window is not supported together with a shared prefix"):
        shared("cpu", lengths, prefix, *data, window=4)
    with pytest.raises(BackendUnavailable, match="a softcap is not supported together with a shared prefix"):
        shared("cpu", lengths, prefix, *data, softcap=2.0)
    for options in ({"window": 4}, {"softcap": 2.0}):
        ours = shared("auto", lengths, prefix, *data, **options)
        for a, b in zip(ours, separate(lengths, prefix, *data, **options), strict=True):
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
    out = varlen_attention(*leaves, offsets(lengths).cuda(), max(lengths), prefix=prefix, backend="torch")
    ours = [x.cpu() for x in (out.detach(), *torch.autograd.grad(out, leaves, on_gpu[3]))]
    assert_as_accurate_as_torch(
        ours,
        separate(lengths, prefix, *(x.double() for x in data)),
        separate(lengths, prefix, *data),
        torch.bfloat16,
    )
