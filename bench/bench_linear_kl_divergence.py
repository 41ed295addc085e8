"""The divergence head, forward and backward: each of our backends, and each peer that runs on this device.

    pytest bench/bench_linear_kl_divergence.py --quick
    pytest bench/bench_linear_kl_divergence.py -k "4096-1024-32768 and bfloat16 and 50 and reverse and frozen"

The roof is the time of the bare GEMMs on the supervised rows: the student's logits, the gradient of its hidden states
and, if its head trains, that of its weight; and the teacher's logits. With a frozen head ("frozen") student and teacher
share one weight, as under LoRA. With a head that trains ("train") the teacher has its own. Each GEMM uses the fastest
layout and dtype, as in bench_linear_cross_entropy.py. Before anything is timed, each contender's loss and gradients are
compared with float64 results on the same inputs.

Peers get only the supervised rows. Liger's fused loss runs on torch, compiled; it always computes the gradient of the
weight, and the hard loss with a factor of 0.

T packed tokens, H hidden size, V vocabulary, L supervised tokens.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from harness import DEVICE, dtype_name, fastest_gemms, gemm_candidates, is_installed, seconds
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from delib_fast.ops import linear_kl_divergence
from delib_fast.ops.linear_kl_divergence import BACKENDS

UPSTREAM = 0.5  # every contender scales the summed loss by this, as a training step does
SAMPLE = 48  # rows of hidden, and rows of the weight, whose gradients are compared with float64
BETA = {"forward": 0.0, "reverse": 1.0, "jsd": 0.5}  # what Liger and TRL call these directions

QUICK = [(512, 256, 8192)]
FULL = [(2048, 896, 151_936), (4096, 1024, 32_768), (8192, 256, 8192)]
GPU = [(32_768, 2048, 151_936), (32_768, 4096, 151_936)]


class Key(NamedTuple):
    T: int
    H: int
    V: int
    share: float
    dtype: torch.dtype
    direction: str
    frozen: bool


class Inputs(NamedTuple):
    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    positions: Tensor  # (L,) indices of the supervised rows
    key: Key

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return (self.hidden,) if self.key.frozen else (self.hidden, self.weight)

    def rows(self) -> tuple[Tensor, Tensor]:
        """The supervised rows of student and teacher."""
        return self.hidden.index_select(0, self.positions), self.teacher_hidden.index_select(0, self.positions)


@functools.lru_cache(maxsize=1)
def make_inputs(key: Key) -> Inputs:
    T, H, V = key[:3]
    generator = torch.Generator(DEVICE).manual_seed(1)
    normal = functools.partial(torch.randn, device=DEVICE, generator=generator)
    positions = (torch.rand(T, device=DEVICE, generator=generator) < key.share).nonzero().squeeze(1)
    hidden = normal(T, H)
    teacher_hidden = (hidden + 0.3 * normal(T, H)).to(key.dtype)  # a teacher that is close to the student
    weight = (normal(V, H) * 2 / H**0.5).to(key.dtype)
    teacher_weight = weight if key.frozen else (weight + 0.3 * normal(V, H) / H**0.5).to(key.dtype)
    weight = weight if key.frozen else weight.requires_grad_()
    return Inputs(hidden.to(key.dtype).requires_grad_(), weight, teacher_hidden, teacher_weight, positions, key)


# --- contenders: each returns the loss and the gradients of UPSTREAM * the summed divergence ----------------------

Contender = Callable[[Inputs], tuple[Tensor, ...]]


def _finish(loss: Tensor, inputs: Inputs) -> tuple[Tensor, ...]:
    return loss.detach(), *torch.autograd.grad(loss * UPSTREAM, inputs.leaves)


@functools.lru_cache(maxsize=1)
def _weights(inputs_key: Key) -> Tensor:
    inputs = make_inputs(inputs_key)
    return torch.zeros(inputs_key.T, device=DEVICE).index_fill(0, inputs.positions, 1.0)


def ours(backend: str, inputs: Inputs) -> tuple[Tensor, ...]:
    output = linear_kl_divergence(
        *inputs[:4],
        _weights(inputs.key),
        direction=inputs.key.direction,
        loss_positions=inputs.positions,
        backend=backend,
    )
    return _finish(output.loss_sum, inputs)


def divergence_sum(x: Tensor, y: Tensor, direction: str) -> Tensor:
    """Σ divergence of logits, written as in an ordinary trainer."""
    log_p, log_q = x.log_softmax(1), y.log_softmax(1)
    if direction == "forward":
        return F.kl_div(log_p, log_q, reduction="sum", log_target=True)
    if direction == "reverse":
        return F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    log_m = torch.logaddexp(log_p, log_q) - torch.tensor(2.0, device=x.device).log()
    halves = [F.kl_div(log_m, log_one, reduction="sum", log_target=True) for log_one in (log_p, log_q)]
    return (halves[0] + halves[1]) / 2


def _compact(rows: Tensor, weight: Tensor, teacher_rows: Tensor, teacher_weight: Tensor, direction: str) -> Tensor:
    with torch.no_grad():
        y = F.linear(teacher_rows, teacher_weight).float()
    return divergence_sum(F.linear(rows, weight).float(), y, direction)


def eager_compact(inputs: Inputs) -> tuple[Tensor, ...]:
    rows, teacher_rows = inputs.rows()
    loss = _compact(rows, inputs.weight, teacher_rows, inputs.teacher_weight, inputs.key.direction)
    return _finish(loss, inputs)


_compiled = torch.compile(_compact, dynamic=False)


def compiled_compact(inputs: Inputs) -> tuple[Tensor, ...]:
    rows, teacher_rows = inputs.rows()
    loss = _compiled(rows, inputs.weight, teacher_rows, inputs.teacher_weight, inputs.key.direction)
    return _finish(loss, inputs)


def trl_gkd(inputs: Inputs) -> tuple[Tensor, ...]:
    from trl.experimental.gkd import GKDTrainer

    rows, teacher_rows = inputs.rows()
    with torch.no_grad():
        y = F.linear(teacher_rows, inputs.teacher_weight).float()
    x = F.linear(rows, inputs.weight).float()
    beta = BETA[inputs.key.direction]
    return _finish(GKDTrainer.generalized_jsd_loss(x, y, beta=beta, reduction="sum"), inputs)


def liger_jsd(inputs: Inputs) -> tuple[Tensor, ...]:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    rows, teacher_rows = inputs.rows()
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETA[inputs.key.direction])
    labels = torch.zeros(rows.shape[0], dtype=torch.int64, device=DEVICE)
    mean = loss(rows, inputs.weight, teacher_rows, inputs.teacher_weight, labels)
    return _finish(mean.float() * rows.shape[0], inputs)


def _why_not_liger() -> str | None:
    return None if is_installed("liger_kernel") else "liger_kernel is not installed (extra: peers)"


def _why_not_trl() -> str | None:
    if not is_installed("trl"):
        return "trl is not installed (extra: peers)"
    import trl

    found = is_installed("trl.experimental.gkd")
    return None if found else f"trl {trl.__version__} does not have the trainer whose loss this bench calls"


CONTENDERS: dict[str, Contender] = {
    **{f"ours-{backend.name}": functools.partial(ours, backend.name) for backend in BACKENDS},
    "eager-compact": eager_compact,
    "compile-compact": compiled_compact,
    "trl-gkd": trl_gkd,
    "liger-jsd": liger_jsd,
}
WHY_NOT: dict[str, Callable[[], str | None]] = {"trl-gkd": _why_not_trl, "liger-jsd": _why_not_liger}


def skip_unless_it_runs(name: str, inputs: Inputs) -> None:
    if name in WHY_NOT and (reason := WHY_NOT[name]()):
        pytest.skip(reason)
    for backend in BACKENDS:
        if name == f"ours-{backend.name}" and (reason := backend.why_not(inputs.hidden, inputs.weight)):
            pytest.skip(reason)


# --- correctness and roof -----------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def exact_sample(key: Key) -> tuple[Tensor, Tensor, Tensor]:
    """Return the summed loss and SAMPLE rows of each gradient in float64; in chunks, since (L, V) logits are large."""
    inputs = make_inputs(key)
    rows, teacher_rows = (r.detach().double() for r in inputs.rows())
    weight, teacher_weight = (w.detach().double() for w in (inputs.weight, inputs.teacher_weight))
    loss = torch.zeros((), dtype=torch.float64, device=DEVICE)
    grad_weight = torch.zeros(SAMPLE, key.H, dtype=torch.float64, device=DEVICE)
    grad_hidden = torch.empty(0)
    for begin in range(0, rows.shape[0], 128):
        part = rows[begin : begin + 128]
        x = (part @ weight.T).requires_grad_()
        chunk_loss = divergence_sum(x, teacher_rows[begin : begin + 128] @ teacher_weight.T, key.direction)
        (dz,) = torch.autograd.grad(chunk_loss, x)
        loss += chunk_loss.detach()
        grad_weight += dz[:, :SAMPLE].T @ part
        if begin == 0:
            grad_hidden = dz[:SAMPLE] @ weight
    return loss, UPSTREAM * grad_hidden, UPSTREAM * grad_weight


def assert_correct(outputs: tuple[Tensor, ...], key: Key) -> dict[str, float]:
    """Assert that the errors are within the bound that eager in the same dtype meets, and return them.

    An error is the largest absolute difference divided by the largest absolute entry.
    """
    positions = make_inputs(key).positions[:SAMPLE]
    sample = (outputs[0], outputs[1][positions], *(weight[:SAMPLE] for weight in outputs[2:]))
    bound = 1e-3 if key.dtype == torch.float32 else 6e-2
    errors = {}
    for name, value, exact in zip(("loss", "grad_hidden", "grad_weight"), sample, exact_sample(key), strict=False):
        errors[f"error_{name}"] = ((value.double() - exact).abs().max() / exact.abs().max()).item()
        assert errors[f"error_{name}"] < bound, (name, errors)
    return errors


@functools.lru_cache(maxsize=1)
def make_roof(key: Key) -> Callable[[], None]:
    """Return a function that runs the bare GEMMs, each in the form that is fastest on this machine."""
    inputs = make_inputs(key)
    rows, teacher_rows = (r.detach() for r in inputs.rows())
    repeats = 1
    if DEVICE == "cuda" and rows.shape[0] > 8192:  # logits of all rows may not fit: fewer rows, repeated
        repeats = rows.shape[0] // 8192
        rows, teacher_rows = rows[:8192], teacher_rows[:8192]
    student = fastest_gemms(gemm_candidates(rows, inputs.weight.detach())[: 2 if key.frozen else 3])
    teacher = fastest_gemms(gemm_candidates(teacher_rows, inputs.teacher_weight)[:1])

    def roof() -> None:
        for _ in range(repeats):
            for gemm in (*student, *teacher):
                gemm()

    return roof


# --- the bench ----------------------------------------------------------------------------------------------------


def _cases() -> list[tuple[int, int, int]]:
    return QUICK + (GPU if DEVICE == "cuda" else FULL)


@pytest.mark.parametrize("name", CONTENDERS)  # the innermost loop, so that the contenders of a case share its inputs
@pytest.mark.parametrize("head", ["frozen", "train"])
@pytest.mark.parametrize("direction", ["reverse", "forward", "jsd"])
@pytest.mark.parametrize("share", [0.5, 0.1], ids=lambda share: f"{share:.0%}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=dtype_name)
@pytest.mark.parametrize(("T", "H", "V"), _cases(), ids=lambda size: str(size))
def bench_linear_kl_divergence(
    benchmark: BenchmarkFixture,
    against_roof: Callable[..., None],
    quick: bool,
    name: str,
    T: int,
    H: int,
    V: int,
    dtype: torch.dtype,
    share: float,
    direction: str,
    head: str,
) -> None:
    if quick and ((T, H, V) not in QUICK or share != 0.5 or direction != "reverse"):
        pytest.skip("--quick runs only the smallest case, with half of its tokens supervised")
    key = Key(T, H, V, share, dtype, direction, head == "frozen")
    inputs = make_inputs(key)
    skip_unless_it_runs(name, inputs)
    call = functools.partial(CONTENDERS[name], inputs)
    torch._dynamo.reset()
    try:
        errors = assert_correct(call(), key)
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        pytest.skip(f"out of memory: {str(error).splitlines()[0]}")
    duration_s = seconds(call)
    L = inputs.positions.shape[0]
    benchmark.group = case = f"T={T} H={H} V={V} {share:.0%} {dtype_name(dtype)} {direction} {head}"
    against_roof(
        call,
        make_roof(key),
        rounds=11 if duration_s < 0.3 else 5 if duration_s < 5 else 3,
        case=case,
        contender=name,
        flops=(6 if key.frozen else 8) * L * H * V,
        supervised=L,
        dtype=dtype_name(dtype),
        # the inputs and the gradients, each once
        least_bytes=(3 * L * H + (1 if key.frozen else 3) * V * H) * inputs.hidden.element_size(),
        **errors,
    )
