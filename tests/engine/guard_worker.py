"""Run by test_guard.py on each rank: trains a toy with a bad step in the middle, and prints its outcome."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace

import torch
from helpers.toy_training import ToyBatch, deviation, share_of_rank, toy_config, toy_rows, train_toy

from delib_fast.engine import Ranks

STEPS, BAD = 6, 3


def with_bad_step(ranks: Ranks, kind: str) -> Callable[[int], list[ToyBatch]]:
    """The micro-batches of a step; in step BAD, the last one of the last rank is spoiled."""

    def micro_batches(step: int) -> list[ToyBatch]:
        batches = share_of_rank(ranks.rank, ranks.world_size, *toy_rows())
        if step == BAD and ranks.rank == ranks.world_size - 1:
            if kind == "NaN in a row":
                batches[-1].x[5, 2] = torch.nan
            else:
                batches[-1] = replace(batches[-1], offset=torch.inf)
        return batches

    return micro_batches


def main() -> int:
    ranks = Ranks("cpu")
    found = {}
    for precision, stage, offload in itertools.product(("fp32", "bf16"), (0, 1, 2, 3), ("none", "cpu")):
        if stage == 0 and (precision, offload) != ("fp32", "none"):
            continue  # bf16 runs as stage 1 or 2, and nothing can be offloaded
        config = toy_config(zero_stage=stage, precision=precision, offload_optimizer=offload)
        expected = train_toy(ranks, config, STEPS, omit=[BAD])
        for kind in ("NaN in a row", "infinite loss, finite gradient"):
            made = train_toy(ranks, config, STEPS, micro_batches=with_bad_step(ranks, kind))
            found[f"{precision} z{stage} offload {offload} {kind}"] = {
                "deviation": deviation(made.weights, expected.weights),
                "skipped": made.skipped_steps(),
                "norms": [v.norm for v in made.verdicts],
                "counted": made.skipped,
                "packs": [json.loads(text) for text in ranks.gather_texts(json.dumps(made.bad_packs))],
            }
    if ranks.rank == 0:
        print("RESULT " + json.dumps(found))
    return 0
