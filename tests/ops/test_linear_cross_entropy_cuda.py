"""The CUDA kernel without a GPU: its arithmetic and its slices of a row, compiled for the host.

On a GPU the kernel is also covered by the tests of every backend, as `cuda`.
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
OPTIONS = {  # softcap, z_loss, smoothing
    "plain": (0.0, 0.0, 0.0),
    "softcap": (5.0, 0.0, 0.0),
    "z-loss": (0.0, 1e-2, 0.0),
    "smoothing": (0.0, 0.0, 0.1),
    "all": (8.0, 1e-3, 0.1),
}


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler is installed")
    library = tmp_path_factory.mktemp("row_math") / "row_math.so"
    flags = ["-std=c++17", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"]
    subprocess.run(
        [compiler, *flags, str(Path(__file__).parent / "programs" / "row_math_host.cpp"), "-o", library], check=True
    )
    loaded = ctypes.CDLL(str(library))
    floats = [ctypes.c_float] * 4
    pointers = [ctypes.c_void_p] * 2
    loaded.row_on_host.argtypes = [
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        *floats,
        ctypes.c_int,
        ctypes.c_int,
        *pointers,
    ]
    loaded.slice_on_host.argtypes = [ctypes.c_uint64, ctypes.c_int64, *[ctypes.c_int] * 3, ctypes.c_void_p]
    loaded.slice_size_on_host.argtypes = [ctypes.c_int64, ctypes.c_int, ctypes.c_int]
    return loaded


def on_host(host, row, target, weight, options, *, parts=2, threads=32):
    """Loss, nll, argmax and gradient, computed on a copy of `row`."""
    loss_and_nll, argmax = torch.empty(2), torch.empty(1, dtype=torch.int32)
    unaligned = torch.empty(len(row) + 1)[1:].copy_(row)  # off by 4 bytes, so there are a head, vectors and a tail
    host.row_on_host(unaligned.data_ptr(), len(row), target, weight, *options, parts, threads,
                     loss_and_nll.data_ptr(), argmax.data_ptr())  # fmt: skip
    return loss_and_nll[0], loss_and_nll[1], int(argmax), unaligned


def in_float64(row, target, weight, options):
    softcap, z_loss, smoothing = options
    z = row.double().requires_grad_()
    x = softcap * torch.tanh(z / softcap) if softcap else z
    nll = F.cross_entropy(x, torch.tensor(target))
    loss = F.cross_entropy(x, torch.tensor(target), label_smoothing=smoothing) + z_loss * x.logsumexp(0) ** 2
    (gradient,) = torch.autograd.grad(weight * loss, z)
    return loss.detach(), nll.detach(), int(x.argmax()), gradient


@pytest.mark.parametrize("vocabulary", [1, 2, 7, 8, 103, 2311, 8195])
@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_row_matches_float64(host, name, parts, vocabulary):
    row, target = torch.randn(vocabulary) * 4, vocabulary // 3
    ours = on_host(host, row, target, 0.7, OPTIONS[name], parts=parts)
    exact = in_float64(row, target, 0.7, OPTIONS[name])
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(ours[1].double(), exact[1], rtol=2e-6, atol=2e-6)
    assert ours[2] == exact[2]
    torch.testing.assert_close(ours[3].double(), exact[3], rtol=1e-5, atol=1e-7)


def test_argmax_is_the_first_of_equal_logits_across_parts_and_threads(host):
    row = torch.zeros(1000)
    for first in (3, 499, 500, 997):
        row[first:] = 2.0
        assert on_host(host, row, 0, 1.0, OPTIONS["plain"], parts=4)[2] == first
        row[:] = 0


def test_masked_entries_and_a_confident_target(host):
    row = torch.full((300,), float("-inf"))
    row[280:] = torch.randn(20)
    loss, _, argmax, gradient = on_host(host, row, 290, 1.0, OPTIONS["plain"], parts=4)
    exact = in_float64(row, 290, 1.0, OPTIONS["plain"])
    torch.testing.assert_close(loss.double(), exact[0])
    assert argmax == exact[2]
    assert not gradient[:280].any()
    row = torch.zeros(100)
    row[7] = 10.0  # 1 - p is 0.0045; if p were rounded to bfloat16 first, it would be off by a quarter
    gradient = on_host(host, row, 7, 1.0, OPTIONS["plain"])[3]
    torch.testing.assert_close(gradient[7].double(), in_float64(row, 7, 1.0, OPTIONS["plain"])[3][7], rtol=1e-4, atol=0)


def test_a_target_outside_the_vocabulary_and_a_nan_make_the_loss_nan(host):
    row = torch.randn(50)
    assert on_host(host, row, 50, 1.0, OPTIONS["plain"])[0].isnan()
    assert on_host(host, row, -3, 1.0, OPTIONS["plain"])[0].isnan()
    row[31] = float("nan")
    assert on_host(host, row, 2, 1.0, OPTIONS["plain"])[0].isnan()


@pytest.mark.parametrize("vocabulary", [1, 7, 8, 63, 64, 65, 151_936, 151_937, 2**31 - 64])
@pytest.mark.parametrize("element_bytes", [2, 4])
def test_slices_cover_a_row_exactly_once_with_aligned_vectors(host, element_bytes, vocabulary):
    for offset in range(0, 16, element_bytes):
        for parts in (1, 2, 4):
            previous_end = 0
            for part in range(parts):
                out = torch.empty(5, dtype=torch.int32)
                base = 2**47 + 256 + offset
                host.slice_on_host(base, vocabulary, element_bytes, part, parts, out.data_ptr())
                begin, head_end, vectors, tail_begin, end = out.tolist()
                width = 16 // element_bytes
                assert begin == previous_end
                assert begin <= head_end <= tail_begin <= end
                assert tail_begin == head_end + vectors * width
                assert vectors == 0 or (base + head_end * element_bytes) % 16 == 0
                assert head_end - begin < width
                assert end - tail_begin < width or vectors == 0
                assert end - begin <= host.slice_size_on_host(vocabulary, element_bytes, parts)
                previous_end = end
            assert previous_end == vocabulary


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is available")
def test_the_error_says_why_the_backend_cannot_run():
    inputs = (torch.randn(3, 4), torch.randn(9, 4), torch.arange(3))
    message = r"cuda: the tensors are on cpu, and no CUDA device is available\); these backends can: .*reference"
    with pytest.raises(BackendUnavailable, match=message):
        linear_cross_entropy(*inputs, backend="cuda")


def test_a_missing_or_damaged_library_is_reported(tmp_path):
    library = tmp_path / "libdelib_fast_cuda.so"
    assert "libdelib_fast_cuda.so is not built" in _cuda._load(library)
    library.write_text("not a library")
    assert "cannot be loaded" in _cuda._load(library)


def test_the_ctypes_signature_matches_the_launcher():
    source = (ROOT / "csrc/linear_cross_entropy/softmax_gradient.cu").read_text()
    arguments = source.split("int delib_fast_softmax_gradient(")[1].split(")")[0].split(",")
    kinds = {"int": "int", "float": "float", "std::int64_t": "int64"}
    declared = ["pointer" if "*" in argument else kinds[argument.split()[-2]] for argument in arguments]
    names = {_cuda._POINTER: "pointer", _cuda._INT64: "int64", _cuda._FLOAT: "float", _cuda._INT: "int"}
    assert [names[kind] for kind in _cuda.ARGUMENT_TYPES] == declared


def test_the_library_loads_without_a_device_and_rejects_invalid_arguments():
    library = _cuda._LIBRARY
    if isinstance(library, str):
        pytest.skip(library)

    def launch(rows: int, vocabulary: int, dtype: int, row_stride: int) -> str:
        null = [None] * 6
        error = library.delib_fast_softmax_gradient(
            None, dtype, rows, vocabulary, row_stride, *null, -100, 0.0, 0.0, 0.0, 1, None
        )
        return library.delib_fast_cuda_error(error).decode()

    assert launch(0, 10, 1, 16) == "no error"
    for invalid in ((-1, 10, 1, 10), (1, 0, 1, 0), (1, 2**31, 1, 2**31), (1, 10, 7, 10), (1, 10, 1, 9)):
        assert launch(*invalid) == "invalid argument", invalid


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("vocabulary", [151_936, 151_937, 40_000, 400_003])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_large_vocabularies_on_the_device(vocabulary, dtype):
    """One, two and four blocks per row, rows that do not fit into shared memory, and unaligned rows."""
    hidden = torch.randn(9, 64, device="cuda").to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, 64, device="cuda") / 4).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (9,), device="cuda")
    if reason := _cuda.why_not(hidden, weight):
        pytest.skip(reason)
    outputs = [linear_cross_entropy(hidden, weight, targets, backend=b) for b in ("cuda", "triton")]
    torch.testing.assert_close(outputs[0].nll, outputs[1].nll, rtol=1e-5, atol=1e-5)
    ours, theirs = (torch.autograd.grad(o.loss_sum, (hidden, weight)) for o in outputs)
    torch.testing.assert_close(ours, theirs)
