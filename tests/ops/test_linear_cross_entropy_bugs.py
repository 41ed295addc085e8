"""Bugs that other fused losses have had, tested in linear_cross_entropy."""

import pytest
import torch
import torch.nn.functional as F
from loss_cases import DEVICE, Case, assert_no_worse, eager, gradients, make_case, supervised

from delib_fast.ops import linear_cross_entropy


@pytest.mark.parametrize("scale", [0.0, 0.37, -3.0])
def test_upstream_gradient_scales_the_gradients(backend, scale):
    case = make_case()
    once = gradients(linear_cross_entropy(*case, backend=backend), case.hidden, case.weight)
    output = linear_cross_entropy(*case, backend=backend)
    for ours, unit in zip(gradients(output, case.hidden, case.weight, scale=scale), once, strict=True):
        torch.testing.assert_close(ours, unit * scale)


def test_an_upstream_gradient_is_not_rounded_to_the_gradients_dtype(fused):
    # 1/3 is off by 0.2 % in bfloat16; the product must be computed in float32 and rounded once.
    case = make_case(dtype=torch.bfloat16)
    output = linear_cross_entropy(*case, backend=fused)
    third = gradients(output, case.hidden, case.weight, scale=1 / 3, retain_graph=True)
    unit = gradients(output, case.hidden, case.weight)
    assert third[0].equal((unit[0].double() * (torch.tensor(1.0) / 3).double()).to(torch.bfloat16))


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_scale_gradient_rounds_once(saved, dtype):
    gradient = torch.randn(33, 70, device=DEVICE).to(saved)
    scale = torch.rand((), device=DEVICE)
    exact = gradient.double() * scale.double()
    ours = torch.ops.delib_fast.scale_gradient(gradient, scale, dtype)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), exact, rtol=0.51 * torch.finfo(dtype).eps + 1e-7, atol=1e-7)
    assert torch.ops.delib_fast.scale_gradient(torch.full((3,), torch.nan), scale, dtype).isnan().all()


def test_retain_graph(backend):
    case = make_case()
    output = linear_cross_entropy(*case, backend=backend)
    first = gradients(output, case.hidden, case.weight, scale=0.5, retain_graph=True)
    second = gradients(output, case.hidden, case.weight, scale=0.5)
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("frozen", ["head", "trunk"])
def test_frozen_part_gets_no_gradient_and_changes_nothing(backend, frozen):
    case = make_case()
    both = gradients(linear_cross_entropy(*case, backend=backend), case.hidden, case.weight)
    hidden = case.hidden.detach() if frozen == "trunk" else case.hidden
    weight = case.weight.detach() if frozen == "head" else case.weight
    output = linear_cross_entropy(hidden, weight, *case[2:], backend=backend)
    if frozen == "head":
        torch.testing.assert_close(gradients(output, hidden)[0], both[0])
    else:
        torch.testing.assert_close(gradients(output, weight)[0], both[1])


def test_a_gradient_that_is_not_needed_is_not_computed(fused):
    case = make_case()
    op = getattr(torch.ops.delib_fast, f"linear_cross_entropy_{fused}")
    for needs in ((True, False), (False, True), (False, False)):
        grad_hidden, grad_weight = op(*case, None, -100, 0, *needs)[3:5]
        assert (grad_hidden.numel() > 0, grad_weight.numel() > 0) == needs
    with torch.no_grad():
        assert not linear_cross_entropy(*case, backend=fused).loss_sum.requires_grad


def test_only_the_loss_is_differentiable(backend):
    output = linear_cross_entropy(*make_case(), backend=backend)
    assert output.loss_sum.requires_grad
    assert not output.nll.requires_grad
    assert not output.correct.requires_grad


def test_uneven_accumulation_equals_one_batch(backend):
    case = make_case(T=60)
    whole = gradients(linear_cross_entropy(*case, backend=backend), case.weight)[0]
    parts = torch.zeros_like(whole)
    for part in (slice(0, 3), slice(3, 41), slice(41, 60)):
        output = linear_cross_entropy(
            case.hidden[part], case.weight, case.targets[part], case.loss_weights[part], backend=backend
        )
        parts += gradients(output, case.weight)[0]
    torch.testing.assert_close(parts, whole)


def test_minus_infinity_logits(backend):
    # Masked vocabulary entries: the last column of hidden is 1, and that of their weights is -inf.
    case = make_case(H=8)
    hidden = torch.cat([case.hidden.detach(), torch.ones(37, 1, device=DEVICE)], 1)
    weight = torch.cat([case.weight.detach(), torch.zeros(103, 1, device=DEVICE)], 1)
    weight[:90, -1] = float("-inf")
    targets = torch.where(case.targets == -100, -100, 90 + case.targets.abs() % 13)
    output = linear_cross_entropy(hidden, weight, targets, case.loss_weights, backend=backend)
    rows = supervised(case)
    logits = (hidden @ weight.T)[rows]
    torch.testing.assert_close(output.nll[rows], F.cross_entropy(logits, targets[rows], reduction="none"))


def test_extreme_logits(backend):
    case = make_case()
    big = Case((case.hidden.detach() * 300).requires_grad_(), *case[1:])
    output = linear_cross_entropy(*big, backend=backend)
    exact = eager(big.to(torch.float64))
    ours = (output.nll, *gradients(output, big.hidden, big.weight))
    for name, *three in zip(("nll", "grad_hidden", "grad_weight"), ours, eager(big), exact, strict=True):
        assert_no_worse(*three, name)


def test_gradient_of_a_confident_target_is_not_lost_to_cancellation(fused):
    # p(target) = 1 - 1e-5: if p were rounded to bfloat16 first, p - 1 would be exactly 0.
    weight = torch.zeros(100, 8, dtype=torch.bfloat16, device=DEVICE)
    weight[7, 0] = 16.0
    hidden = torch.zeros(5, 8, dtype=torch.bfloat16, device=DEVICE)
    hidden[:, 0] = 1.0
    case = Case(
        hidden.requires_grad_(),
        weight.requires_grad_(),
        torch.full((5,), 7, device=DEVICE),
        torch.ones(5, device=DEVICE),
    )
    exact = eager(case.to(torch.float64))
    output = linear_cross_entropy(*case, backend=fused)
    for ours, true in zip(gradients(output, case.hidden, case.weight), exact[1:], strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=0.02, atol=1e-9)


def test_negative_weights_count(backend):
    # Negative weights occur as advantages, for example.
    case = make_case()
    negative = linear_cross_entropy(*case[:3], -case.loss_weights, backend=backend)
    positive = linear_cross_entropy(*case, backend=backend)
    torch.testing.assert_close(negative.loss_sum, -positive.loss_sum)
    torch.testing.assert_close(gradients(negative, case.weight)[0], -gradients(positive, case.weight)[0])


def test_loss_positions_equal_the_mask(backend):
    case = make_case(T=131)
    masked = linear_cross_entropy(*case, backend=backend)
    listed = linear_cross_entropy(*case, loss_positions=supervised(case), backend=backend)
    torch.testing.assert_close(listed, masked)
    leaves = (case.hidden, case.weight)
    torch.testing.assert_close(gradients(listed, *leaves), gradients(masked, *leaves))


def test_rows_that_are_not_listed_are_not_supervised(backend):
    case = make_case(T=40, unsupervised=0.0)
    positions = torch.arange(10, 20, device=DEVICE)
    output = linear_cross_entropy(*case, loss_positions=positions, backend=backend)
    assert output.nll.nonzero().squeeze(1).equal(positions)
    assert gradients(output, case.hidden)[0].any(1).nonzero().squeeze(1).equal(positions)


def test_custom_ignore_index(backend):
    case = make_case()
    targets = torch.where(case.targets == -100, 5, case.targets)
    ours = linear_cross_entropy(*case[:2], targets, case.loss_weights, ignore_index=5, backend=backend)
    assert not ours.nll[targets == 5].any()


def test_nan_in_a_supervised_row_reaches_the_loss(backend):
    case = make_case()
    row = int(supervised(case)[2])
    with torch.no_grad():
        case.hidden[row, 3] = float("nan")
    output = linear_cross_entropy(*case, backend=backend)
    assert output.loss_sum.isnan()
    assert output.nll.isnan().nonzero().flatten().tolist() == [row]


def test_one_supervised_row_among_many(backend):
    case = make_case(T=130, unsupervised=0.0)
    targets = torch.full_like(case.targets, -100)
    targets[77] = 5
    output = linear_cross_entropy(*case[:2], targets, backend=backend)
    logits = case.hidden[77] @ case.weight.T
    torch.testing.assert_close(output.loss_sum, F.cross_entropy(logits, targets[77]))
    assert gradients(output, case.hidden)[0].any(1).nonzero().flatten().tolist() == [77]


def test_second_derivatives_raise(fused):
    case = make_case()
    output = linear_cross_entropy(*case, backend=fused)
    with pytest.raises(RuntimeError, match="cannot be differentiated again; remove create_graph=True, or use backend="):
        gradients(output, case.hidden, create_graph=True)


def test_float16_under_a_loss_scale(fused):
    # Probabilities over a large vocabulary are subnormal in float16, and the loss scale is applied after rounding.
    case = make_case(T=48, H=16, V=8195, dtype=torch.float16)
    case = Case((case.hidden.detach() / 8).requires_grad_(), *case[1:])
    exact, theirs = eager(case.to(torch.float64)), eager(case)
    scale = 2.0**10
    output = linear_cross_entropy(*case, backend=fused)
    ours = [gradient.float() / scale for gradient in gradients(output, case.hidden, case.weight, scale=scale)]
    for name, *three in zip(("grad_hidden", "grad_weight"), ours, theirs[1:], exact[1:], strict=True):
        assert_no_worse(*three, name)
