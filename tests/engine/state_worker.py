"""Run by test_state.py on each rank: trains a toy at each ZeRO stage, saves, resumes, and prints deviations."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from helpers.toy_training import deviation, toy_config, train_toy

from delib_fast.engine import Ranks


def main(folder: str | Path) -> int:
    folder = Path(folder)
    ranks = Ranks("cpu")
    found = {}
    for precision in ("fp32", "bf16"):
        whole = {}
        for stage in (0, 1, 2, 3):
            root = folder / f"{precision}-z{stage}-{ranks.world_size}"
            config = toy_config(zero_stage=stage, precision=precision)
            whole[stage] = train_toy(ranks, config, 3).weights
            train_toy(ranks, config, 2, save=(root, 2))
            resumed = train_toy(ranks, config, 3, resume=root).weights
            found[f"{precision} z{stage} resumed"] = deviation(whole[stage], resumed)
            found[f"{precision} z{stage} against z0"] = deviation(whole[stage], whole[0])
        other = folder / f"{precision}-z0-1"  # saved by one rank at stage 0, resumed here at stage 3
        resumed = train_toy(ranks, toy_config(zero_stage=3, precision=precision), 3, resume=other).weights
        found[f"{precision} resumed elsewhere"] = deviation(whole[3], resumed)
        if ranks.rank == 0 and ranks.world_size == 1:
            torch.save(whole[0], folder / f"{precision}.pt")
        elif ranks.rank == 0:
            found[f"{precision} against 1 rank"] = deviation(whole[0], torch.load(folder / f"{precision}.pt"))
    if ranks.rank == 0:
        print("RESULT " + json.dumps(found))
    return 0
