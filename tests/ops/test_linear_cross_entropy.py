"""linear_cross_entropy, every backend against float64.

T packed tokens, H hidden size, V vocabulary. Sizes are odd on purpose: off the tiles of every kernel.
"""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from delib_fast.ops import BackendUnavailable, FusedLossHead, LossOutput, linear_cross_entropy
from delib_fast.ops._library import WHY_NO_COMPILED
from delib_fast.ops.linear_cross_entropy import BACKENDS

NAMES = [backend.name for backend in BACKENDS]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Case(NamedTuple):
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    loss_weights: Tensor

    def to(self, dtype: torch.dtype) -> "Case":
        hidden, weight = (t.detach().to(dtype).requires_grad_(t.requires_grad) for t in self[:2])
        return Case(hidden, weight, self.targets, self.loss_weights)


def make_case(T=37, H=24, V=103, dtype=torch.float32, dead=0.3, device=DEVICE) -> Case:
    hidden = torch.randn(T, H, device=device).to(dtype).requires_grad_()
    weight = torch.randn(V, H, device=device).to(dtype).requires_grad_()
    targets = torch.randint(V, (T,), device=device)
    targets[torch.rand(T, device=device) < dead / 2] = -100
    loss_weights = 0.1 + torch.rand(T, device=device)
    loss_weights[torch.rand(T, device=device) < dead / 2] = 0
    return Case(hidden, weight, targets, loss_weights)


def supervised(case: Case) -> Tensor:
    return ((case.targets != -100) & (case.loss_weights != 0)).nonzero().squeeze(1)


def gradients(output: LossOutput, *leaves: Tensor, scale: float = 1.0, **keywords) -> tuple[Tensor, ...]:
    return torch.autograd.grad(output.loss_sum * scale, leaves, **keywords)


def eager(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """What a trainer does without us: logits in the inputs' dtype, then a float32 loss; nll and both gradients."""
    rows = supervised(case)
    wide = torch.promote_types(case.hidden.dtype, torch.float32)
    logits = F.linear(case.hidden[rows], case.weight).to(wide)
    nll = F.cross_entropy(logits, case.targets[rows], reduction="none")
    grads = torch.autograd.grad((nll * case.loss_weights[rows]).sum(), (case.hidden, case.weight))
    return torch.zeros_like(case.loss_weights, dtype=wide).index_copy(0, rows, nll.detach()), *grads


def skip_if_unavailable(backend: str) -> None:
    if backend == "cpu" and DEVICE != "cpu":
        pytest.skip("the cpu backend takes CPU tensors")
    if backend == "cpu" and WHY_NO_COMPILED:
        pytest.skip(WHY_NO_COMPILED)


@pytest.fixture(params=NAMES)
def backend(request) -> str:
    skip_if_unavailable(request.param)
    return request.param


@pytest.fixture(params=[name for name in NAMES if name != "reference"])
def fused(request) -> str:
    skip_if_unavailable(request.param)
    return request.param


def assert_no_worse(ours: Tensor, theirs: Tensor, exact: Tensor, name: str, factor: float = 2.0) -> None:
    """max|ours - float64| <= factor * max|torch - float64| + a few ulps of the largest value."""
    assert ours.isfinite().all(), name
    error, yardstick = ((t.double() - exact).abs().max().item() for t in (ours, theirs))
    ulps = 64 if ours.dtype == torch.float64 else 4  # float64 itself is no better than its summation order
    floor = ulps * torch.finfo(ours.dtype).eps * exact.abs().max().item()
    assert error <= factor * yardstick + floor, f"{name}: error {error:.3g}, torch's {yardstick:.3g}"


SHAPES = [  # T, H, V, chunk_tokens; what it is there to catch
    pytest.param(37, 24, 103, None, id="one-chunk"),
    pytest.param(131, 24, 103, 16, id="chunks-and-a-ragged-last"),
    pytest.param(1, 8, 17, None, id="one-row"),
    pytest.param(19, 7, 2, 5, id="odd-hidden-two-classes"),
    pytest.param(23, 65, 2311, 7, id="past-one-block-of-vocabulary"),
    pytest.param(9, 16, 8195, None, id="past-one-block-of-the-triton-kernel"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("T", "H", "V", "chunk_tokens"), SHAPES)
def test_matches_reference(backend, T, H, V, chunk_tokens, dtype):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the triton backend has no float64")
    case = make_case(T, H, V, dtype, dead=0 if T == 1 else 0.3)
    output = linear_cross_entropy(*case, chunk_tokens=chunk_tokens, backend=backend)
    exact, theirs = eager(case.to(torch.float64)), eager(case)
    ours = (output.nll, *gradients(output, case.hidden, case.weight))
    for name, *three in zip(("nll", "grad_hidden", "grad_weight"), ours, theirs, exact, strict=True):
        assert_no_worse(*three, name)
    assert ours[1].dtype == ours[2].dtype == dtype
    wide = torch.promote_types(dtype, torch.float32)
    assert output.loss_sum.dtype == output.nll.dtype == wide
    torch.testing.assert_close(output.loss_sum, (output.nll * case.loss_weights).sum())
    dead = torch.ones(T, dtype=torch.bool, device=DEVICE).index_fill(0, supervised(case), False)
    assert not output.nll[dead].any()
    assert not ours[1][dead].any()


def test_correct_is_the_argmax_of_supervised_rows(backend):
    case = make_case(T=61)
    logits = case.hidden @ case.weight.T
    targets = torch.where(torch.arange(61, device=DEVICE) % 2 == 0, logits.argmax(1), case.targets)
    output = linear_cross_entropy(case.hidden, case.weight, targets, case.loss_weights, backend=backend)
    live = (targets != -100) & (case.loss_weights != 0)
    assert output.correct.equal(live & (logits.argmax(1) == targets))
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


def test_nan_in_dead_row_does_not_leak(backend):
    case = make_case()
    dead = torch.ones(37, dtype=torch.bool, device=DEVICE).index_fill(0, supervised(case), False)
    poisoned = case.hidden.detach().clone().requires_grad_()
    with torch.no_grad():
        poisoned[dead] = float("nan")
    clean = linear_cross_entropy(*case, backend=backend)
    output = linear_cross_entropy(poisoned, *case[1:], backend=backend)
    assert output.nll.equal(clean.nll)
    for ours, theirs in zip(
        gradients(output, poisoned, case.weight), gradients(clean, case.hidden, case.weight), strict=True
    ):
        assert ours.equal(theirs)
    # nor where the caller lists a dead row as supervised
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


def test_refuses():
    hidden, weight, targets, loss_weights = make_case()
    good = {"hidden": hidden, "weight": weight, "targets": targets, "loss_weights": loss_weights}

    def refused(**changed) -> str:
        with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole message is compared
            linear_cross_entropy(**{**good, **changed})
        return str(error.value)

    assert refused(hidden=hidden[None]) == (
        "linear_cross_entropy: hidden must be (T, H) and weight (V, H), got (1, 37, 24) and (103, 24); "
        "flatten batch and sequence first: hidden.flatten(0, 1)"
    )
    assert refused(weight=weight.bfloat16()) == (
        "linear_cross_entropy: hidden is torch.float32 and weight torch.bfloat16; both must have one floating dtype"
    )
    assert refused(targets=targets.int()) == (
        "linear_cross_entropy: targets must be (37,) torch.int64, one entry a row of hidden; got (37,) torch.int32"
    )
    assert refused(loss_weights=loss_weights[1:]) == (
        "linear_cross_entropy: loss_weights must be (37,) floating, one entry a row of hidden; got (36,) torch.float32"
    )
    assert refused(loss_weights=loss_weights.clone().requires_grad_()) == (
        "linear_cross_entropy: loss_weights requires a gradient, which is not computed; detach it"
    )
    assert refused(loss_positions=targets.float()) == (
        "linear_cross_entropy: loss_positions must be (L,) torch.int64, got (37,) torch.float32"
    )
    assert refused(chunk_tokens=0) == (
        "linear_cross_entropy: chunk_tokens=0; it must be at least 1, or None for the default"
    )
    assert refused(backend="cuda9") == (
        "linear_cross_entropy: backend='cuda9' does not exist; choose from auto, cpu, triton, reference"
    )


def test_refuses_a_backend_that_cannot_run():
    case = make_case(dtype=torch.float64)
    with pytest.raises(BackendUnavailable, match=r"triton: it has no torch\.float64\); these inputs can run on"):
        linear_cross_entropy(*case, backend="triton")


def test_a_target_outside_the_vocabulary_is_never_a_loss(fused):
    case = make_case()
    position = int(supervised(case)[3])
    case.targets[position] = 103
    if fused == "cpu":
        with pytest.raises(ValueError, match=rf"targets\[{position}\] is 103, outside the vocabulary of 103"):
            linear_cross_entropy(*case, backend=fused)
    else:  # a GPU does not wait to look: the loss says it
        assert linear_cross_entropy(*case, backend=fused).loss_sum.isnan()


# From here on: bugs of other fused losses, kept out of this one.


@pytest.mark.parametrize("scale", [0.0, 0.37, -3.0])
def test_upstream_gradient_is_honoured(backend, scale):
    case = make_case()
    once = gradients(linear_cross_entropy(*case, backend=backend), case.hidden, case.weight)
    output = linear_cross_entropy(*case, backend=backend)
    for ours, unit in zip(gradients(output, case.hidden, case.weight, scale=scale), once, strict=True):
        torch.testing.assert_close(ours, unit * scale)


def test_an_upstream_gradient_is_not_rounded_to_the_gradients_dtype(fused):
    # 1 + 2^-10 is 1 in bfloat16; times a gradient that is a power of two it would be lost, not with float32
    case = make_case(dtype=torch.bfloat16)
    output = linear_cross_entropy(*case, backend=fused)
    third = gradients(output, case.hidden, case.weight, scale=1 / 3, retain_graph=True)
    unit = gradients(output, case.hidden, case.weight)
    assert third[0].equal((unit[0].double() * (torch.tensor(1.0) / 3).double()).to(torch.bfloat16))


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_scale_gradient_rounds_once(saved, wanted):
    gradient = torch.randn(33, 70, device=DEVICE).to(saved)
    scale = torch.rand((), device=DEVICE)
    exact = gradient.double() * scale.double()
    ours = torch.ops.delib_fast.scale_gradient(gradient, scale, wanted)
    assert ours.dtype == wanted
    torch.testing.assert_close(ours.double(), exact, rtol=0.51 * torch.finfo(wanted).eps + 1e-7, atol=1e-7)
    assert torch.ops.delib_fast.scale_gradient(torch.full((3,), torch.nan), scale, wanted).isnan().all()


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


def test_a_gradient_that_nobody_wants_is_not_computed(fused):
    case = make_case()
    op = getattr(torch.ops.delib_fast, f"linear_cross_entropy_{fused}")
    for needs in ((True, False), (False, True), (False, False)):
        *_, grad_hidden, grad_weight = op(*case, None, -100, 0, *needs)
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


def test_tied_weights(backend):
    embedding = torch.nn.Embedding(103, 24, device=DEVICE)
    head = FusedLossHead(embedding.weight, backend=backend)
    assert head.weight is embedding.weight
    case = make_case()
    tokens = torch.randint(103, (37,), device=DEVICE)
    head(embedding(tokens), *case[2:]).loss_sum.backward()
    tied = embedding.weight.grad
    apart = (embedding.weight.detach().clone().requires_grad_() for _ in range(2))
    table, weight = apart
    output = linear_cross_entropy(F.embedding(tokens, table), weight, *case[2:], backend="reference")
    torch.testing.assert_close(tied, sum(gradients(output, table, weight)))


def test_minus_infinity_logits(backend):
    # a vocabulary entry that is masked out: hidden has a 1 in its last column, the weight -inf
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


def test_gradient_of_a_confident_target_is_not_cancelled(fused):
    # p(target) = 1 - 1e-5: in bfloat16, p - 1 computed after rounding would be exactly 0
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
    # a caller's advantages; nothing is silently dropped
    case = make_case()
    negative = linear_cross_entropy(*case[:3], -case.loss_weights, backend=backend)
    positive = linear_cross_entropy(*case, backend=backend)
    torch.testing.assert_close(negative.loss_sum, -positive.loss_sum)
    torch.testing.assert_close(gradients(negative, case.weight)[0], -gradients(positive, case.weight)[0])


def test_loss_positions_say_the_same_as_the_mask(backend):
    case = make_case(T=131)
    masked = linear_cross_entropy(*case, backend=backend)
    listed = linear_cross_entropy(*case, loss_positions=supervised(case), backend=backend)
    torch.testing.assert_close(listed, masked)
    leaves = (case.hidden, case.weight)
    torch.testing.assert_close(gradients(listed, *leaves), gradients(masked, *leaves))


def test_rows_that_are_not_listed_are_not_supervised(backend):
    case = make_case(T=40, dead=0.0)
    positions = torch.arange(10, 20, device=DEVICE)
    output = linear_cross_entropy(*case, loss_positions=positions, backend=backend)
    assert output.nll.nonzero().squeeze(1).equal(positions)
    assert gradients(output, case.hidden)[0].any(1).nonzero().squeeze(1).equal(positions)


def test_another_ignore_index(backend):
    case = make_case()
    targets = torch.where(case.targets == -100, 5, case.targets)
    ours = linear_cross_entropy(*case[:2], targets, case.loss_weights, ignore_index=5, backend=backend)
    assert not ours.nll[targets == 5].any()


@pytest.mark.parametrize("H", [24, 65])
@pytest.mark.parametrize("T", [37, 130])
@pytest.mark.parametrize("gemm", ["widened", "bfloat16"])
def test_both_cpu_paths_in_bfloat16(gemm, T, H):
    # on a processor without bfloat16 GEMMs "auto" is only ever the first
    skip_if_unavailable("cpu")
    case = make_case(T, H, 1103, torch.bfloat16, device="cpu")
    op = torch.ops.delib_fast.linear_cross_entropy_cpu
    loss, nll, correct, *grads = op(*case, None, -100, 32, True, True, gemm)
    exact, theirs = eager(case.to(torch.float64)), eager(case)
    torch.testing.assert_close(loss, (nll * case.loss_weights).sum())
    assert grads[1].dtype == torch.float32
    for name, *three in zip(("nll", "grad_hidden", "grad_weight"), (nll, *grads), theirs, exact, strict=True):
        assert_no_worse(*three, name)
    assert correct.sum() <= len(supervised(case))


def test_weight_gradient_does_not_round_between_chunks(fused):
    # 64 chunks: a bfloat16 accumulator would be worse than one chunk by several times
    case = make_case(T=96, H=32, V=61, dtype=torch.bfloat16)
    exact = eager(case.to(torch.float64))[2]
    errors = []
    for chunk_tokens in (4, 96):
        output = linear_cross_entropy(*case, chunk_tokens=chunk_tokens, backend=fused)
        errors.append((gradients(output, case.weight)[0].double() - exact).norm())
    assert errors[0] <= 1.05 * errors[1]


def test_head_replaces_a_linear():
    linear = torch.nn.Linear(24, 103, bias=False, device=DEVICE)
    head = FusedLossHead.from_linear(linear)
    assert head.weight is linear.weight
    assert [name for name, _ in head.named_parameters()] == ["weight"]
    with pytest.raises(ValueError, match="lm_head has a bias"):
        FusedLossHead.from_linear(torch.nn.Linear(4, 8))

    class LoraLinear(torch.nn.Linear):
        pass

    with pytest.raises(ValueError, match=r"LoraLinear is not a plain nn\.Linear"):
        FusedLossHead.from_linear(LoraLinear(4, 8, bias=False))


@pytest.mark.skipif(DEVICE != "cpu", reason="autocast on the CPU")
def test_autocast_computes_in_its_dtype(backend):
    case = make_case()
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy(*case, backend=backend)
    theirs = linear_cross_entropy(*case.to(torch.bfloat16), backend=backend)
    assert ours.nll.equal(theirs.nll)
    assert gradients(ours, case.weight)[0].dtype == torch.float32
