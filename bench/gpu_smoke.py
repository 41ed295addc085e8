"""The first 30 seconds on a GPU: kernels against float64, and training steps, one line each; see bench/gpu.sh."""

import itertools
import os
import sys
import time
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT), str(ROOT / "bench"), str(ROOT / "tests")]
GPU = torch.cuda.is_available()
DEVICE, T, H, V, LENGTHS = ("cuda", 2048, 1024, 151_936, (1500, 37, 511)) if GPU else ("cpu", 48, 24, 96, (20, 1, 11))


def against_float64(call, *tensors):  # call(backend, *leaves) in bfloat16 and, with the reference, in float64
    results = []
    for dtype, reference in ((torch.bfloat16, False), (torch.float64, True)):
        leaves = [t.bfloat16().to(dtype).requires_grad_() for t in tensors]
        out = call(reference, *leaves)
        results.append((out.detach(), *torch.autograd.grad(out.square().sum(), leaves)))
    for ours, exact in zip(*results, strict=True):
        error = ((ours.double() - exact).abs().max() / exact.abs().max()).item()
        assert error < 3e-2, f"relative error {error:.1e}"


def loss(backend, vocabulary, kept):  # three chunks; kept: the backward pass computes the head's gradient
    from delib_fast.ops import linear_cross_entropy as op

    targets, rows = torch.randint(vocabulary, (T,), device=DEVICE), torch.arange(0, T, 2, device=DEVICE)
    how = {"loss_positions": rows if kept else None, "chunk_tokens": 384 if GPU else 16}
    x, w = torch.randn(T, H, device=DEVICE), torch.randn(vocabulary, H, device=DEVICE) * 2 / H**0.5
    against_float64(lambda ref, *xw: op(*xw, targets, backend="reference" if ref else backend, **how).loss_sum, x, w)


def attention():
    from delib_fast.ops import varlen_attention as op

    borders = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32, device=DEVICE)
    qkv = [torch.randn(sum(LENGTHS), heads, 64, device=DEVICE) for heads in (8, 2, 2)]
    against_float64(lambda ref, *x: op(*x, borders, max(LENGTHS), backend="reference" if ref else "auto"), *qkv)


def steps(layers, checkpointed):  # the first pass is eager, so that three steps run a compiled block
    from step_cases import SHAPES, Workload

    from delib_fast.engine import Engine
    from delib_fast.models import TrainableLM
    from delib_fast.models.recompute import recompute

    work, losses = Workload(SHAPES["quick"], "short"), []
    recompute(model := work.model().to(DEVICE), "full" if checkpointed else "none")
    engine = Engine(TrainableLM(model, layers=layers), work.config, work.stage, 9, work.ranks)
    for _ in range(3):
        engine.train_step(work.micro_batches, work.normalizer, lambda _, out: losses.append(out.loss_sum.item()))
    assert losses[-1] < losses[0], losses


CHECKS = {
    f"loss {b} V={v} kept={k}": partial(loss, b, v, k) for b in ("cuda", "triton") for v in (V, V + 1) for k in (0, 1)
}
CHECKS |= {"attention": attention}
CHECKS |= {f"steps {x} checkpointed={c}": partial(steps, x, c) for x in ("eager", "compile") for c in (0, 1)}
if __name__ == "__main__":
    failed = 0
    if not GPU:  # the device checks are inverted
        os.environ["TRITON_INTERPRET"] = "1"
        import pytest
        from helpers.as_if_gpu import as_if_gpu

        registered = as_if_gpu(pytest.MonkeyPatch())
    for name, check in CHECKS.items():
        began, outcome = time.perf_counter(), "passed"
        try:
            check()
        except Exception as error:  # noqa: BLE001 - the other checks still run
            failed, outcome = failed + 1, f"FAILED {type(error).__name__}: {str(error)[:300]}"
        print(f"{outcome}  {name} ({time.perf_counter() - began:.1f} s)", flush=True)
    sys.exit(failed)
