"""Run by test_fp16.py on each rank: fp16 on a CPU, which users are refused because it is slow there; it is as exact."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from helpers.tiny_run import tiny
from state_worker import Toy, deviation, leave_checkpoint

from delib_fast import train as train_module
from delib_fast.config.load import parse_config
from delib_fast.engine import Engine, Ranks, StepVerdict
from delib_fast.training import throughput

STEPS = 8
STEADY = {"initial_scale_power": 8, "loss_scale_window": 1000}  # as good as no scaling: nothing under- or overflows
GROWING = {"initial_scale_power": 4, "loss_scale_window": 2}
HIGH = {"initial_scale_power": 21, "hysteresis": 1, "loss_scale_window": 3}


def let_cpus_compute_fp16() -> None:
    """DeepSpeed refuses it where the processor has no units for it (AVX-512 FP16)."""
    get_accelerator().is_fp16_supported = lambda: True


@dataclass
class Trained:
    weights: dict[str, torch.Tensor]
    losses: list[float] = field(default_factory=list)
    scales: list[float | None] = field(default_factory=list)
    verdicts: list[StepVerdict] = field(default_factory=list)
    state: Any = None

    def skipped(self) -> list[int]:
        return [v.step for v in self.verdicts if v.skipped]


def train(
    ranks: Ranks,
    stage: int,
    precision: str = "fp16",
    scaling: dict[str, Any] | None = None,
    *,
    optimizer: str = "adamw",
    leave_out: tuple[int, ...] = (),
    spoil: tuple[int, ...] = (),
    save: tuple[Path, int] | None = None,
    resume: Path | None = None,
    **keys: Any,
) -> Trained:
    """leave_out: steps that are not taken at all; spoil: those whose gradient is infinite at any scale."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(64, 7, generator=generator), torch.randint(0, 5, (64,), generator=generator)
    config = parse_config(
        {
            "run_dir": "unused",
            "model": {"path": "unused"},
            "data": {"a": "unused"},
            "engine": {"zero_stage": stage, "precision": precision, **keys},
            **({"deepspeed": {"fp16": scaling}} if scaling else {}),
            "stages": [
                {
                    "kind": "msm",
                    "train": ["a"],
                    "pack_capacity": 1,
                    "tokens_per_step": 4,
                    "optimizer": {"name": optimizer, "lr": 0.05, "weight_decay": 0.1, "warmup": 0.2, "grad_clip": 0.5},
                }
            ],
        }
    )
    engine = Engine(Toy(), config, config.stages[0], 10, ranks)
    if resume is not None:
        assert engine.resume(resume, print) is not None
    made, share = Trained({}), 4 // ranks.world_size
    while engine.step < STEPS:
        if engine.step in leave_out:
            engine.step += 1
            continue
        if save is not None and engine.step == save[1]:
            leave_checkpoint(engine, save[0], ranks)
        engine.begin_step()
        loss = 0.0
        for i in range(share):
            rows = slice((ranks.rank * share + i) * 16, (ranks.rank * share + i + 1) * 16)
            output = engine.forward((x[rows], y[rows]))
            loss += float(output.loss_sum.detach())
            engine.backward(output.loss_sum * (1e30 if engine.step in spoil else 1.0), 64.0)
        engine.end_step()
        made.losses.append(ranks.sum(loss)[0] / 64)
        made.scales.append(engine.loss_scale)
    made.verdicts = engine.guard.read()[0]
    made.weights = engine.full_weights()
    made.state = engine._scaler and engine._scaler.state()
    engine.close()
    return made


def stage_facts(ranks: Ranks, stage: int, folder: Path) -> dict[str, Any]:
    exact, steady = train(ranks, stage, "fp32"), train(ranks, stage, scaling=STEADY)
    growing, high = train(ranks, stage, scaling=GROWING), train(ranks, stage, scaling=HIGH, save=(folder, 5))
    without = train(ranks, stage, scaling=STEADY, leave_out=tuple(high.skipped()))
    resumed = train(ranks, stage, scaling=HIGH, resume=folder)
    static = train(ranks, stage, scaling={"loss_scale": 256.0}, spoil=(3,))
    floor = train(ranks, stage, scaling={"initial_scale_power": 1, "hysteresis": 1}, spoil=(3, 5))
    return {
        "losses": [exact.losses, steady.losses],
        "growing": deviation(growing.weights, steady.weights),
        "growing scales": growing.scales,
        "norms": [[v.norm for v in made.verdicts] for made in (growing, steady)],
        "high scales": high.scales,
        "high skipped": high.skipped(),
        "high excused": [v.step for v in high.verdicts if v.due_to_loss_scale],
        "high against the steps not taken": deviation(high.weights, without.weights),
        "resumed": deviation(high.weights, resumed.weights),
        "resumed scales": resumed.scales,
        "resumed state": resumed.state == high.state,
        "static": [(v.step, v.due_to_loss_scale) for v in static.verdicts if v.skipped],
        "floor": [
            (v.step, v.due_to_loss_scale, s) for v, s in zip(floor.verdicts, floor.scales, strict=True) if v.skipped
        ],
        "finite": all(bool(w.isfinite().all()) for made in (static, floor) for w in made.weights.values()),
    }


def other_facts(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Other updates of the same gradients: by Muon, and on the host."""
    found = {}
    for stage in (1, 2, 3):
        muon = {"optimizer": "muon"}
        offload = {"offload_optimizer": "cpu"} | ({"offload_parameters": "cpu"} if stage == 3 else {})
        for name, keys in {"muon": muon, "offload": offload}.items():
            root = folder / f"{name}-z{stage}-{ranks.world_size}"
            exact = train(ranks, stage, "fp32", **keys)
            made = train(ranks, stage, scaling=HIGH, save=(root, 5), **keys)
            without = train(ranks, stage, scaling=STEADY, leave_out=tuple(made.skipped()), **keys)
            found[f"{name} z{stage}"] = {
                "losses": [exact.losses, without.losses],
                "skipped": made.skipped(),
                "against the steps not taken": deviation(made.weights, without.weights),
                "resumed": deviation(made.weights, train(ranks, stage, scaling=HIGH, resume=root, **keys).weights),
            }
    return found


def toy(folder: str) -> int:
    let_cpus_compute_fp16()
    ranks = Ranks("cpu")
    found = {
        str(stage): stage_facts(ranks, stage, Path(folder) / f"z{stage}-{ranks.world_size}") for stage in (0, 1, 2, 3)
    } | other_facts(ranks, Path(folder))
    if ranks.rank == 0:
        print("RESULT " + json.dumps(found))
    return 0


def whole(folder: str, *overrides: str) -> int:
    """A whole run of two stages, by the command; stopped after the update FP16_STOP_AFTER, if that is set."""
    let_cpus_compute_fp16()
    train_module.with_precision = lambda config, ranks: config
    throughput._MEASURE = 64  # of 1,024 rows a CPU makes a product in 17 seconds
    last = os.environ.pop("FP16_STOP_AFTER", None)

    def stop(context: Any, engine: Engine, _stage: Any) -> None:
        context.stop.asked |= engine.step == int(last or 0)

    path = Path(folder) / "run.yaml"
    config = path if path.exists() else tiny(path.parent)
    return train_module.main(
        [
            "--config",
            str(config),
            *(word for item in ("engine.precision=fp16", *overrides) for word in ("--set", item)),
        ],
        stop if last else None,
    )
