"""Run by test_fp16.py on each rank: fp16 on a CPU, which users cannot choose, because it is slow there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from deepspeed.accelerator import get_accelerator
from helpers.callbacks import StopAfter
from helpers.tiny_run import tiny
from helpers.toy_training import ToyBatch, Trained, deviation, share_of_rank, toy_config, toy_rows, train_toy

from delib_fast import train as train_module
from delib_fast.engine import Ranks
from delib_fast.training import run as run_module
from delib_fast.training import throughput

STEPS = 8
STEADY = {"initial_scale_power": 8, "loss_scale_window": 1000}  # equivalent to no scaling: nothing under- or overflows
GROWING = {"initial_scale_power": 4, "loss_scale_window": 2}
HIGH = {"initial_scale_power": 21, "hysteresis": 1, "loss_scale_window": 3}


def let_cpus_compute_fp16() -> None:
    """Let DeepSpeed run fp16 on processors without AVX-512 FP16, which it refuses."""
    get_accelerator().is_fp16_supported = lambda: True


def spoiling(ranks: Ranks, steps: tuple[int, ...]) -> Callable[[int], list[ToyBatch]]:
    """The micro-batches of a step; those of `steps` have an infinite gradient at any loss scale."""

    def micro_batches(step: int) -> list[ToyBatch]:
        scale = 1e30 if step in steps else 1.0
        return [replace(batch, scale=scale) for batch in share_of_rank(ranks.rank, ranks.world_size, *toy_rows())]

    return micro_batches


def train(
    ranks: Ranks,
    stage: int,
    precision: str = "fp16",
    scaling: dict[str, Any] | None = None,
    *,
    optimizer: str = "adamw",
    omit: tuple[int, ...] = (),
    spoil: tuple[int, ...] = (),
    save: tuple[Path, int] | None = None,
    resume: Path | None = None,
    **engine: Any,
) -> Trained:
    config = toy_config(
        {"name": optimizer, "grad_clip": 0.5},
        {"fp16": scaling} if scaling else None,
        zero_stage=stage,
        precision=precision,
        **engine,
    )
    batches = spoiling(ranks, spoil)
    return train_toy(ranks, config, STEPS, micro_batches=batches, omit=omit, save=save, resume=resume)


def stage_facts(ranks: Ranks, stage: int, folder: Path) -> dict[str, Any]:
    exact, steady = train(ranks, stage, "fp32"), train(ranks, stage, scaling=STEADY)
    growing, high = train(ranks, stage, scaling=GROWING), train(ranks, stage, scaling=HIGH, save=(folder, 5))
    without = train(ranks, stage, scaling=STEADY, omit=tuple(high.skipped_steps()))
    resumed = train(ranks, stage, scaling=HIGH, resume=folder)
    static = train(ranks, stage, scaling={"loss_scale": 256.0}, spoil=(3,))
    floor = train(ranks, stage, scaling={"initial_scale_power": 1, "hysteresis": 1}, spoil=(3, 5))
    return {
        "losses": [exact.losses, steady.losses],
        "growing": deviation(growing.weights, steady.weights),
        "growing scales": growing.loss_scales,
        "norms": [[v.norm for v in made.verdicts] for made in (growing, steady)],
        "high scales": high.loss_scales,
        "high skipped": high.skipped_steps(),
        "high due to loss scale": [v.step for v in high.verdicts if v.due_to_loss_scale],
        "high against omitted steps": deviation(high.weights, without.weights),
        "resumed": deviation(high.weights, resumed.weights),
        "resumed scales": resumed.loss_scales,
        "resumed state": resumed.scaler == high.scaler,
        "static": [(v.step, v.due_to_loss_scale) for v in static.verdicts if v.skipped],
        "floor": [
            (v.step, v.due_to_loss_scale, s)
            for v, s in zip(floor.verdicts, floor.loss_scales, strict=True)
            if v.skipped
        ],
        "finite": all(bool(w.isfinite().all()) for made in (static, floor) for w in made.weights.values()),
    }


def optimizer_facts(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """The same gradients with other optimizer steps: Muon's, and AdamW's on the host."""
    found = {}
    for stage in (1, 2, 3):
        muon = {"optimizer": "muon"}
        offload = {"offload_optimizer": "cpu"} | ({"offload_parameters": "cpu"} if stage == 3 else {})
        for name, keys in {"muon": muon, "offload": offload}.items():
            root = folder / f"{name}-z{stage}-{ranks.world_size}"
            exact = train(ranks, stage, "fp32", **keys)
            made = train(ranks, stage, scaling=HIGH, save=(root, 5), **keys)
            without = train(ranks, stage, scaling=STEADY, omit=tuple(made.skipped_steps()), **keys)
            found[f"{name} z{stage}"] = {
                "losses": [exact.losses, without.losses],
                "skipped": made.skipped_steps(),
                "against omitted steps": deviation(made.weights, without.weights),
                "resumed": deviation(made.weights, train(ranks, stage, scaling=HIGH, resume=root, **keys).weights),
            }
    return found


def toy(folder: str) -> int:
    let_cpus_compute_fp16()
    ranks = Ranks("cpu")
    found = {
        str(stage): stage_facts(ranks, stage, Path(folder) / f"z{stage}-{ranks.world_size}") for stage in (0, 1, 2, 3)
    } | optimizer_facts(ranks, Path(folder))
    if ranks.rank == 0:
        print("RESULT " + json.dumps(found))
    return 0


def whole(folder: str, *overrides: str) -> int:
    """Run both stages of the tiny run through the command. FP16_STOP_AFTER, if set, is the step to stop after."""
    let_cpus_compute_fp16()
    run_module.resolve_precision = lambda config, ranks: config
    throughput._MEASURED_SIZE = 64  # rows of the product that measures the device's peak; 1,024 take a CPU 17 seconds
    stop_after = os.environ.pop("FP16_STOP_AFTER", None)
    path = Path(folder) / "run.yaml"
    config = path if path.exists() else tiny(path.parent)
    return train_module.main(
        [
            "--config",
            str(config),
            *(word for item in ("engine.precision=fp16", *overrides) for word in ("--set", item)),
        ],
        [StopAfter(int(stop_after))] if stop_after else [],
    )
