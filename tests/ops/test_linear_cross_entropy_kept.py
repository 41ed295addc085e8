"""Few supervised rows in bfloat16: the op keeps the gradient of the logits, from which the backward pass computes dW.

T packed tokens, H hidden size, V vocabulary, L listed rows, K padded rows.
"""

import pytest
import torch
from loss_cases import (
    DEVICE,
    Case,
    assert_no_worse,
    eager,
    gradients,
    make_case,
    sample_if_interpreted,
    skip_if_unavailable,
    supervised,
)
from torch import Tensor

from delib_fast.ops import linear_cross_entropy
from delib_fast.ops._gradient_in_forward import _weight_gradient
from delib_fast.ops.linear_cross_entropy._call import LossResults
from delib_fast.ops.linear_cross_entropy._cpu import BFLOAT16_GEMMS

# (T, H, V, chunk_tokens): odd and even L, sizes that are not multiples of the tile of 64, chunks that are not multiples
# of a vector, and more tokens than one product of a tile takes
SHAPES = [(37, 24, 103, 0), (130, 65, 1103, 32), (130, 64, 1103, 20), (1500, 16, 130, 0), (1, 8, 5, 0)]


def run(fused: str, case: Case, positions: Tensor, chunk_tokens: int = 0, *, keep_dz: bool, needs=(True, True)):
    """Call the op itself, so that the CPU path with bfloat16 GEMMs is tested on every processor."""
    extra = {"gemm": "bfloat16"} if fused == "cpu" else {}
    op = getattr(torch.ops.delib_fast, f"linear_cross_entropy_{fused}")
    return LossResults(*op(*case, positions, -100, chunk_tokens, *needs, keep_dz=keep_dz, **extra))


def listed(case: Case) -> Tensor:
    """The supervised rows and three others."""
    others = [t for t in range(case.targets.shape[0]) if t not in set(supervised(case).tolist())]
    return torch.cat([supervised(case), torch.tensor(others[:3], dtype=torch.int64, device=DEVICE)]).sort().values


@pytest.mark.parametrize(("T", "H", "V", "chunk_tokens"), SHAPES)
@pytest.mark.parametrize("scale", [1.0, 1 / 3])
def test_the_product_of_the_factors_equals_the_accumulated_gradient(fused, T, H, V, chunk_tokens, scale, full):
    sample_if_interpreted(fused, full, T < 1500)
    case = make_case(T, H, V, torch.bfloat16)
    positions, upstream = listed(case), torch.tensor(scale, device=DEVICE)
    kept, summed = (run(fused, case, positions, chunk_tokens, keep_dz=keep) for keep in (True, False))
    assert kept.grad_weight.numel() == summed.dz.numel() == summed.rows.numel() == 0
    assert all(a.equal(b) for a, b in zip(kept[:4], summed[:4], strict=True))
    ours = torch.ops.delib_fast.weight_gradient(kept.dz, kept.rows, upstream)
    exact = summed.grad_weight.double() * upstream
    assert ours.dtype == torch.bfloat16
    # On a GPU the rows are scaled and rounded; on a CPU the float32 sum is rounded once.
    roundings = 0.51 if fused == "cpu" else 2
    torch.testing.assert_close(ours.double(), exact, rtol=roundings * torch.finfo(torch.bfloat16).eps,
                               atol=1e-5 * exact.abs().max().item() if fused == "cpu" else 0.02)  # fmt: skip


@pytest.mark.parametrize(("T", "H", "V", "chunk_tokens"), SHAPES)
def test_no_worse_than_eager(fused, T, H, V, chunk_tokens, full):
    sample_if_interpreted(fused, full, T < 1500)
    case = make_case(T, H, V, torch.bfloat16)
    kept = run(fused, case, listed(case), chunk_tokens, keep_dz=True)
    (nll, grad_hidden, exact), theirs = eager(case.to(torch.float64)), eager(case)
    assert_no_worse(kept.nll, theirs[0], nll, "nll")
    assert_no_worse(kept.grad_hidden, theirs[1], grad_hidden, "grad_hidden")
    third = torch.tensor(1 / 3, device=DEVICE)
    for product in (torch.ops.delib_fast.weight_gradient, _weight_gradient):  # the second one runs on a GPU
        assert_no_worse(product(kept.dz, kept.rows, third), theirs[2] / 3, exact / 3, "grad_weight")


def saved_shapes(case: Case, backend: str, **options) -> set[tuple[int, ...]]:
    shapes: set[tuple[int, ...]] = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.add(tuple(t.shape)) or t, lambda t: t):
        linear_cross_entropy(*case, backend=backend, **options)
    return shapes


def test_dz_is_kept_if_it_is_smaller(fused):
    if fused == "cpu" and not BFLOAT16_GEMMS:
        pytest.skip("this processor has no bfloat16 GEMMs, so dz is not kept")
    case, dW = make_case(T=20, H=8, V=103, dtype=torch.bfloat16, unsupervised=0), (103, 8)
    rows = torch.arange(20, device=DEVICE)
    assert dW not in saved_shapes(
        case, fused, loss_positions=rows[:16]
    )  # 16 · 103 · 2 bytes for dz, 103 · 8 · 4 for dW
    assert dW in saved_shapes(case, fused, loss_positions=rows[:17])
    assert dW in saved_shapes(case, fused)  # the number of rows is unknown on the host
    for dtype in (torch.float16, torch.float32):
        assert dW in saved_shapes(case.to(dtype), fused, loss_positions=rows[:16])


@pytest.mark.parametrize("scale", [1.0, 1 / 3])
def test_a_second_backward_gives_the_same_gradients(backend, scale):
    case = make_case(T=37, H=24, V=103, dtype=torch.bfloat16)
    output = linear_cross_entropy(*case, loss_positions=supervised(case), backend=backend)
    first = gradients(output, case.hidden, case.weight, scale=scale, retain_graph=True)
    second = gradients(output, case.hidden, case.weight, scale=scale)
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))
    for name, *three in zip(("grad_hidden", "grad_weight"), first, eager(case)[1:], eager(case.to(torch.float64))[1:],
                            strict=True):  # fmt: skip
        assert_no_worse(three[0], three[1] * scale, three[2] * scale, name)


def test_nan_in_a_listed_unsupervised_row_does_not_leak(fused):
    case = make_case(T=37, H=24, V=103, dtype=torch.bfloat16)
    positions, clean = listed(case), run(fused, case, listed(case), keep_dz=True)
    assert len(positions) > len(supervised(case))
    poisoned = case.hidden.detach().clone()
    poisoned[~torch.isin(torch.arange(37, device=DEVICE), supervised(case))] = torch.nan
    kept = run(fused, case._replace(hidden=poisoned), positions, keep_dz=True)
    one = torch.tensor(1.0, device=DEVICE)
    grads = [torch.ops.delib_fast.weight_gradient(r.dz, r.rows, one) for r in (clean, kept)]
    assert grads[0].equal(grads[1])
    assert grads[0].isfinite().all()


def test_no_listed_row_is_supervised(fused):
    case = make_case(T=9, H=24, V=103, dtype=torch.bfloat16)
    no_rows = torch.empty(0, dtype=torch.int64, device=DEVICE)
    masked = case._replace(targets=torch.full_like(case.targets, -100))
    for one, positions in ((case, no_rows), (masked, torch.arange(9, device=DEVICE))):
        output = linear_cross_entropy(*one, loss_positions=positions, backend=fused)
        assert output.loss_sum == 0
        assert all((g == 0).all() for g in gradients(output, one.hidden, one.weight))


@pytest.mark.parametrize("needs", [(True, True), (False, True)], ids=str)
def test_opcheck(fused, needs):
    case = make_case(13, 8, 29, torch.bfloat16)
    hidden, weight = (t.detach().requires_grad_(need) for t, need in zip(case[:2], needs, strict=True))
    op = getattr(torch.ops.delib_fast, f"linear_cross_entropy_{fused}").default
    extra = {"gemm": "bfloat16"} if fused == "cpu" else {}
    arguments = (hidden, weight, *case[2:], supervised(case), -100, 0, *needs, 0.0, 0.0, 0.0, True)
    torch.library.opcheck(op, arguments, extra)
    kept = run(fused, case, supervised(case), keep_dz=True)
    scale = torch.tensor(0.5, device=DEVICE)
    torch.library.opcheck(torch.ops.delib_fast.weight_gradient.default, (kept.dz, kept.rows, scale))


def test_compile_fullgraph(fused):
    case = make_case(T=37, H=24, V=103, dtype=torch.bfloat16)
    positions = supervised(case)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, *case[2:], loss_positions=positions, backend=fused).loss_sum / 3

    ours = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*case[:2]), case[:2])
    for compiled, plain in zip(ours, torch.autograd.grad(loss(*case[:2]), case[:2]), strict=True):
        assert compiled.equal(plain)


@pytest.mark.parametrize("layout", ["rows", "columns", "sliced", "odd"])
def test_weight_gradient_with_any_layout(layout):
    dz, rows = torch.randn(70, 32, dtype=torch.bfloat16, device=DEVICE), torch.randn(32, 24, device=DEVICE).bfloat16()
    layouts = {"rows": dz, "columns": dz.T.contiguous().T, "sliced": torch.cat([dz, dz], 1)[:, :32], "odd": dz[:, :31]}
    dz = layouts[layout]
    rows = rows[: dz.shape[1]]
    ours = torch.ops.delib_fast.weight_gradient(dz, rows, torch.tensor(0.5, device=DEVICE))
    exact = dz.double() @ rows.double() * 0.5
    torch.testing.assert_close(ours.double(), exact, rtol=0.51 * torch.finfo(torch.bfloat16).eps, atol=1e-5)


def test_keep_dz_with_other_arguments_raises():
    skip_if_unavailable("cpu")
    case = make_case(T=9, H=24, V=103, dtype=torch.bfloat16, device="cpu")
    op, rest = torch.ops.delib_fast.linear_cross_entropy_cpu, (-100, 0, True, True)
    for positions, extra in ((None, {"gemm": "bfloat16"}), (supervised(case), {"gemm": "widened"})):
        with pytest.raises(ValueError, match="keep_dz needs need_grad_weight, loss_positions and gemm=bfloat16"):
            op(*case, positions, *rest, keep_dz=True, **extra)
    with pytest.raises(ValueError, match="gemm=bfloat16 for Float"):
        op(*case.to(torch.float32), None, *rest, gemm="bfloat16")
