"""linear_kl_divergence: every backend compared with float64.

T packed tokens, H and Ht hidden sizes of student and teacher, V vocabulary. Sizes are not multiples of the tile size of
any kernel.
"""

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
    dead,
    divergence,
    eager,
    gradients,
    live,
    make_case,
    results,
    skip_if_unavailable,
)
from loss_cases import DEVICE, assert_no_worse, sample_if_interpreted
from torch import Tensor

from delib_fast.ops import BackendUnavailable, linear_cross_entropy, linear_kl_divergence
from delib_fast.ops.linear_kl_divergence._call import DivergenceCall

SHAPES = [  # T, H, Ht, V, chunk_tokens
    pytest.param(131, 24, 19, 103, 16, id="several-chunks-smaller-last"),
    pytest.param(1, 8, 8, 17, None, id="one-row"),
    pytest.param(19, 7, 5, 2, 5, id="odd-hidden-two-classes"),
    pytest.param(23, 65, 24, 2311, 7, id="several-vocabulary-blocks"),
    pytest.param(9, 16, 16, 8195, None, id="several-triton-blocks"),
]


backend, fused = backend_fixture(NAMES), backend_fixture(FUSED)


def assert_close_to_float64(case: Case, backend: str, chunk_tokens=None, **options) -> None:
    assert_no_worse_than_torch(results(case, backend, chunk_tokens=chunk_tokens, **options), case, **options)


def assert_no_worse_than_torch(ours: tuple[Tensor, ...], case: Case, **options) -> None:
    theirs, exact = eager(case, **options), eager(case.to(torch.float64), **options)
    for name, *three in zip(RESULTS, ours, theirs, exact, strict=True):
        assert_no_worse(*three, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_matches_reference(backend, options, dtype, full):
    skip_if_unavailable(backend, dtype)
    sample_if_interpreted(backend, full, dtype != torch.float16 or options["direction"] == "reverse")
    case = make_case(T=37, dtype=dtype)
    output = divergence(case, backend, chunk_tokens=16, **options)
    wide = torch.promote_types(dtype, torch.float32)
    assert all(t.dtype == wide for t in output)
    grad_hidden, grad_weight = gradients(output, *case.leaves)
    ours = (output.loss_sum.detach(), *(losses[live(case)] for losses in output[1:]), grad_hidden, grad_weight)
    assert_no_worse_than_torch(ours, case, **options)
    assert grad_hidden.dtype == grad_weight.dtype == dtype
    assert not any(t[dead(case)].any() for t in (*output[1:], grad_hidden))
    assert (output.divergence[live(case)] > 0).all()
    no_target = case.targets == -100
    assert not output.nll[no_target].any()
    assert not output.teacher_nll[no_target].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("T", "H", "Ht", "V", "chunk_tokens"), SHAPES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_shapes(backend, T, H, Ht, V, chunk_tokens, direction, dtype, full):
    sample_if_interpreted(backend, full, direction == "jsd")
    case = make_case(T, H, V, dtype, Ht, dead=0 if T == 1 else 0.3)
    assert_close_to_float64(case, backend, chunk_tokens, direction=direction, nll_weight=0.3)


def test_the_definitions_by_hand(backend):
    # One row with the student's logits (log 1, log 3) and the teacher's (log 1, log 1).
    hidden = torch.ones(1, 1, device=DEVICE)
    student, teacher = (torch.tensor(p, device=DEVICE).log()[:, None] for p in ([1.0, 3.0], [1.0, 1.0]))
    p, q = torch.tensor([0.25, 0.75]), torch.tensor([0.5, 0.5])
    m = 0.8 * p + 0.2 * q

    def kl(a: Tensor, b: Tensor) -> float:
        return (a * (a / b).log()).sum().item()

    def ours(**options) -> float:
        inputs = (hidden, student, hidden, teacher, torch.tensor([2.0], device=DEVICE))
        output = linear_kl_divergence(*inputs, backend=backend, **options)
        assert output.loss_sum.item() == pytest.approx(2 * output.divergence.item(), abs=1e-6)
        return output.divergence.item()

    assert ours() == pytest.approx(kl(q, p), abs=1e-6)
    assert ours(direction="reverse") == pytest.approx(kl(p, q), abs=1e-6)
    assert ours(direction="jsd", beta=0.2) == pytest.approx(0.2 * kl(q, m) + 0.8 * kl(p, m), abs=1e-6)
    cold = torch.tensor([1.0, 9.0]) / 10  # a temperature of 1/2 squares the probabilities
    assert ours(temperature=0.5) == pytest.approx(kl(q, cold), abs=1e-6)
    assert ours(teacher_logit_scale=0.0, logit_scale=2.0) == pytest.approx(kl(q, cold), abs=1e-6)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck(backend, options):
    skip_if_unavailable(backend, torch.float64)
    case = make_case(7, 5, 11, torch.float64, 4, device="cpu")
    bias = torch.randn(11, dtype=torch.float64, requires_grad=True)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        changed = case._replace(hidden=hidden, weight=weight)
        return divergence(changed, backend, student_bias=bias, logit_scale=1.7, chunk_tokens=3, **options).loss_sum

    assert torch.autograd.gradcheck(loss, (*case.leaves, bias))


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_opcheck(fused, needs, full):
    sample_if_interpreted(fused, full, needs[0] == needs[1])
    case = make_case(5, 8, 29)
    hidden, weight = (t.detach().requires_grad_(need) for t, need in zip(case.leaves, needs, strict=True))
    op = getattr(torch.ops.delib_fast, f"linear_kl_divergence_{fused}").default
    tensors = (hidden, weight, case.teacher_hidden, case.teacher_weight)
    rest = (case.targets, case.loss_weights, case.loss_weights / 2, None, -100, 3, *needs)
    torch.library.opcheck(op, (*tensors, *rest))
    torch.library.opcheck(op, (*tensors, *rest, "jsd", 0.3, 2.0, 5.0, 3.0))
    torch.library.opcheck(op, (*tensors, None, None, None, live(case), -100, 0, *needs, "reverse"))


def test_the_call_matches_the_schema(fused):
    arguments = getattr(torch.ops.delib_fast, f"linear_kl_divergence_{fused}").default._schema.arguments
    assert [a.name for a in arguments][: len(DivergenceCall._fields)] == list(DivergenceCall._fields)


@pytest.mark.parametrize("how", ["weights", "positions"])
def test_all_masked(backend, how):
    case = make_case()
    positions = torch.empty(0, dtype=torch.int64, device=DEVICE) if how == "positions" else None
    if how == "weights":
        case = case._replace(loss_weights=torch.zeros_like(case.loss_weights))
    output = divergence(case, backend, nll_weight=0.5, loss_positions=positions)
    assert output.loss_sum.item() == 0
    assert not any(t.any() for t in (*output[1:], *gradients(output, *case.leaves)))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_nan_in_dead_row_does_not_leak(backend, direction, full):
    sample_if_interpreted(backend, full, direction == "reverse")
    case, options = make_case(), {"direction": direction, "nll_weight": 0.5}
    poisoned = case._replace(
        hidden=case.hidden.detach().index_fill(0, dead(case), float("nan")).requires_grad_(),
        teacher_hidden=case.teacher_hidden.index_fill(0, dead(case), float("nan")),
    )
    clean, output = divergence(case, backend, **options), divergence(poisoned, backend, **options)
    assert all(a.equal(b) for a, b in zip(output, clean, strict=True))
    ours, theirs = gradients(output, *poisoned.leaves), gradients(clean, *case.leaves)
    assert all(a.equal(b) for a, b in zip(ours, theirs, strict=True))
    # also if loss_positions lists the dead rows
    output = divergence(poisoned, backend, loss_positions=torch.arange(24, device=DEVICE), **options)
    assert all(t.isfinite().all() for t in (*output, *gradients(output, *poisoned.leaves)))


@pytest.mark.parametrize("who", ["hidden", "teacher_hidden"])
def test_nan_in_a_live_row_reaches_the_loss(backend, who):
    case = make_case()
    row = int(live(case)[2])
    poisoned = getattr(case, who).detach().clone()
    poisoned[row, 3] = float("nan")
    for direction in DIRECTIONS:
        output = divergence(case._replace(**{who: poisoned}), backend, direction=direction)
        assert output.loss_sum.isnan()
        assert output.divergence.isnan().nonzero().flatten().tolist() == [row]


def test_non_contiguous(backend):
    case = make_case()
    expected = divergence(case, backend)

    def strided(tensor: Tensor) -> Tensor:
        return torch.stack([tensor.detach()] * 2, -1)[..., 0]

    other = Case(strided(case.hidden).requires_grad_(), case.weight.detach().T.contiguous().T.requires_grad_(),
                 strided(case.teacher_hidden), strided(case.teacher_weight), strided(case.loss_weights),
                 strided(case.targets))  # fmt: skip
    output = divergence(other, backend)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(gradients(output, *other.leaves), gradients(expected, *case.leaves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_deterministic(backend, dtype, direction, full):
    sample_if_interpreted(backend, full, direction == ("jsd" if dtype == torch.float32 else "reverse"))
    case = make_case(24, 65, 2311, dtype)
    first, second = (divergence(case, backend, direction=direction, chunk_tokens=16) for _ in range(2))
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))
    ours = [gradients(output, *case.leaves) for output in (first, second)]
    assert all(a.equal(b) for a, b in zip(*ours, strict=True))


@pytest.mark.parametrize("options", OPTIONS)
def test_compile_fullgraph(backend, options, full):
    if not full and backend != "cpu" and options.get("nll_weight") != 0.2:
        pytest.skip("a long form: both options of that weight are sampled; run with --full")
    torch._dynamo.reset()  # every case counts towards the limit of recompilations
    case = make_case()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return divergence(case._replace(hidden=hidden, weight=weight), backend, **options).loss_sum

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*case.leaves)
    ours, theirs = (torch.autograd.grad(value, case.leaves) for value in (compiled, loss(*case.leaves)))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.skipif(DEVICE != "cpu", reason="autocast on the CPU")
def test_autocast_sets_the_dtype(backend):
    case = make_case()
    with torch.autocast("cpu", torch.bfloat16):
        ours = divergence(case, backend)
    assert ours.divergence.equal(divergence(case.to(torch.bfloat16), backend).divergence)
    assert gradients(ours, case.weight)[0].dtype == torch.float32


def test_refuses():
    case = make_case()

    def message(**changed) -> str:
        arguments = {"student_hidden": case.hidden, "student_weight": case.weight, "targets": case.targets,
                     "teacher_hidden": case.teacher_hidden, "teacher_weight": case.teacher_weight}  # fmt: skip
        with pytest.raises(ValueError, match=r"^linear_kl_divergence: ") as error:
            linear_kl_divergence(**(arguments | changed))
        return str(error.value).removeprefix("linear_kl_divergence: ")

    assert message(student_hidden=case.hidden[None]) == (
        "student_hidden must be (T, H) and student_weight (V, H), got (1, 24, 24) and (103, 24); "
        "flatten batch and sequence first: student_hidden.flatten(0, 1)"
    )
    assert message(teacher_weight=case.teacher_weight[:, 1:]) == (
        "teacher_hidden must be (T, H) and teacher_weight (V, H), got (24, 19) and (103, 18); "
        "flatten batch and sequence first: teacher_hidden.flatten(0, 1)"
    )
    assert message(teacher_hidden=case.teacher_hidden[1:]) == (
        "teacher_hidden has 23 rows and student_hidden 24; row t of both must predict the same token, so select the "
        "teacher's rows first"
    )
    assert message(teacher_weight=case.teacher_weight[1:]) == (
        "teacher_weight has 102 rows and student_weight 103; both must have the same vocabulary. If rows only pad it, "
        "slice both weights to the number of tokens"
    )
    wide = {"teacher_hidden": case.teacher_hidden.double(), "teacher_weight": case.teacher_weight.double()}
    assert message(**wide) == "teacher_hidden is torch.float64 and student_hidden torch.float32; cast one"
    assert message(loss_weights=case.loss_weights[1:]) == (
        "loss_weights must be (24,) floating point, one entry per row of hidden; got (23,) torch.float32"
    )
    assert message(nll_weight=case.targets) == (
        "nll_weight must be (24,) floating point, one entry per row of hidden; got (24,) torch.int64"
    )
    assert message(targets=None, nll_weight=0.1) == (
        "nll_weight is given without targets; pass targets (T,), or nll_weight=0"
    )
    assert message(nll_weight=float("nan")) == (
        "nll_weight=nan; it must be a finite number, 0 for none, or a tensor (T,)"
    )
    assert message(direction="backward") == ("direction='backward' does not exist; choose from forward, reverse, jsd")
    assert message(beta=1.0) == (
        'beta=1.0; it must be between 0 and 1, both excluded. At the ends use direction="forward" or "reverse"'
    )
    assert message(temperature=0.0) == "temperature=0.0; it must be a positive number, 1 for none"
    assert message(teacher_softcap=-1.0) == "teacher_softcap=-1.0; it must be a positive number, or None for none"
    assert message(chunk_tokens=0) == "chunk_tokens=0; it must be at least 1, or None for the default"
    assert message(backend="cuda") == "backend='cuda' does not exist; choose from auto, cpu, triton, reference"
    with pytest.raises(BackendUnavailable, match=r"triton: torch\.float64 is not supported\); these backends can: "):
        divergence(case.to(torch.float64), "triton")


def test_a_target_outside_the_vocabulary_raises_or_makes_the_nll_nan(fused):
    case = make_case()
    position = int(live(case)[3])
    case.targets[position] = 103
    if fused == "cpu":
        with pytest.raises(ValueError, match=rf"targets\[{position}\] is 103, which is outside the vocabulary of 103"):
            divergence(case, fused)
    else:  # a GPU backend does not synchronise to check targets
        assert divergence(case, fused).nll.isnan().nonzero().flatten().tolist() == [position]
        assert divergence(case, fused, nll_weight=0.1).loss_sum.isnan()
        assert divergence(case, fused).loss_sum.isfinite()


# --- the teacher --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_an_equal_teacher_gives_no_divergence_and_no_gradient(backend, direction):
    case = make_case()
    case = case._replace(teacher_hidden=case.hidden.detach(), teacher_weight=case.weight.detach())
    output = divergence(case, backend, direction=direction)
    assert (output.divergence.abs() < 1e-6).all()
    assert (output.divergence >= 0).all()
    for gradient in gradients(output, *case.leaves):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-5, rtol=0)
    assert output.nll.equal(output.teacher_nll)


def test_the_teacher_gets_no_gradient(backend):
    case = make_case()
    teacher = [t.clone().requires_grad_() for t in case[2:4]]
    output = divergence(case._replace(teacher_hidden=teacher[0], teacher_weight=teacher[1]), backend)
    output.loss_sum.backward()
    assert all(t.grad is None for t in teacher)
    assert case.hidden.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_shared_head_equals_a_copy(backend, dtype, frozen, with_bias, full):
    # Also if it trains: the teacher's part gives no gradient to it.
    sample_if_interpreted(backend, full, (dtype == torch.bfloat16) == frozen != with_bias)
    case = make_case(Ht=24, dtype=dtype)
    weight = case.weight.detach().requires_grad_(not frozen)
    bias = torch.randn(103, device=DEVICE).to(dtype) if with_bias else None
    leaves = (case.hidden,) if frozen else (case.hidden, weight)
    outputs = [
        divergence(case._replace(weight=weight, teacher_weight=teacher), backend, student_bias=bias,
                   teacher_bias=bias, direction="reverse")
        for teacher in (weight, weight.detach(), weight.detach().clone())
    ]  # fmt: skip
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0])
        for ours, theirs in zip(
            gradients(output, *leaves, retain_graph=True),
            gradients(outputs[0], *leaves, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs)


# --- weights ------------------------------------------------------------------------------------------------------


def test_an_nll_weight_of_each_row(backend):
    # Rows with a divergence only, with an nll only, with both and with neither.
    case = make_case(T=40, dead=0.5)
    nll_weights = torch.rand(40, device=DEVICE)
    nll_weights[::3] = 0
    both = divergence(case, backend, nll_weight=nll_weights)
    alone = divergence(case, backend)
    nll = linear_cross_entropy(*case.leaves, case.targets, nll_weights, backend="reference")
    torch.testing.assert_close(both.loss_sum, alone.loss_sum + nll.loss_sum)
    rows = (nll_weights != 0) & (case.targets != -100)
    torch.testing.assert_close(both.nll[rows], nll.nll[rows])
    sums = zip(gradients(alone, *case.leaves), gradients(nll, *case.leaves), strict=True)
    for ours, (first, second) in zip(gradients(both, *case.leaves), sums, strict=True):
        torch.testing.assert_close(ours, first + second)
    rows = rows | (case.loss_weights != 0)
    assert both.divergence.nonzero().squeeze(1).equal(rows.nonzero().squeeze(1))


def test_negative_and_missing_weights(backend):
    case = make_case()
    positive = divergence(case, backend)
    negative = divergence(case._replace(loss_weights=-case.loss_weights), backend)
    torch.testing.assert_close(negative.loss_sum, -positive.loss_sum)
    ones = linear_kl_divergence(*case[:4], backend=backend)
    torch.testing.assert_close(ones.loss_sum, ones.divergence.sum())
    assert (ones.divergence > 0).all()
    assert not ones.nll.any()


def test_loss_positions_equal_the_mask(backend):
    case = make_case(T=40)
    masked = divergence(case, backend, nll_weight=0.3)
    listed = divergence(case, backend, nll_weight=0.3, loss_positions=live(case))
    torch.testing.assert_close(listed, masked)
    torch.testing.assert_close(gradients(listed, *case.leaves), gradients(masked, *case.leaves))
    some = torch.arange(20, 30, device=DEVICE)
    output = divergence(case, backend, loss_positions=some)
    assert set(output.divergence.nonzero().flatten().tolist()) == set(live(case).tolist()) & set(range(20, 30))
