"""A bad step is skipped on every rank, at every ZeRO stage and precision, and leaves the weights unchanged."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from helpers.launch import result_of

CASES = [("fp32", 0, "none"), *itertools.product(("fp32", "bf16"), (1, 2, 3), ("none", "cpu"))]


@pytest.fixture(scope="module")
def found(fork_server):
    result = {}
    for world_size in (1, 2):
        first = fork_server.run("guard_worker:main", [], world_size=world_size, LAUNCHED="yes")[0]
        result[world_size] = result_of(first)
    return result


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("kind", ["NaN in a row", "infinite loss, finite gradient"])
@pytest.mark.parametrize(("precision", "stage", "offload"), CASES)
def test_bad_step_is_skipped(found, world_size, kind, precision, stage, offload):
    """DeepSpeed alone ruins the weights at stage 0, and skips silently at the others. If only the loss is infinite, it
    makes the step on the ranks whose losses are finite. In bf16 with an offloaded optimizer (ZeRO 1 and 2) it never
    makes a step again, because its buffers keep the NaN."""
    case = found[world_size][f"{precision} z{stage} offload {offload} {kind}"]
    assert case["deviation"] == 0.0, "as if the step had not been made"
    assert case["skipped"] == [3]
    assert case["counted"] == 1
    assert [norm is None for norm in case["norms"]] == [False, False, False, True, False, False]
    if kind == "NaN in a row":
        packs, token = 4 // world_size, 5
        assert case["packs"] == [{}] * (world_size - 1) + [{"3": [[packs - 1, token]]}], "which rank, pack and token"


class Plain(torch.optim.SGD):
    """An optimizer that ignores `found_inf`."""


def guard_of(optimizer, norms, factor=10.0):
    from delib_fast.engine.step_guard import StepGuard

    values = iter(norms)
    return StepGuard(optimizer, lambda: torch.tensor(next(values)), torch.device("cpu"), factor)


@pytest.mark.parametrize("make", [lambda p: torch.optim.AdamW(p, lr=0.1, fused=True), lambda p: Plain(p, lr=0.1)])
def test_spikes_are_skipped_once_the_mean_is_known(make):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = make([weight])
    norms = [5.0, 60.0, *[1.0] * 40, 35.0, 1.0]  # first norms are often high, and there is no mean yet
    guard, moved = guard_of(optimizer, norms), []
    for step in range(len(norms)):
        before = weight.detach().clone()
        weight.grad = torch.ones(3)
        optimizer.step()
        guard.end_step(step, applied=True)
        moved.append(not torch.equal(weight, before))
    verdicts, _ = guard.read()
    mean = (0.98 * 5 + 0.02 * 60) * 0.98**40 + (1 - 0.98**40)
    assert verdicts[42].mean_norm == pytest.approx(mean, rel=1e-5)
    assert [v.step for v in verdicts if v.skipped] == [42]
    assert [step for step, m in enumerate(moved) if not m] == [42]


def test_state_survives_a_checkpoint():
    """A resumed run must reach the same verdicts as an uninterrupted one."""
    weight = torch.nn.Parameter(torch.ones(1))
    norms = [1.0 + 0.1 * i for i in range(30)]
    whole = guard_of(torch.optim.AdamW([weight], fused=True), norms)
    resumed = guard_of(torch.optim.AdamW([weight], fused=True), norms[20:])
    weight.grad = torch.ones(1)
    for step in range(30):
        if step == 20:
            resumed.restore(json.loads(json.dumps(whole.state())))
        for guard in (whole, resumed)[: 1 + (step >= 20)]:
            guard._guarded_step()
            guard.end_step(step, applied=True)
    assert whole.state() == resumed.state()
