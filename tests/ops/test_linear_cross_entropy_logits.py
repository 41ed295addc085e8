"""A bias and a scale of the logits: every backend compared with float64."""

import pytest
import torch
import torch.nn.functional as F
from loss_cases import DEVICE, Case, assert_no_worse, gradients, make_case, skip_if_unavailable, supervised
from torch import Tensor

from delib_fast.ops import FusedLossHead, linear_cross_entropy

OPTIONS = [
    pytest.param(True, 1.0, id="bias"),
    pytest.param(False, 0.3, id="scale"),
    pytest.param(True, -2.5, id="both"),
]


def eager(case: Case, bias: Tensor | None, scale: float) -> tuple[Tensor, ...]:
    """nll and all gradients, as in an ordinary trainer: logits in the dtype of the inputs, then a float32 loss."""
    rows = supervised(case)
    logits = (F.linear(case.hidden[rows], case.weight, bias) * scale).to(torch.promote_types(bias.dtype, torch.float32))
    nll = F.cross_entropy(logits, case.targets[rows], reduction="none")
    leaves = [t for t in (case.hidden, case.weight, bias) if t.requires_grad]
    return nll.detach(), *torch.autograd.grad((nll * case.loss_weights[rows]).sum(), leaves)


def make_bias(dtype: torch.dtype, with_bias: bool) -> Tensor:
    """A random bias, or zeros without a gradient for the eager loss without a bias."""
    bias = torch.randn(103, device=DEVICE).to(dtype)
    return bias.requires_grad_() if with_bias else torch.zeros_like(bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("with_bias", "scale"), OPTIONS)
def test_matches_float64(backend, with_bias, scale, dtype):
    if dtype == torch.float64 and backend in ("triton", "cuda"):
        pytest.skip(f"the {backend} backend does not support float64")
    case, bias = make_case(dtype=dtype), make_bias(dtype, with_bias)
    ours_bias = bias if with_bias else None
    output = linear_cross_entropy(*case, bias=ours_bias, logit_scale=scale, chunk_tokens=16, backend=backend)
    leaves = [t for t in (case.hidden, case.weight, ours_bias) if t is not None]
    ours = (output.nll[supervised(case)], *gradients(output, *leaves))
    exact_bias = bias.detach().double().requires_grad_(with_bias)
    exact, theirs = eager(case.to(torch.float64), exact_bias, scale), eager(case, bias, scale)
    names = ("nll", "grad_hidden", "grad_weight", "grad_bias")[: len(ours)]
    for name, *three in zip(names, ours, theirs, exact, strict=True):
        assert_no_worse(*three, name)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradcheck(backend):
    skip_if_unavailable(backend)
    case = make_case(7, 5, 11, torch.float64, device="cpu")
    bias = torch.randn(11, dtype=torch.float64, requires_grad=True)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rest = (case.targets, case.loss_weights)
        return linear_cross_entropy(hidden, weight, *rest, bias=bias, logit_scale=1.7, backend=backend).loss_sum

    assert torch.autograd.gradcheck(loss, (case.hidden, case.weight, bias))


def test_nan_in_unsupervised_row_does_not_leak(backend):
    case, bias = make_case(), make_bias(torch.float32, True)
    unsupervised = torch.ones(37, dtype=torch.bool, device=DEVICE).index_fill(0, supervised(case), False)
    with torch.no_grad():
        case.hidden[unsupervised] = float("nan")
    output = linear_cross_entropy(*case, bias=bias, logit_scale=0.5, backend=backend)
    assert output.loss_sum.isfinite()
    grad_weight, grad_bias = gradients(output, case.weight, bias)
    assert grad_weight.isfinite().all()
    assert grad_bias.isfinite().all()


def test_all_masked(backend):
    case, bias = make_case(), make_bias(torch.float32, True)
    targets = torch.full_like(case.targets, -100)
    output = linear_cross_entropy(*case[:2], targets, bias=bias, logit_scale=3.0, backend=backend)
    assert output.loss_sum.item() == 0
    assert not any(gradient.any() for gradient in gradients(output, case.hidden, case.weight, bias))


def test_compile_fullgraph(backend):
    case, bias = make_case(), make_bias(torch.float32, True)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rest = (case.targets, case.loss_weights)
        return linear_cross_entropy(hidden, weight, *rest, bias=bias, logit_scale=0.5, backend=backend).loss_sum

    leaves = (case.hidden, case.weight, bias)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(torch.autograd.grad(compiled, leaves), torch.autograd.grad(loss(*leaves), leaves))


def test_head_with_a_bias_and_a_scale(backend):
    linear, case = torch.nn.Linear(24, 103, device=DEVICE), make_case()
    head = FusedLossHead.from_linear(linear, logit_scale=0.25, backend=backend)
    output = head(case.hidden, *case[2:])
    rows = supervised(case)
    logits = linear(case.hidden)[rows] * 0.25
    torch.testing.assert_close(output.nll[rows], F.cross_entropy(logits, case.targets[rows], reduction="none"))
    output.loss_sum.backward()
    assert linear.bias.grad.abs().sum() > 0


def test_without_a_bias_and_a_scale_nothing_is_copied(monkeypatch):
    case = make_case()
    monkeypatch.setattr(torch, "cat", None)  # a bias is appended with torch.cat
    linear_cross_entropy(*case, logit_scale=1.0)


def test_invalid_bias_or_scale_raises():
    case = make_case()
    for bias, message in (
        (torch.zeros(5, device=DEVICE), r"bias must be \(103,\), one entry per row of weight; got \(5,\)"),
        (torch.zeros(103, device=DEVICE).double(), "bias is torch.float64 and weight torch.float32; cast one of them"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(*case, bias=bias)
    with pytest.raises(ValueError, match="logit_scale=nan; it must be a finite number, 1 for none"):
        linear_cross_entropy(*case, logit_scale=float("nan"))
