"""Run by test_state.py on each rank: trains a toy at each ZeRO stage, saves, resumes, and prints deviations."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from delib_fast.config import Config
from delib_fast.config.load import parse_config
from delib_fast.engine import CheckpointWriter, Engine, Ranks
from delib_fast.ops import LossOutput


class Toy(nn.Module):
    """Odd sizes, so that no parameter divides evenly over two ranks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm, self.head = nn.Linear(7, 33), nn.LayerNorm(33), nn.Linear(33, 5)

    def forward(self, batch: tuple[torch.Tensor, torch.Tensor]) -> LossOutput:
        x, y = batch
        z = self.head(torch.relu(self.norm(self.embed(x.to(self.embed.weight.dtype)))))
        nll = nn.functional.cross_entropy(z.float(), y, reduction="none")
        return LossOutput(nll.sum(), nll.detach(), nll.detach() > 0)


def configuration(stage: int, precision: str, **engine: str) -> Config:
    return parse_config(
        {
            "run_dir": "unused",
            "model": {"path": "unused"},
            "data": {"a": "unused"},
            "engine": {"zero_stage": stage, "precision": precision, **engine},
            "stages": [
                {
                    "kind": "msm",
                    "train": ["a"],
                    "pack_capacity": 1,
                    "tokens_per_step": 4,
                    "optimizer": {"lr": 0.05, "weight_decay": 0.1, "schedule": "cosine", "warmup": 0.2},
                }
            ],
        }
    )


def leave_checkpoint(engine: Engine, folder: Path, ranks: Ranks) -> None:
    writer = CheckpointWriter(folder, ranks)
    engine.save(writer, {})
    writer.wait()


def train(
    ranks: Ranks, stage: int, precision: str, steps: int, *, save: Path | None = None, resume: Path | None = None
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(64, 7, generator=generator), torch.randint(0, 5, (64,), generator=generator)
    config = configuration(stage, precision)
    engine = Engine(Toy(), config, config.stages[0], 10, ranks)
    if resume is not None:
        assert engine.resume(resume, print) is not None
    share = 4 // ranks.world_size
    while engine.step < steps:
        engine.begin_step()
        for i in range(share):
            rows = slice((ranks.rank * share + i) * 16, (ranks.rank * share + i + 1) * 16)
            engine.backward(engine.forward((x[rows], y[rows])).loss_sum, 64.0)
        engine.end_step()
    if save is not None:
        leave_checkpoint(engine, save, ranks)
    weights = engine.full_weights()
    engine.close()
    return weights


def deviation(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max((float((a[name] - b[name]).abs().max()) for name in a), default=0.0)


def main(folder: str | Path) -> int:
    folder = Path(folder)
    ranks = Ranks("cpu")
    found = {}
    for precision in ("fp32", "bf16"):
        whole = {}
        for stage in (0, 1, 2, 3):
            root = folder / f"{precision}-z{stage}-{ranks.world_size}"
            whole[stage] = train(ranks, stage, precision, 3)
            train(ranks, stage, precision, 2, save=root)
            found[f"{precision} z{stage} resumed"] = deviation(
                whole[stage], train(ranks, stage, precision, 3, resume=root)
            )
            found[f"{precision} z{stage} against z0"] = deviation(whole[stage], whole[0])
        other = folder / f"{precision}-z0-1"  # one rank, stage 0, taken over by this many at stage 3
        found[f"{precision} taken over"] = deviation(whole[3], train(ranks, 3, precision, 3, resume=other))
        if ranks.rank == 0 and ranks.world_size == 1:
            torch.save(whole[0], folder / f"{precision}.pt")
        elif ranks.rank == 0:
            found[f"{precision} against 1 rank"] = deviation(whole[0], torch.load(folder / f"{precision}.pt"))
    if ranks.rank == 0:
        print("RESULT " + json.dumps(found))
    return 0
