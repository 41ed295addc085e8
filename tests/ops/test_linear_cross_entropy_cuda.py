"""The CUDA kernel without a GPU: its arithmetic and its cutting of rows, compiled for the host, against float64.

On a GPU the tests of every backend run it as `cuda`; here is what can be said without one, and what only it has.
"""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from delib_fast.ops import BackendUnavailable, linear_cross_entropy
from delib_fast.ops.linear_cross_entropy import _cuda

ROOT = Path(__file__).parents[2]
OPTIONS = {  # scale, softcap, z_loss, smoothing
    "plain": (1.0, 0.0, 0.0, 0.0),
    "scale": (0.25, 0.0, 0.0, 0.0),
    "softcap": (1.0, 5.0, 0.0, 0.0),
    "z-loss": (1.0, 0.0, 1e-2, 0.0),
    "smoothing": (1.0, 0.0, 0.0, 0.1),
    "all": (0.5, 8.0, 1e-3, 0.1),
}


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("row_math") / "row_math.so"
    flags = ["-std=c++17", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"]
    subprocess.run([compiler, *flags, str(Path(__file__).with_name("row_math_host.cpp")), "-o", library], check=True)
    loaded = ctypes.CDLL(str(library))
    floats = [ctypes.c_float] * 5
    pointers = [ctypes.c_void_p] * 2
    loaded.row_on_host.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, *floats,
                                   ctypes.c_int, ctypes.c_int, *pointers]  # fmt: skip
    loaded.slice_on_host.argtypes = [ctypes.c_uint64, ctypes.c_int64, *[ctypes.c_int] * 3, ctypes.c_void_p]
    loaded.slice_size_on_host.argtypes = [ctypes.c_int64, ctypes.c_int, ctypes.c_int]
    return loaded


def on_host(host, row, target, weight, options, *, bias=None, parts=2, threads=32):
    """loss, nll, argmax and, over a copy of `row`, the gradient."""
    gradient, two, argmax = row.clone(), torch.empty(2), torch.empty(1, dtype=torch.int32)
    offset = torch.empty(len(row) + 1)[1:].copy_(gradient)  # 4 bytes off: a head, vectors and a tail
    bias_at = None if bias is None else bias.data_ptr()
    host.row_on_host(offset.data_ptr(), len(row), bias_at, target, weight, *options, parts, threads,
                     two.data_ptr(), argmax.data_ptr())  # fmt: skip
    return two[0], two[1], int(argmax), offset


def exactly(row, target, weight, options, bias=None):
    scale, softcap, z_loss, smoothing = options
    z = row.double().requires_grad_()
    x = (z if bias is None else z + bias.double()) * scale
    x = softcap * torch.tanh(x / softcap) if softcap else x
    nll = F.cross_entropy(x, torch.tensor(target))
    loss = F.cross_entropy(x, torch.tensor(target), label_smoothing=smoothing) + z_loss * x.logsumexp(0) ** 2
    (gradient,) = torch.autograd.grad(weight * loss, z)
    return loss.detach(), nll.detach(), int(x.argmax()), gradient


@pytest.mark.parametrize("vocabulary", [1, 2, 7, 8, 103, 2311, 8195])
@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_row_matches_float64(host, name, parts, vocabulary):
    row, target = torch.randn(vocabulary) * 4, vocabulary // 3
    bias = torch.randn(vocabulary) if name == "all" else None
    ours = on_host(host, row, target, 0.7, OPTIONS[name], bias=bias, parts=parts)
    exact = exactly(row, target, 0.7, OPTIONS[name], bias)
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(ours[1].double(), exact[1], rtol=2e-6, atol=2e-6)
    assert ours[2] == exact[2]
    torch.testing.assert_close(ours[3].double(), exact[3], rtol=1e-5, atol=1e-7)


def test_the_first_of_equals_across_parts_and_threads(host):
    row = torch.zeros(1000)
    for first in (3, 499, 500, 997):
        row[first:] = 2.0
        assert on_host(host, row, 0, 1.0, OPTIONS["plain"], parts=4)[2] == first
        row[:] = 0


def test_masked_out_entries_and_a_confident_target(host):
    row = torch.full((300,), float("-inf"))
    row[280:] = torch.randn(20)
    loss, _, argmax, gradient = on_host(host, row, 290, 1.0, OPTIONS["plain"], parts=4)
    exact = exactly(row, 290, 1.0, OPTIONS["plain"])
    torch.testing.assert_close(loss.double(), exact[0])
    assert argmax == exact[2]
    assert not gradient[:280].any()
    row = torch.zeros(100)
    row[7] = 10.0  # 1 - p is 0.0045: rounded to bfloat16 first it would be off by a quarter
    gradient = on_host(host, row, 7, 1.0, OPTIONS["plain"])[3]
    torch.testing.assert_close(gradient[7].double(), exactly(row, 7, 1.0, OPTIONS["plain"])[3][7], rtol=1e-4, atol=0)


def test_an_unknown_target_and_a_nan_are_never_a_loss(host):
    row = torch.randn(50)
    assert on_host(host, row, 50, 1.0, OPTIONS["plain"])[0].isnan()
    assert on_host(host, row, -3, 1.0, OPTIONS["plain"])[0].isnan()
    row[31] = float("nan")
    assert on_host(host, row, 2, 1.0, OPTIONS["plain"])[0].isnan()


@pytest.mark.parametrize("vocabulary", [1, 7, 8, 63, 64, 65, 151_936, 151_937, 2**31 - 64])
@pytest.mark.parametrize("element_bytes", [2, 4])
def test_slices_cover_a_row_once_and_vectors_are_aligned(host, element_bytes, vocabulary):
    for offset in range(0, 16, element_bytes):
        for parts in (1, 2, 4):
            end_before = 0
            for part in range(parts):
                out = torch.empty(5, dtype=torch.int32)
                base = 2**47 + 256 + offset
                host.slice_on_host(base, vocabulary, element_bytes, part, parts, out.data_ptr())
                begin, head_end, vectors, tail_begin, end = out.tolist()
                width = 16 // element_bytes
                assert begin == end_before
                assert begin <= head_end <= tail_begin <= end
                assert tail_begin == head_end + vectors * width
                assert vectors == 0 or (base + head_end * element_bytes) % 16 == 0
                assert head_end - begin < width
                assert end - tail_begin < width or vectors == 0
                assert end - begin <= host.slice_size_on_host(vocabulary, element_bytes, parts)
                end_before = end
            assert end_before == vocabulary


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_says_why_it_cannot_run():
    inputs = (torch.randn(3, 4), torch.randn(9, 4), torch.arange(3))
    message = r"cuda: the tensors are on cpu; there is no CUDA device\); these inputs can run on .*reference"
    with pytest.raises(BackendUnavailable, match=message):
        linear_cross_entropy(*inputs, backend="cuda")


def test_says_that_the_library_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setattr(_cuda, "LIBRARY_PATH", tmp_path / "libdelib_fast_cuda.so")
    assert "libdelib_fast_cuda.so is not built" in _cuda._library.__wrapped__()
    (tmp_path / "libdelib_fast_cuda.so").write_text("no library")
    assert "does not load" in _cuda._library.__wrapped__()


def test_the_ctypes_signature_is_that_of_the_launcher():
    source = (ROOT / "csrc/linear_cross_entropy/softmax_gradient.cu").read_text()
    arguments = source.split("int delib_fast_softmax_gradient(")[1].split(")")[0].split(",")
    kinds = {"int": "int", "float": "float", "std::int64_t": "int64"}
    theirs = ["pointer" if "*" in argument else kinds[argument.split()[-2]] for argument in arguments]
    names = {_cuda._POINTER: "pointer", _cuda._INT64: "int64", _cuda._FLOAT: "float", _cuda._INT: "int"}
    assert [names[kind] for kind in _cuda.ARGUMENT_TYPES] == theirs


def test_the_library_loads_and_refuses_without_a_device():
    library = _cuda._library()
    if isinstance(library, str):
        pytest.skip(library)

    def launch(rows: int, vocabulary: int, dtype: int) -> str:
        nothing = [None] * 7
        error = library.delib_fast_softmax_gradient(
            None, dtype, rows, vocabulary, *nothing, -100, 1.0, 0.0, 0.0, 0.0, 1, None
        )
        return library.delib_fast_cuda_error(error).decode()

    assert launch(0, 10, 1) == "no error"
    assert launch(-1, 10, 1) == launch(1, 0, 1) == launch(1, 2**31, 1) == launch(1, 10, 7) == "invalid argument"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("vocabulary", [151_936, 151_937, 40_000, 400_003])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_large_vocabularies_on_the_device(vocabulary, dtype):
    """One, two and four blocks a row, rows that do not fit them, rows that are not aligned."""
    hidden = torch.randn(9, 64, device="cuda").to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, 64, device="cuda") / 4).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (9,), device="cuda")
    if reason := _cuda.why_not(hidden, weight):
        pytest.skip(reason)
    outputs = [linear_cross_entropy(hidden, weight, targets, backend=b) for b in ("cuda", "triton")]
    torch.testing.assert_close(outputs[0].nll, outputs[1].nll, rtol=1e-5, atol=1e-5)
    ours, theirs = (torch.autograd.grad(o.loss_sum, (hidden, weight)) for o in outputs)
    torch.testing.assert_close(ours, theirs)
