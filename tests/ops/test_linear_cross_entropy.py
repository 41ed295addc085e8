"""linear_cross_entropy: every backend compared with float64.

T packed tokens, H hidden size, V vocabulary. Sizes are not multiples of the tile size of any kernel.
"""

import pytest
import torch
from loss_cases import DEVICE, assert_no_worse, eager, gradients, make_case, skip_if_unavailable, supervised
from torch import Tensor

from delib_fast.ops import BackendUnavailable, linear_cross_entropy
from delib_fast.ops.linear_cross_entropy._call import LossCall

SHAPES = [  # T, H, V, chunk_tokens
    pytest.param(37, 24, 103, None, id="one-chunk"),
    pytest.param(131, 24, 103, 16, id="several-chunks-smaller-last"),
    pytest.param(1, 8, 17, None, id="one-row"),
    pytest.param(19, 7, 2, 5, id="odd-hidden-two-classes"),
    pytest.param(23, 65, 2311, 7, id="several-vocabulary-blocks"),
    pytest.param(9, 16, 8195, None, id="several-triton-blocks"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("T", "H", "V", "chunk_tokens"), SHAPES)
def test_matches_reference(backend, T, H, V, chunk_tokens, dtype):
    if backend in ("triton", "cuda") and dtype == torch.float64:
        pytest.skip(f"the {backend} backend does not support float64")
    case = make_case(T, H, V, dtype, unsupervised=0 if T == 1 else 0.3)
    output = linear_cross_entropy(*case, chunk_tokens=chunk_tokens, backend=backend)
    exact, theirs = eager(case.to(torch.float64)), eager(case)
    ours = (output.nll, *gradients(output, case.hidden, case.weight))
    for name, *three in zip(("nll", "grad_hidden", "grad_weight"), ours, theirs, exact, strict=True):
        assert_no_worse(*three, name)
    assert ours[1].dtype == ours[2].dtype == dtype
    wide = torch.promote_types(dtype, torch.float32)
    assert output.loss_sum.dtype == output.nll.dtype == wide
    torch.testing.assert_close(output.loss_sum, (output.nll * case.loss_weights).sum())
    unsupervised = torch.ones(T, dtype=torch.bool, device=DEVICE).index_fill(0, supervised(case), False)
    assert not output.nll[unsupervised].any()
    assert not ours[1][unsupervised].any()


def test_correct_is_the_argmax_of_supervised_rows(backend):
    case = make_case(T=61)
    logits = case.hidden @ case.weight.T
    targets = torch.where(torch.arange(61, device=DEVICE) % 2 == 0, logits.argmax(1), case.targets)
    output = linear_cross_entropy(case.hidden, case.weight, targets, case.loss_weights, backend=backend)
    rows = (targets != -100) & (case.loss_weights != 0)
    assert output.correct.equal(rows & (logits.argmax(1) == targets))
    assert output.correct.any()


def test_the_first_of_equal_logits_is_the_argmax(backend):
    weight = torch.ones(50, 4, device=DEVICE)
    targets = torch.tensor([0, 1, 49], device=DEVICE)
    output = linear_cross_entropy(torch.ones(3, 4, device=DEVICE), weight, targets, backend=backend)
    assert output.correct.tolist() == [True, False, False]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("chunk_tokens", [None, 3])
def test_gradcheck(backend, chunk_tokens):
    skip_if_unavailable(backend)
    case = make_case(7, 5, 11, torch.float64, device="cpu")

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        arguments = (hidden, weight, case.targets, case.loss_weights)
        return linear_cross_entropy(*arguments, chunk_tokens=chunk_tokens, backend=backend).loss_sum

    assert torch.autograd.gradcheck(loss, (case.hidden, case.weight))


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_opcheck(fused, needs):
    case = make_case(13, 8, 29)
    hidden, weight = (t.detach().requires_grad_(need) for t, need in zip(case[:2], needs, strict=True))
    op = getattr(torch.ops.delib_fast, f"linear_cross_entropy_{fused}").default
    torch.library.opcheck(op, (hidden, weight, case.targets, case.loss_weights, None, -100, 8, *needs))
    torch.library.opcheck(op, (hidden, weight, case.targets.abs() % 29, None, supervised(case), -100, 0, *needs))


def test_loss_call_matches_the_schema(fused):
    arguments = getattr(torch.ops.delib_fast, f"linear_cross_entropy_{fused}").default._schema.arguments
    assert [argument.name for argument in arguments][: len(LossCall._fields)] == list(LossCall._fields)


@pytest.mark.parametrize("how", ["targets", "weights", "positions"])
def test_all_masked(backend, how):
    hidden, weight, targets, loss_weights = make_case()
    positions = torch.empty(0, dtype=torch.int64, device=DEVICE) if how == "positions" else None
    if how == "targets":
        targets = torch.full_like(targets, -100)
    elif how == "weights":
        loss_weights = torch.zeros_like(loss_weights)
    output = linear_cross_entropy(hidden, weight, targets, loss_weights, loss_positions=positions, backend=backend)
    assert output.loss_sum.item() == 0
    assert not output.nll.any()
    assert not output.correct.any()
    for gradient in gradients(output, hidden, weight):
        assert not gradient.any()


def test_nan_in_unsupervised_row_does_not_leak(backend):
    case = make_case()
    unsupervised = torch.ones(37, dtype=torch.bool, device=DEVICE).index_fill(0, supervised(case), False)
    poisoned = case.hidden.detach().clone().requires_grad_()
    with torch.no_grad():
        poisoned[unsupervised] = float("nan")
    clean = linear_cross_entropy(*case, backend=backend)
    output = linear_cross_entropy(poisoned, *case[1:], backend=backend)
    assert output.nll.equal(clean.nll)
    for ours, theirs in zip(
        gradients(output, poisoned, case.weight), gradients(clean, case.hidden, case.weight), strict=True
    ):
        assert ours.equal(theirs)
    # also if loss_positions lists the unsupervised rows
    everything = torch.arange(37, device=DEVICE)
    output = linear_cross_entropy(poisoned, *case[1:], loss_positions=everything, backend=backend)
    assert all(g.isfinite().all() for g in (output.nll, *gradients(output, poisoned, case.weight)))


def test_non_contiguous(backend):
    case = make_case()
    expected = linear_cross_entropy(*case, backend=backend)
    wide = torch.zeros(37, 48, device=DEVICE)
    wide[:, ::2] = case.hidden.detach()
    hidden = wide[:, ::2].requires_grad_()
    weight = case.weight.detach().T.contiguous().T.requires_grad_()
    rest = (torch.stack([t, t], 1)[:, 0] for t in (case.targets, case.loss_weights))
    output = linear_cross_entropy(hidden, weight, *rest, backend=backend)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(gradients(output, hidden, weight), gradients(expected, case.hidden, case.weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deterministic(backend, dtype):
    case = make_case(37, 65, 2311, dtype)
    first, second = (linear_cross_entropy(*case, chunk_tokens=16, backend=backend) for _ in range(2))
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))
    for a, b in zip(*(gradients(o, case.hidden, case.weight) for o in (first, second)), strict=True):
        assert a.equal(b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compile_fullgraph(backend, dtype):
    case = make_case(dtype=dtype)

    def step(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        output = linear_cross_entropy(hidden * 2, weight, case.targets, case.loss_weights, backend=backend)
        return output.loss_sum / 3, output.nll

    loss, nll = torch.compile(step, fullgraph=True, backend="aot_eager")(case.hidden, case.weight)
    expected_loss, expected_nll = step(case.hidden, case.weight)
    torch.testing.assert_close((loss, nll), (expected_loss, expected_nll))
    leaves = (case.hidden, case.weight)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected_loss, leaves))


@pytest.mark.slow
def test_compile_inductor(fused):
    case = make_case(dtype=torch.bfloat16)
    positions = supervised(case)

    @torch.compile(fullgraph=True)
    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        rest = (case.targets, case.loss_weights)
        output = linear_cross_entropy(hidden, weight, *rest, loss_positions=positions, backend=fused)
        return output.loss_sum * 0.25

    expected = linear_cross_entropy(*case, backend=fused)
    ours = torch.autograd.grad(loss(case.hidden, case.weight), (case.hidden, case.weight))
    torch.testing.assert_close(ours, gradients(expected, case.hidden, case.weight, scale=0.25))


def test_invalid_arguments_raise():
    hidden, weight, targets, loss_weights = make_case()
    good = {"hidden": hidden, "weight": weight, "targets": targets, "loss_weights": loss_weights}

    def message(**changed) -> str:
        with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole message is compared
            linear_cross_entropy(**{**good, **changed})
        return str(error.value)

    assert message(hidden=hidden[None]) == (
        "linear_cross_entropy: hidden must be (T, H) and weight (V, H), got (1, 37, 24) and (103, 24); "
        "flatten batch and sequence first: hidden.flatten(0, 1)"
    )
    assert message(weight=weight.bfloat16()) == (
        "linear_cross_entropy: hidden is torch.float32 and weight torch.bfloat16; "
        "both must have the same floating-point dtype"
    )
    assert message(targets=targets.int()) == (
        "linear_cross_entropy: targets must be (37,) torch.int64, one entry per row of hidden; got (37,) torch.int32"
    )
    assert message(loss_weights=loss_weights[1:]) == (
        "linear_cross_entropy: loss_weights must be (37,) floating point, one entry per row of hidden; "
        "got (36,) torch.float32"
    )
    assert message(loss_weights=loss_weights.clone().requires_grad_()) == (
        "linear_cross_entropy: loss_weights requires a gradient, which is not supported; detach it"
    )
    assert message(loss_positions=targets.float()) == (
        "linear_cross_entropy: loss_positions must be (L,) torch.int64, got (37,) torch.float32"
    )
    assert message(chunk_tokens=0) == (
        "linear_cross_entropy: chunk_tokens=0; it must be at least 1, or None for the default"
    )
    assert message(backend="cuda9") == (
        "linear_cross_entropy: backend='cuda9' does not exist; choose from auto, cpu, cuda, triton, reference"
    )


def test_an_unavailable_backend_raises():
    case = make_case(dtype=torch.float64)
    with pytest.raises(BackendUnavailable, match=r"triton: torch\.float64 is not supported\); these backends can: "):
        linear_cross_entropy(*case, backend="triton")


def test_a_target_outside_the_vocabulary_raises_or_makes_the_loss_nan(fused):
    case = make_case()
    position = int(supervised(case)[3])
    case.targets[position] = 103
    if fused == "cpu":
        with pytest.raises(ValueError, match=rf"targets\[{position}\] is 103, which is outside the vocabulary of 103"):
            linear_cross_entropy(*case, backend=fused)
    else:  # a GPU backend does not synchronise to check targets
        assert linear_cross_entropy(*case, backend=fused).loss_sum.isnan()


@pytest.mark.parametrize("H", [24, 65])
@pytest.mark.parametrize("T", [37, 130])
@pytest.mark.parametrize("gemm", ["widened", "bfloat16"])
def test_both_cpu_paths_in_bfloat16(gemm, T, H):
    # `cpu` selects one of the two paths for the processor, so each is called explicitly.
    skip_if_unavailable("cpu")
    case = make_case(T, H, 1103, torch.bfloat16, device="cpu")
    op = torch.ops.delib_fast.linear_cross_entropy_cpu
    loss, nll, correct, *grads = op(*case, None, -100, 32, True, True, gemm=gemm)[:5]
    exact, theirs = eager(case.to(torch.float64)), eager(case)
    torch.testing.assert_close(loss, (nll * case.loss_weights).sum())
    assert grads[1].dtype == torch.float32
    for name, *three in zip(("nll", "grad_hidden", "grad_weight"), (nll, *grads), theirs, exact, strict=True):
        assert_no_worse(*three, name)
    assert correct.sum() <= len(supervised(case))


@pytest.mark.parametrize("keep_dz", [False, True])
def test_padding_of_a_chunk_contributes_nothing_if_a_weight_is_infinite(keep_dz):
    # The 37 rows are padded with rows of zeros. Their logits for the masked vocabulary entry are 0 · -inf = NaN.
    skip_if_unavailable("cpu")
    case = make_case(37, 24, 103, torch.bfloat16, unsupervised=0, device="cpu")
    hidden, weight = case.hidden.detach().abs(), case.weight.detach()
    weight[5] = -torch.inf
    targets = torch.where(case.targets == 5, 6, case.targets)
    exact = torch.autograd.functional.jacobian(
        lambda w: linear_cross_entropy(hidden, w, targets, backend="reference").loss_sum, weight
    )
    *_, grad_weight, dz, rows = torch.ops.delib_fast.linear_cross_entropy_cpu(
        hidden, weight, targets, None, torch.arange(37), -100, 0, False, True, keep_dz=keep_dz, gemm="bfloat16"
    )
    ours = torch.ops.delib_fast.weight_gradient(dz, rows, torch.tensor(1.0)) if keep_dz else grad_weight
    assert (ours[5] == 0).all()
    torch.testing.assert_close(ours.double(), exact.double(), atol=0.1, rtol=0.05)


def test_weight_gradient_does_not_round_between_chunks(fused):
    # With many chunks, a bfloat16 accumulator would be several times less accurate than with one chunk.
    case = make_case(T=96, H=32, V=61, dtype=torch.bfloat16)
    exact = eager(case.to(torch.float64))[2]
    errors = []
    for chunk_tokens in (4, 96):
        output = linear_cross_entropy(*case, chunk_tokens=chunk_tokens, backend=fused)
        errors.append((gradients(output, case.weight)[0].double() - exact).norm())
    assert errors[0] <= 1.05 * errors[1]
