"""softcap, z_loss and label_smoothing, alone and combined: every backend compared with float64."""

import pytest
import torch
import torch.nn.functional as F
from loss_cases import DEVICE, Case, assert_no_worse, gradients, make_case, skip_if_unavailable, supervised
from torch import Tensor

from delib_fast.ops import FusedLossHead, linear_cross_entropy

TERMS = [
    pytest.param({"softcap": 3.0}, id="softcap"),
    pytest.param({"z_loss": 1e-2}, id="z-loss"),
    pytest.param({"label_smoothing": 0.1}, id="smoothing"),
    pytest.param({"softcap": 5.0, "z_loss": 1e-3, "label_smoothing": 0.2}, id="all"),
]
ALL = TERMS[-1].values[0]
NAMES = ("loss", "nll", "grad_hidden", "grad_weight", "grad_bias")


def eager(case: Case, bias: Tensor | None = None, logit_scale=1.0, softcap=None, z_loss=0.0, label_smoothing=0.0):
    """loss_sum, nll and the gradients, with torch's functions in float32 on logits in the dtype of the inputs."""
    rows = supervised(case)
    logits = F.linear(case.hidden[rows], case.weight, bias) * logit_scale
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    nll = F.cross_entropy(logits, case.targets[rows], reduction="none").detach()
    loss = F.cross_entropy(logits, case.targets[rows], reduction="none", label_smoothing=label_smoothing)
    loss = ((loss + z_loss * logits.logsumexp(1) ** 2) * case.loss_weights[rows]).sum()
    leaves = [t for t in (case.hidden, case.weight, bias) if t is not None]
    return loss.detach(), nll, *torch.autograd.grad(loss, leaves)


def fused(case: Case, bias: Tensor | None = None, **options):
    output = linear_cross_entropy(*case, bias=bias, **options)
    leaves = [t for t in (case.hidden, case.weight, bias) if t is not None]
    return output.loss_sum.detach(), output.nll[supervised(case)], *gradients(output, *leaves)


def assert_close_to_float64(case: Case, backend: str, bias: Tensor | None = None, chunk_tokens=16, **terms) -> None:
    ours = fused(case, bias, chunk_tokens=chunk_tokens, backend=backend, **terms)
    wide_bias = None if bias is None else bias.detach().double().requires_grad_()
    exact, theirs = eager(case.to(torch.float64), wide_bias, **terms), eager(case, bias, **terms)
    for name, *three in zip(NAMES, ours, theirs, exact, strict=False):
        assert_no_worse(*three, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("terms", TERMS)
def test_matches_float64(backend, terms, dtype):
    if dtype == torch.float64 and backend in ("triton", "cuda"):
        pytest.skip(f"the {backend} backend does not support float64")
    assert_close_to_float64(make_case(dtype=dtype), backend, **terms)


def test_with_a_bias_a_scale_and_several_vocabulary_blocks(backend):
    case, bias = make_case(23, 65, 2311), torch.randn(2311, device=DEVICE, requires_grad=True)
    assert_close_to_float64(case, backend, bias, chunk_tokens=7, logit_scale=0.5, **ALL)


def test_the_cpu_path_with_bfloat16_gemms():
    # This path is called explicitly, because `cpu` does not select it on a processor without bfloat16 GEMMs.
    skip_if_unavailable("cpu")
    case = make_case(T=130, H=65, V=1103, dtype=torch.bfloat16, device="cpu")
    op, rows = torch.ops.delib_fast.linear_cross_entropy_cpu, supervised(case)
    loss, nll, _, *grads = op(*case, None, -100, 32, True, True, *ALL.values(), gemm="bfloat16")[:5]
    exact, theirs = eager(case.to(torch.float64), **ALL), eager(case, **ALL)
    for name, *three in zip(NAMES, (loss, nll[rows], *grads), theirs, exact, strict=False):
        assert_no_worse(*three, name)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("terms", TERMS)
def test_gradcheck(backend, terms):
    skip_if_unavailable(backend)
    case = make_case(7, 5, 11, torch.float64, device="cpu")
    bias = torch.randn(11, dtype=torch.float64, requires_grad=True)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rest = (case.targets, case.loss_weights)
        options = {"bias": bias, "logit_scale": 1.7, "chunk_tokens": 3, "backend": backend}
        return linear_cross_entropy(hidden, weight, *rest, **options, **terms).loss_sum

    assert torch.autograd.gradcheck(loss, (case.hidden, case.weight, bias))


@pytest.mark.parametrize("needs", [(True, True), (False, True)], ids=str)
def test_opcheck(fused, needs):
    case = make_case(13, 8, 29)
    hidden, weight = (t.detach().requires_grad_(need) for t, need in zip(case[:2], needs, strict=True))
    op = getattr(torch.ops.delib_fast, f"linear_cross_entropy_{fused}").default
    arguments = (hidden, weight, case.targets, case.loss_weights, None, -100, 8, *needs, *ALL.values())
    torch.library.opcheck(op, arguments)


def test_compile_fullgraph(backend):
    case = make_case()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, *case[2:], backend=backend, **ALL).loss_sum

    leaves = case[:2]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(torch.autograd.grad(compiled, leaves), torch.autograd.grad(loss(*leaves), leaves))


def test_nll_excludes_z_loss_and_smoothing(backend):
    # A logged nll must stay comparable when a z-loss is switched on. With a softcap it is that of the capped logits.
    case = make_case()
    plain = linear_cross_entropy(*case, backend=backend)
    more = linear_cross_entropy(*case, z_loss=0.3, label_smoothing=0.4, backend=backend)
    torch.testing.assert_close(more.nll, plain.nll)
    assert more.correct.equal(plain.correct)
    assert more.loss_sum > plain.loss_sum
    # The softcap is monotonic, so the argmax does not change.
    assert linear_cross_entropy(*case, softcap=30.0, backend=backend).correct.equal(plain.correct)


def test_terms_that_are_off_give_bitwise_identical_results(backend):
    case = make_case(dtype=torch.bfloat16)
    off = fused(case, softcap=None, z_loss=0.0, label_smoothing=0.0, backend=backend)
    assert all(a.equal(b) for a, b in zip(off, fused(case, backend=backend), strict=True))


def test_gradient_is_zero_for_uniform_targets_and_logits(backend):
    # A label smoothing of 1 makes the target uniform, as the softmax of equal logits is.
    weight = torch.ones(50, 4, device=DEVICE, requires_grad=True)
    hidden = torch.ones(3, 4, device=DEVICE, requires_grad=True)
    output = linear_cross_entropy(hidden, weight, torch.arange(3, device=DEVICE), label_smoothing=1.0, backend=backend)
    torch.testing.assert_close(output.loss_sum, 3 * torch.tensor(50.0, device=DEVICE).log())
    for gradient in gradients(output, hidden, weight):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-6, rtol=0)


def test_unsupervised_rows_and_no_supervised_row(backend):
    case = make_case()
    unsupervised = torch.ones(37, dtype=torch.bool, device=DEVICE).index_fill(0, supervised(case), False)
    clean = fused(case, backend=backend, **ALL)
    with torch.no_grad():
        case.hidden[unsupervised] = float("nan")
    everything = torch.arange(37, device=DEVICE)
    for positions in (None, everything):
        ours = fused(case, backend=backend, loss_positions=positions, **ALL)
        torch.testing.assert_close(ours, clean)
    targets = torch.full_like(case.targets, -100)
    output = linear_cross_entropy(case.hidden, case.weight, targets, backend=backend, **ALL)
    assert output.loss_sum.item() == 0
    assert not any(gradient.any() for gradient in gradients(output, case.hidden, case.weight))


def test_minus_infinity_logits_with_a_z_loss(backend):
    case = make_case(H=8)
    hidden = torch.cat([case.hidden.detach(), torch.ones(37, 1, device=DEVICE)], 1)
    weight = torch.cat([case.weight.detach(), torch.zeros(103, 1, device=DEVICE)], 1)
    weight[:90, -1] = float("-inf")
    targets = torch.where(case.targets == -100, -100, 90 + case.targets.abs() % 13)
    rows = supervised(case)
    logits = (hidden @ weight.T)[rows]
    loss = F.cross_entropy(logits, targets[rows], reduction="none") + 0.1 * logits.logsumexp(1) ** 2
    output = linear_cross_entropy(hidden, weight, targets, case.loss_weights, z_loss=0.1, backend=backend)
    torch.testing.assert_close(output.loss_sum, (loss * case.loss_weights[rows]).sum())


@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_logits_far_above_the_softcap_saturate(backend, softcap):
    case = make_case()
    big = Case((case.hidden.detach() * 1e4).requires_grad_(), *case[1:])
    output = linear_cross_entropy(*big, softcap=softcap, backend=backend)
    assert output.nll.max() <= torch.tensor(103.0).log() + 2 * softcap
    assert all(gradient.isfinite().all() for gradient in gradients(output, big.hidden, big.weight))


def test_tanh_of_the_cpu_backend_is_accurate_to_an_ulp():
    # Both branches, the boundary between them at 0.625, and extreme values.
    skip_if_unavailable("cpu")
    z = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.6249, 0.625, 0.6251, 1e-30, -1e-8, 88.0, -1e30])])
    for cap in (1.0, 30.0):
        # With one hidden unit the logits equal the weight, and nll[t] = lse - cap * tanh(z[t] / cap).
        targets = torch.arange(len(z))
        output = linear_cross_entropy(torch.ones(len(z), 1), z[:, None] * cap, targets, softcap=cap, backend="cpu")
        capped = cap * z.double().tanh()
        torch.testing.assert_close(output.nll.double(), capped.logsumexp(0) - capped, rtol=3e-7, atol=cap * 4e-7)


def test_the_head_passes_its_options_to_the_loss(backend):
    case = make_case()
    head = FusedLossHead(torch.nn.Parameter(case.weight.detach()), backend=backend, **ALL)
    expected = linear_cross_entropy(*case, backend=backend, **ALL)
    torch.testing.assert_close(head(case.hidden, *case[2:]).loss_sum, expected.loss_sum)
    assert "softcap=5" in repr(head)
    linear = torch.nn.Linear(24, 103, device=DEVICE)
    assert FusedLossHead.from_linear(linear, softcap=30.0, z_loss=1e-4).z_loss == 1e-4


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"softcap": 0.0}, "softcap=0.0; it must be a positive number, or None for none"),
        ({"softcap": float("nan")}, "softcap=nan; it must be a positive number, or None for none"),
        ({"z_loss": -1e-4}, "z_loss=-0.0001; it must be a finite number of at least 0, 0 for none"),
        ({"z_loss": float("inf")}, "z_loss=inf; it must be a finite number of at least 0, 0 for none"),
        ({"label_smoothing": 1.5}, r"label_smoothing=1.5; it must be in \[0, 1\], 0 for none"),
    ],
)
def test_invalid_options_raise(terms, message):
    with pytest.raises(ValueError, match=f"linear_cross_entropy: {message}"):
        linear_cross_entropy(*make_case(), **terms)
