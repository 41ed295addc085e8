"""The cost and the limits of the loss: skipped GEMMs, memory, offsets past 2^31."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loss_cases import Case, gradients, make_case, skip_if_unavailable, supervised
from op_costs import gemm_flops, peak_extra_mib

from delib_fast.ops import linear_cross_entropy
from delib_fast.ops.linear_cross_entropy._cpu import BFLOAT16_GEMMS

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MIB = 1024 * 1024


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize(("trains", "gemms"), [((True, True), 3), ((True, False), 2), ((False, True), 2),
                                               ((False, False), 1)], ids=str)  # fmt: skip
def test_a_frozen_head_or_trunk_skips_its_gemm(backend, trains, gemms):
    # The unneeded gradient is not computed at all, and nothing is computed for unsupervised rows.
    skip_if_unavailable(backend)
    case = make_case(T=96, H=24, V=103, device="cpu")
    case = Case(*(t.detach().requires_grad_(train) for t, train in zip(case[:2], trains, strict=True)), *case[2:])

    def step() -> None:
        output = linear_cross_entropy(*case, chunk_tokens=32, backend=backend)
        if leaves := [t for t in case[:2] if t.requires_grad]:
            gradients(output, *leaves)

    assert gemm_flops(step) == gemms * 2 * len(supervised(case)) * 24 * 103


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "listed"), [(torch.bfloat16, 0), (torch.bfloat16, 300), (torch.float32, 0)], ids=str)
def test_memory_is_the_weight_gradient_and_a_chunk(dtype, listed):
    """With the vocabulary of Qwen, peak memory is one float32 weight gradient and 400 MiB.

    With few listed rows it is the gradients of the logits and of the weight, both bfloat16.
    """
    skip_if_unavailable("cpu")
    if listed and not BFLOAT16_GEMMS:
        pytest.skip("this processor has no bfloat16 GEMMs, so dz is not kept")
    T, H, V = 1500, 896, 151_936  # all logits: 435 MiB in bfloat16, 870 in float32; the float32 gradient: 519
    torch.use_deterministic_algorithms(False)  # filling memory with NaN would make it resident
    hidden = torch.empty(T, H, dtype=dtype).normal_().requires_grad_()
    weight = torch.empty(V, H, dtype=dtype).normal_().requires_grad_()
    targets = torch.randint(V, (T,))
    gradients(linear_cross_entropy(hidden[:2], weight, targets[:2], backend="cpu"), hidden)  # one-time allocations
    positions = torch.arange(listed) if listed else None

    def step() -> None:
        output = linear_cross_entropy(hidden, weight, targets, loss_positions=positions, backend="cpu")
        gradients(output, hidden, weight)

    extra = peak_extra_mib(step)
    assert extra <= (V * H * 2 + V * listed * 2) / MIB + 50 if listed else extra <= V * H * 4 / MIB + 400


def test_rows_of_logits_past_2_to_the_31(tmp_path):
    # For example the logits (V, C) of a chunk of 2,500 tokens with a vocabulary of a million.
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs Linux and a C++ compiler")
    library = tmp_path / "row_kernels.so"
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"]
    subprocess.run([compiler, *flags, str(HERE / "programs" / "row_kernels_host.cpp"), "-o", library], check=True)
    out = torch.empty(4, 16)
    if ctypes.CDLL(str(library)).far_apart_rows(ctypes.c_void_p(out.data_ptr())):
        pytest.skip("4 GiB of address space cannot be reserved")
    e = torch.tensor(-1.0).exp().item()
    expected = torch.tensor([1 + e, 1.0, e, 1.0])[:, None].expand(4, 16)
    torch.testing.assert_close(out, expected, rtol=4e-3, atol=0)  # e^-1 is stored as bfloat16
