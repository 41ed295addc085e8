"""linear_kl_divergence: extreme logits, both CPU paths, skipped GEMMs, memory.

T packed tokens, H and Ht hidden sizes of student and teacher, V vocabulary, L live rows.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from divergence_cases import (
    DIRECTIONS,
    FUSED,
    NAMES,
    OPTIONS,
    RESULTS,
    Case,
    backend_fixture,
    divergence,
    eager,
    gradients,
    live,
    make_case,
    results,
    skip_if_unavailable,
)
from loss_cases import DEVICE, assert_no_worse, sample_if_interpreted
from op_costs import gemm_flops, peak_extra_mib

from delib_fast.ops import linear_kl_divergence
from delib_fast.ops._cpu_head import BFLOAT16_GEMMS
from delib_fast.ops.linear_kl_divergence._call import DivergenceResults

ROOT = Path(__file__).parents[2]
backend, fused = backend_fixture(NAMES), backend_fixture(FUSED)


# --- values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_extreme_logits(backend, direction):
    case = make_case()
    big = case._replace(hidden=(case.hidden.detach() * 300).requires_grad_(), teacher_hidden=case.teacher_hidden * 300)
    ours = results(big, backend, direction=direction)
    theirs, exact = eager(big, direction=direction), eager(big.to(torch.float64), direction=direction)
    for name, *three in zip(RESULTS, ours, theirs, exact, strict=True):
        assert_no_worse(*three, name)


def masked(case: Case, student: slice, teacher: slice) -> Case:
    """Mask vocabulary entries of both models: the last column of hidden is 1, and that of their weights is -inf."""

    def with_column(hidden: torch.Tensor, weight: torch.Tensor, entries: slice) -> tuple[torch.Tensor, torch.Tensor]:
        column = torch.zeros(weight.shape[0], 1, device=DEVICE)
        column[entries] = float("-inf")
        return torch.cat([hidden.detach(), torch.ones_like(hidden[:, :1])], 1), torch.cat([weight.detach(), column], 1)

    hidden, weight = with_column(case.hidden, case.weight, student)
    teacher = with_column(case.teacher_hidden, case.teacher_weight, teacher)
    return case._replace(hidden=hidden, weight=weight, teacher_hidden=teacher[0], teacher_weight=teacher[1])


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_an_entry_that_both_models_mask_adds_nothing(backend, direction):
    case = make_case()
    kept = case._replace(
        weight=case.weight[90:].detach(), teacher_weight=case.teacher_weight[90:], targets=case.targets % 13
    )
    expected = divergence(kept, backend, direction=direction)
    case = masked(case._replace(targets=90 + case.targets % 13), slice(90), slice(90))
    output = divergence(case, backend, direction=direction)
    torch.testing.assert_close(output[:3], expected[:3])


@pytest.mark.parametrize(
    ("direction", "finite"), [("forward", "teacher"), ("reverse", "student"), ("jsd", "teacher"), ("jsd", "student")]
)
def test_an_entry_that_one_model_masks(backend, direction, finite, full):
    sample_if_interpreted(backend, full, finite == "teacher")
    # KL(q || p) is finite if the teacher masks more than the student, KL(p || q) if the student does.
    case = make_case(dead=0.0)
    few, more = slice(20), slice(40)
    case = masked(case, more if finite == "student" else few, more if finite == "teacher" else few)
    case.hidden.requires_grad_()
    output = divergence(case, backend, direction=direction)
    assert output.divergence.isfinite().all()
    assert (output.divergence > 0).all()
    if direction == "jsd":
        return
    other = {"forward": "reverse", "reverse": "forward"}[direction]
    assert divergence(case, backend, direction=other).divergence.isinf().all()


def test_the_gradient_of_a_confident_target_is_not_lost_to_cancellation(fused):
    # p(target) = 1 - 1e-5 in both models: the divergence adds nothing, and if p were rounded to bfloat16 before 1 is
    # subtracted, the gradient of the nll would be exactly 0.
    weight = torch.zeros(100, 8, dtype=torch.bfloat16, device=DEVICE)
    weight[7, 0] = 16.0
    hidden = torch.zeros(5, 8, dtype=torch.bfloat16, device=DEVICE)
    hidden[:, 0] = 1.0
    targets = torch.full((5,), 7, device=DEVICE)
    case = Case(hidden.clone().requires_grad_(), weight.clone().requires_grad_(), hidden, weight,
                torch.ones(5, device=DEVICE), targets)  # fmt: skip
    exact = eager(case.to(torch.float64), nll_weight=1.0)
    output = divergence(case, fused, nll_weight=1.0)
    for ours, true in zip(gradients(output, *case.leaves), exact[-2:], strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=0.02, atol=1e-9)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_small_divergence_is_accurate(fused, direction):
    # A divergence of 1e-5: the difference of two log-sum-exps of magnitude 10 would be off by a tenth of it.
    case = make_case(T=9, V=2311, Ht=24, dead=0)
    teacher = case.hidden.detach() + 1e-3 * torch.randn(9, 24, device=DEVICE)
    case = case._replace(teacher_hidden=teacher, teacher_weight=case.weight.detach())
    exact = eager(case.to(torch.float64), direction=direction)[1]
    assert 1e-6 < exact.mean() < 1e-4
    ours = divergence(case, fused, direction=direction).divergence
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=1e-6)


# --- gradients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, 1 / 3])
def test_upstream_gradient_and_retain_graph(backend, scale):
    case = make_case()
    once = gradients(divergence(case, backend), *case.leaves)
    output = divergence(case, backend)
    for keywords in ({"retain_graph": True}, {}):
        for ours, unit in zip(gradients(output, *case.leaves, scale=scale, **keywords), once, strict=True):
            torch.testing.assert_close(ours, unit * scale)


def test_only_the_loss_is_differentiable_and_only_once(fused):
    case = make_case()
    output = divergence(case, fused)
    assert [t.requires_grad for t in output] == [True, False, False, False]
    with pytest.raises(RuntimeError, match="linear_kl_divergence: its gradients are computed in the forward pass"):
        gradients(output, case.hidden, create_graph=True)
    with torch.no_grad():
        assert not divergence(case, fused).loss_sum.requires_grad


# --- both CPU paths in bfloat16 -----------------------------------------------------------------------------------


def run_cpu(case: Case, gemm: str, positions=None, keep_dz=False, needs=(True, True), chunk_tokens=32, **options):
    """Call the op itself, so that both paths are tested on every processor."""
    skip_if_unavailable("cpu")
    names = ("direction", "beta", "temperature", "softcap", "teacher_softcap")
    nll_weight, softcap = options.pop("nll_weight", 0.0), options.get("softcap") or 0.0
    teacher_softcap = options.pop("teacher_softcap", softcap) or 0.0
    rest = {"beta": 0.5, "temperature": 1.0, "softcap": 0.0} | options | {"teacher_softcap": teacher_softcap}
    weights = (case.loss_weights, nll_weight * case.loss_weights)
    op = torch.ops.delib_fast.linear_kl_divergence_cpu
    rest = {name: rest[name] for name in names}
    arguments = (*case[:4], case.targets, *weights, positions, -100, chunk_tokens, *needs)
    return DivergenceResults(*op(*arguments, **rest, keep_dz=keep_dz, gemm=gemm))


@pytest.mark.parametrize(("T", "V"), [(37, 1103), (130, 1103), (37, 5), (5, 2311)])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("gemm", ["widened", "bfloat16"])
@pytest.mark.parametrize("options", OPTIONS)
def test_both_cpu_paths_in_bfloat16(gemm, frozen, T, V, options):
    # With a frozen weight the path with bfloat16 GEMMs stores logits by token if a chunk has at least H / 2 tokens.
    H = 39 if T > 5 else 65
    case = make_case(T, H, V, torch.bfloat16, Ht=24, device="cpu")
    ours = run_cpu(case, gemm, needs=(True, not frozen), **options)
    exact, theirs = eager(case.to(torch.float64), **options), eager(case, **options)
    assert ours.grad_weight.dtype == torch.float32
    assert ours.grad_weight.numel() == (0 if frozen else V * H)
    rows = live(case)
    mine = (ours.loss_sum, *(losses[rows] for losses in ours[1:4]), ours.grad_hidden, ours.grad_weight)
    for name, *three in list(zip(RESULTS, mine, theirs, exact, strict=True))[: 5 if frozen else 6]:
        assert_no_worse(*three, name)
    without = run_cpu(case, gemm, needs=(False, not frozen), **options)
    assert all(a.equal(b) for a, b in zip(without[:4], ours[:4], strict=True))


@pytest.mark.parametrize("who", ["hidden", "teacher_hidden"])
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf")])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_value_that_is_not_finite_stays_in_its_row(direction, value, who):
    # By token, maxima are found in the bits of the logits, in which a NaN is larger or smaller than every number.
    case = make_case(5, 8, 70, torch.bfloat16, Ht=8, dead=0.0, device="cpu")
    broken = getattr(case, who).detach().clone()
    broken[2, 1] = value
    case = case._replace(**{who: broken})
    output = run_cpu(case, "bfloat16", needs=(True, False), nll_weight=0.5, direction=direction)
    assert output.divergence.isnan().tolist() == [False, False, True, False, False]
    assert output.loss_sum.isnan()
    assert output.grad_hidden[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("T", "H", "V", "chunk_tokens"), [(37, 24, 103, 0), (130, 65, 1103, 32), (1, 8, 5, 0)])
def test_the_kept_factors_give_the_accumulated_gradient(T, H, V, chunk_tokens, shared):
    case = make_case(T, H, V, torch.bfloat16, Ht=H, dead=0.0 if T == 1 else 0.3, device="cpu")
    case = case._replace(teacher_weight=case.weight.detach()) if shared else case
    positions = torch.arange(T)[:-1] if T > 1 else torch.arange(1)
    kept, summed = (
        run_cpu(case, "bfloat16", positions, keep, chunk_tokens=chunk_tokens, direction="reverse")
        for keep in (True, False)
    )
    assert kept.grad_weight.numel() == summed.dz.numel() == 0
    assert all(a.equal(b) for a, b in zip(kept[:5], summed[:5], strict=True))
    ours = torch.ops.delib_fast.weight_gradient(kept.dz, kept.rows, torch.tensor(1.0))
    exact = summed.grad_weight.double()
    torch.testing.assert_close(ours.double(), exact, rtol=0.51 * torch.finfo(torch.bfloat16).eps,
                               atol=1e-5 * exact.abs().max().item())  # fmt: skip


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_few_listed_rows_in_bfloat16(backend, direction):
    """The student's logits are in the dz that is kept, with other strides than those of the teacher."""
    skip_if_unavailable(backend)
    case = make_case(dtype=torch.bfloat16)
    output = divergence(case, backend, direction=direction, loss_positions=live(case))
    theirs, exact = (eager(c, direction=direction) for c in (case, case.to(torch.float64)))
    for name, *three in zip(RESULTS[-2:], gradients(output, *case.leaves), theirs[-2:], exact[-2:], strict=True):
        assert_no_worse(*three, name)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_padding_of_a_chunk_contributes_nothing_if_a_weight_is_infinite(direction):
    # The 37 rows are padded with rows of zeros. Their logits for the masked vocabulary entry are 0 · -inf = NaN.
    case = make_case(37, 24, 103, torch.bfloat16, Ht=24, dead=0.0, device="cpu")
    hidden, weight = case.hidden.detach().abs(), case.weight.detach()
    weight[5] = -torch.inf
    case = case._replace(hidden=hidden, weight=weight, teacher_hidden=hidden.flip(0), teacher_weight=weight,
                         targets=torch.full((37,), -100))  # fmt: skip
    output = run_cpu(case, "bfloat16", needs=(False, True), chunk_tokens=0, direction=direction)
    assert output.loss_sum.isfinite()
    assert (output.grad_weight[5] == 0).all()
    assert output.grad_weight.isfinite().all()


# --- cost ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize(("trains", "gemms"), [((True, True), 3), ((True, False), 2), ((False, True), 2),
                                               ((False, False), 1)], ids=str)  # fmt: skip
def test_dead_rows_and_frozen_parts_skip_their_gemms(backend, trains, gemms):
    skip_if_unavailable(backend)
    T, dead = 96, 32  # 64 live rows: whole chunks, so that the teacher's rows are not padded
    case = make_case(T, 24, 103, Ht=16, dead=0.0, device="cpu")
    case.loss_weights[torch.randperm(T)[:dead]] = 0
    leaves = [t.detach().requires_grad_(train) for t, train in zip(case.leaves, trains, strict=True)]
    case = case._replace(hidden=leaves[0], weight=leaves[1])

    def step() -> None:
        output = linear_kl_divergence(*case[:5], chunk_tokens=32, backend=backend)
        if leaves := [t for t in case.leaves if t.requires_grad]:
            gradients(output, *leaves)

    assert gemm_flops(step) == 2 * 64 * 103 * (gemms * 24 + 16)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_memory_is_a_chunk(dtype):
    """With the vocabulary of Qwen and a shared frozen head, peak memory is 450 MiB: the chunk of both models' logits.

    All logits of both would be 870 MiB in bfloat16 and 1739 in float32.
    """
    skip_if_unavailable("cpu")
    if dtype == torch.bfloat16 and not BFLOAT16_GEMMS:
        pytest.skip("this processor has no bfloat16 GEMMs, so the path with bfloat16 logits is not used")
    T, H, V = 1500, 64, 151_936
    torch.use_deterministic_algorithms(False)  # filling memory with NaN would make it resident
    hidden, teacher_hidden = (torch.empty(T, H, dtype=dtype).normal_().requires_grad_(r) for r in (True, False))
    weight = torch.empty(V, H, dtype=dtype).normal_()

    def step(rows: int) -> None:
        output = linear_kl_divergence(hidden[:rows], weight, teacher_hidden[:rows], weight, backend="cpu")
        gradients(output, hidden)

    step(2)  # one-time allocations
    assert peak_extra_mib(lambda: step(T)) <= 450


@pytest.mark.slow
@pytest.mark.parametrize(
    "block", [pytest.param([], marks=pytest.mark.full, id="as launched"), pytest.param(["128"], id="small")]
)
def test_the_triton_kernel_compiles_without_a_gpu(tmp_path, block):
    # The interpreter accepts code that the compiler rejects, and its offsets are Python ints, which cannot overflow.
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / "ops" / "programs" / "compile_divergence.py"), *block]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
