"""Run by test_guard.py on each rank: trains a toy with a bad step in the middle, and prints what became of it."""

from __future__ import annotations

import itertools
import json

import torch
from state_worker import Toy, configuration, deviation

from delib_fast.engine import Engine, Ranks
from delib_fast.ops import LossOutput

STEPS, BAD = 6, 3


def spoil(kind: str, x: torch.Tensor, output: LossOutput) -> LossOutput:
    if kind == "infinite loss, finite gradient":
        return LossOutput(output.loss_sum + torch.inf, output.nll, output.correct)
    return output


def train(
    ranks: Ranks, stage: int, precision: str, kind: str | None, offload: str
) -> tuple[dict[str, torch.Tensor], Engine]:
    """`kind` spoils one micro-batch of the last rank in step BAD; None: the step is not taken at all."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(64, 7, generator=generator), torch.randint(0, 5, (64,), generator=generator)
    config = configuration(stage, precision, offload_optimizer=offload)
    engine = Engine(Toy(), config, config.stages[0], 10, ranks)
    share = 4 // ranks.world_size
    while engine.step < STEPS:
        if kind is None and engine.step == BAD:
            engine.step += 1
            continue
        engine.begin_step()
        for i in range(share):
            rows = slice((ranks.rank * share + i) * 16, (ranks.rank * share + i + 1) * 16)
            bad = engine.step == BAD and ranks.rank == ranks.world_size - 1 and i == share - 1
            given = x[rows].clone()
            if bad and kind == "not a number in a row":
                given[5, 2] = torch.nan
            output = engine.forward((given, y[rows]))
            engine.backward((spoil(kind or "", given, output) if bad else output).loss_sum, 64.0)
        engine.end_step()
    return engine.full_weights(), engine


def main() -> int:
    ranks = Ranks("cpu")
    found = {}
    for precision, stage, offload in itertools.product(("fp32", "bf16"), (0, 1, 2, 3), ("none", "cpu")):
        if stage == 0 and (precision, offload) != ("fp32", "none"):
            continue  # bf16 runs as stage 1, and nothing can be offloaded
        expected, engine = train(ranks, stage, precision, None, offload)
        engine.close()
        for kind in ("not a number in a row", "infinite loss, finite gradient"):
            weights, engine = train(ranks, stage, precision, kind, offload)
            verdicts, packs = engine.guard.read()
            found[f"{precision} z{stage} offload {offload} {kind}"] = {
                "deviation": deviation(weights, expected),
                "skipped": [v.step for v in verdicts if v.skipped],
                "norms": [v.norm for v in verdicts],
                "counted": engine.guard.skipped,
                "packs": [json.loads(text) for text in ranks.gather_texts(json.dumps(packs))],
            }
            engine.close()
    if ranks.rank == 0:
        print("RESULT " + json.dumps(found))
    return 0
