"""The loss head, forward and backward: each of our backends, and each peer that runs on this device.

    pytest bench/bench_linear_cross_entropy.py --quick                 # as CI runs it, under a minute
    pytest bench/bench_linear_cross_entropy.py -k "4096-1024-32768 and bfloat16 and 50"

The roof is the time of three bare GEMMs on the supervised rows (logits, hidden gradient, weight gradient). Each GEMM
uses the fastest layout and dtype that is at least as accurate, and writes into existing memory. The roof is measured
before every round. Before anything is timed, each contender's loss and gradients are compared with float64 results on
the same inputs.

Peers run in their best configuration: they get only the supervised rows if they cannot select them themselves, torch's
fused loss runs with its defaults and with its fastest options, and on a CPU malloc keeps freed memory (harness.py).

T packed tokens, H hidden size, V vocabulary, L supervised tokens.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from harness import DEVICE, dtype_name, fastest_gemms, gemm_candidates, is_installed, seconds
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from delib_fast.ops import linear_cross_entropy
from delib_fast.ops.linear_cross_entropy import BACKENDS

UPSTREAM = 0.5  # every contender scales the summed loss by this, as a training step does
SAMPLE = 48  # rows of hidden, and rows of the weight, whose gradients are compared with float64

QUICK = [(512, 256, 8192)]
FULL = [(2048, 896, 151_936), (4096, 1024, 32_768), (8192, 256, 8192)]
GPU = [(32_768, 2048, 151_936), (32_768, 4096, 151_936)]


InputsKey = tuple[int, int, int, float, torch.dtype]
"""T, H, V, share of supervised tokens, dtype: the arguments of make_inputs."""


class Inputs(NamedTuple):
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    positions: Tensor  # (L,) indices of the supervised rows

    @property
    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.hidden, self.weight


@functools.lru_cache(maxsize=1)
def make_inputs(T: int, H: int, V: int, share: float, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator(DEVICE).manual_seed(1)
    normal = functools.partial(torch.randn, device=DEVICE, generator=generator)
    targets = torch.randint(V, (T,), device=DEVICE, generator=generator)
    targets[torch.rand(T, device=DEVICE, generator=generator) >= share] = -100
    hidden, weight = normal(T, H).to(dtype), (normal(V, H) * 2 / H**0.5).to(dtype)
    positions = (targets != -100).nonzero().squeeze(1)
    return Inputs(hidden.requires_grad_(), weight.requires_grad_(), targets, positions)


# --- contenders: each returns (loss, gradient of hidden, gradient of weight) of UPSTREAM * the summed loss --------

Contender = Callable[[Inputs], tuple[Tensor, ...]]


def _finish(loss: Tensor, inputs: Inputs) -> tuple[Tensor, ...]:
    return loss.detach(), *torch.autograd.grad(loss * UPSTREAM, inputs.leaves)


def ours(backend: str, inputs: Inputs) -> tuple[Tensor, ...]:
    hidden, weight, targets, positions = inputs
    output = linear_cross_entropy(hidden, weight, targets, loss_positions=positions, backend=backend)
    return _finish(output.loss_sum, inputs)


def eager(inputs: Inputs) -> tuple[Tensor, ...]:
    logits = F.linear(inputs.hidden, inputs.weight).float()
    return _finish(F.cross_entropy(logits, inputs.targets, reduction="sum"), inputs)


def _compact_loss(hidden: Tensor, weight: Tensor, targets: Tensor, positions: Tensor) -> Tensor:
    logits = F.linear(hidden.index_select(0, positions), weight).float()
    return F.cross_entropy(logits, targets.index_select(0, positions), reduction="sum")


def eager_compact(inputs: Inputs) -> tuple[Tensor, ...]:
    return _finish(_compact_loss(*inputs), inputs)


_compiled_loss = torch.compile(_compact_loss, dynamic=False)


def compiled_compact(inputs: Inputs) -> tuple[Tensor, ...]:
    return _finish(_compiled_loss(*inputs), inputs)


def _supervised(inputs: Inputs) -> tuple[Tensor, Tensor]:
    return inputs.hidden.index_select(0, inputs.positions), inputs.targets.index_select(0, inputs.positions)


def torch_fused(inputs: Inputs, **options: Any) -> tuple[Tensor, ...]:
    from torch.nn import LinearCrossEntropyOptions

    rows, targets = _supervised(inputs)
    loss = F.linear_cross_entropy(
        rows, inputs.weight, targets, reduction="sum", options=LinearCrossEntropyOptions(**options)
    )
    return _finish(loss.float(), inputs)


def trl_chunked(inputs: Inputs) -> tuple[Tensor, ...]:
    """The loss of SFTTrainer with loss_type="chunked_nll", without its additional metrics, which would slow it down."""
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction

    rows, targets = _supervised(inputs)
    outputs = _ChunkedLogProbFunction.apply(
        rows, inputs.weight, None, targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ()
    )
    return _finish(-outputs[0].sum(), inputs)


def liger(inputs: Inputs) -> tuple[Tensor, ...]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    rows, targets = _supervised(inputs)
    return _finish(LigerFusedLinearCrossEntropyLoss(reduction="sum")(inputs.weight, rows, targets), inputs)


def quack(inputs: Inputs) -> tuple[Tensor, ...]:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    rows, targets = _supervised(inputs)
    return _finish(chunked_linear_cross_entropy(rows, inputs.weight, targets, reduction="sum"), inputs)


def cut_cross_entropy(inputs: Inputs) -> tuple[Tensor, ...]:
    from cut_cross_entropy import linear_cross_entropy as cce

    impl = "cce" if DEVICE == "cuda" else "torch_compile"
    return _finish(cce(inputs.hidden, inputs.weight, inputs.targets, reduction="sum", impl=impl), inputs)


def _why_not_native() -> str | None:
    return None if hasattr(F, "linear_cross_entropy") else f"torch {torch.__version__} has no linear_cross_entropy"


def _why_not_package(name: str, *, cuda: bool = False) -> str | None:
    if not is_installed(name):
        return f"{name} is not installed (extra: peers)"
    return f"{name} needs a GPU" if cuda and DEVICE != "cuda" else None


def _why_not_trl() -> str | None:
    if reason := _why_not_package("trl"):
        return reason
    import trl.trainer.utils

    found = hasattr(trl.trainer.utils, "_ChunkedLogProbFunction")
    return None if found else f"trl {trl.__version__} does not have the chunked loss that this bench calls"


CONTENDERS: dict[str, Contender] = {
    **{f"ours-{backend.name}": functools.partial(ours, backend.name) for backend in BACKENDS},
    "eager": eager,
    "eager-compact": eager_compact,
    "compile-compact": compiled_compact,
    "torch-fused": torch_fused,
    "torch-fused-tuned": functools.partial(
        torch_fused, acc_policy="compact", chunking_method=None, batch_chunk_size=1024
    ),
    "trl-chunked": trl_chunked,
    "liger": liger,
    "quack": quack,
    "cut-cross-entropy": cut_cross_entropy,
}
WHY_NOT: dict[str, Callable[[], str | None]] = {
    "torch-fused": _why_not_native,
    "torch-fused-tuned": _why_not_native,
    "trl-chunked": _why_not_trl,
    "quack": lambda: _why_not_package("quack", cuda=True),
    "liger": lambda: _why_not_package("liger_kernel", cuda=True),
    "cut-cross-entropy": lambda: _why_not_package("cut_cross_entropy"),
}


def skip_unless_it_runs(name: str, inputs: Inputs) -> None:
    if name in WHY_NOT and (reason := WHY_NOT[name]()):
        pytest.skip(reason)
    for backend in BACKENDS:
        if name == f"ours-{backend.name}" and (reason := backend.why_not(inputs.hidden, inputs.weight)):
            pytest.skip(reason)


# --- correctness and roof -----------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def exact_sample(inputs_key: InputsKey) -> tuple[Tensor, Tensor, Tensor]:
    """Return the summed loss and SAMPLE rows of each gradient in float64; in chunks, since (L, V) logits are large."""
    hidden, weight, targets, positions = make_inputs(*inputs_key)
    wide_weight = weight.detach().double()
    rows = hidden.detach().double()[positions]
    target = targets[positions]
    entries = torch.arange(SAMPLE, device=DEVICE)
    loss = 0.0
    grad_weight = torch.zeros(SAMPLE, rows.shape[1], dtype=torch.float64, device=DEVICE)
    grad_hidden = []
    for begin in range(0, rows.shape[0], 256):
        part, part_target = rows[begin : begin + 256], target[begin : begin + 256]
        logits = part @ wide_weight.T
        loss += F.cross_entropy(logits, part_target, reduction="sum").item()
        dz = logits.softmax(1).scatter_add_(1, part_target[:, None], -torch.ones_like(part[:, :1]))
        grad_weight += dz[:, entries].T @ part
        if begin == 0:
            grad_hidden.append(dz[:SAMPLE] @ wide_weight)
    return torch.tensor(loss, device=DEVICE), UPSTREAM * grad_hidden[0], UPSTREAM * grad_weight


def assert_correct(outputs: tuple[Tensor, ...], key: InputsKey) -> dict[str, float]:
    """Assert that the errors are within the bound that eager in the same dtype meets, and return them.

    An error is the largest absolute difference divided by the largest absolute entry.
    """
    loss, grad_hidden, grad_weight = outputs
    positions = make_inputs(*key).positions[:SAMPLE]
    sample = (loss, grad_hidden[positions], grad_weight[:SAMPLE])
    bound = 2e-4 if key[-1] == torch.float32 else 6e-2
    errors = {}
    for name, value, exact in zip(("loss", "grad_hidden", "grad_weight"), sample, exact_sample(key), strict=True):
        errors[f"error_{name}"] = ((value.double() - exact).abs().max() / exact.abs().max()).item()
        assert errors[f"error_{name}"] < bound, (name, errors)
    return errors


@functools.lru_cache(maxsize=1)
def make_roof(key: InputsKey) -> Callable[[], None]:
    """Return a function that runs the three GEMMs, each in the form that is fastest on this machine."""
    hidden, weight, _, positions = make_inputs(*key)
    rows, weight = hidden.detach()[positions], weight.detach()
    if DEVICE == "cuda":
        rows = rows[:8192]  # logits of all rows may not fit: fewer rows, repeated
    repeats = max(positions.shape[0] // rows.shape[0], 1)
    chosen = fastest_gemms(gemm_candidates(rows, weight))

    def roof() -> None:
        for _ in range(repeats):
            for gemm in chosen:
                gemm()

    return roof


# --- the bench ----------------------------------------------------------------------------------------------------


def _cases() -> list[tuple[int, int, int]]:
    return QUICK + (GPU if DEVICE == "cuda" else FULL)


@pytest.mark.parametrize("name", CONTENDERS)  # the innermost loop, so that the contenders of a case share its inputs
@pytest.mark.parametrize("share", [1.0, 0.5, 0.1], ids=lambda share: f"{share:.0%}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=dtype_name)
@pytest.mark.parametrize(("T", "H", "V"), _cases(), ids=lambda size: str(size))
def bench_linear_cross_entropy(
    benchmark: BenchmarkFixture,
    against_roof: Callable[..., None],
    quick: bool,
    name: str,
    T: int,
    H: int,
    V: int,
    dtype: torch.dtype,
    share: float,
) -> None:
    if quick and ((T, H, V) not in QUICK or share != 0.5):
        pytest.skip("--quick runs only the smallest case, with half of its tokens supervised")
    key = (T, H, V, share, dtype)
    inputs = make_inputs(*key)
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
    benchmark.group = case = f"T={T} H={H} V={V} {share:.0%} {dtype_name(dtype)}"
    against_roof(
        call,
        make_roof(key),
        rounds=11 if duration_s < 0.3 else 5 if duration_s < 5 else 3,
        case=case,
        contender=name,
        flops=6 * L * H * V,
        supervised=L,
        dtype=dtype_name(dtype),
        # both inputs and both gradients, each once
        least_bytes=2 * (L * H + V * H) * inputs.hidden.element_size(),
        **errors,
    )
