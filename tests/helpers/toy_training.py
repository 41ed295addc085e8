"""Train a toy model for a few steps with the engine, save and resume it. The workers of tests/engine share this."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from delib_fast.checkpoint.writer import CheckpointWriter
from delib_fast.config import Config
from delib_fast.config.load import parse_config
from delib_fast.engine import Engine, Ranks, StepVerdict
from delib_fast.ops import LossOutput

NUM_STEPS = 10  # of the learning-rate schedule
ROWS, MICRO_BATCHES = 64, 4  # of a step, over all ranks


@dataclass(frozen=True)
class ToyBatch:
    """A micro-batch of a classification task. `scale` and `offset` change the loss, to make a step bad."""

    x: Tensor
    y: Tensor
    scale: float = 1.0
    offset: float = 0.0
    teacher: None = None

    def to(self, device: torch.device) -> ToyBatch:
        return ToyBatch(self.x.to(device), self.y.to(device), self.scale, self.offset)

    def loss_output(self, logits: Tensor) -> LossOutput:
        nll = nn.functional.cross_entropy(logits.float(), self.y, reduction="none")
        return LossOutput(nll.sum() * self.scale + self.offset, nll.detach(), nll.detach() > 0)


class Toy(nn.Module):
    """A small classifier with odd sizes, so that no parameter divides evenly over two ranks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm, self.head = nn.Linear(7, 33), nn.LayerNorm(33), nn.Linear(33, 5)

    def forward(self, batch: ToyBatch) -> LossOutput:
        return batch.loss_output(self.head(torch.relu(self.norm(self.embed(batch.x.to(self.embed.weight.dtype))))))


def toy_config(
    optimizer: dict[str, Any] | None = None, deepspeed: dict[str, Any] | None = None, **engine: Any
) -> Config:
    """A configuration of one stage with four micro-batches in a step."""
    return parse_config(
        {
            "run_dir": "unused",
            "model": {"path": "unused"},
            "data": {"a": "unused"},
            "engine": engine,
            "deepspeed": deepspeed or {},
            "stages": [
                {
                    "kind": "msm",
                    "train": ["a"],
                    "pack_capacity": 1,
                    "tokens_per_step": MICRO_BATCHES,
                    "optimizer": {"lr": 0.05, "weight_decay": 0.1, "warmup": 0.2} | (optimizer or {}),
                }
            ],
        }
    )


def toy_rows() -> tuple[Tensor, Tensor]:
    """The 64 rows that every step trains on: x (64, 7) float32, y (64,) int64."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(ROWS, 7, generator=generator), torch.randint(0, 5, (ROWS,), generator=generator)


def share_of_rank(rank: int, world_size: int, x: Tensor, y: Tensor) -> list[ToyBatch]:
    """A rank's micro-batches of a step."""
    share, size = MICRO_BATCHES // world_size, ROWS // MICRO_BATCHES
    numbers = range(rank * share, (rank + 1) * share)
    return [ToyBatch(x[i * size : (i + 1) * size], y[i * size : (i + 1) * size]) for i in numbers]


@dataclass
class Trained:
    """The result of a toy run. Only rank 0 has the weights."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    loss_scales: list[float | None] = field(default_factory=list)
    verdicts: list[StepVerdict] = field(default_factory=list)
    bad_packs: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    skipped: int = 0
    scaler: dict[str, Any] | None = None

    def skipped_steps(self) -> list[int]:
        return [v.step for v in self.verdicts if v.skipped]


def train_toy(
    ranks: Ranks,
    config: Config,
    steps: int,
    *,
    model: nn.Module | None = None,
    micro_batches: Callable[[int], Sequence[Any]] | None = None,
    normalizer: float = ROWS,
    omit: Collection[int] = (),
    save: tuple[Path, int] | None = None,
    resume: Path | None = None,
) -> Trained:
    """Train up to step number `steps`.

    Args:
        model: the module to train; by default a `Toy`.
        micro_batches: this rank's micro-batches of a step; by default its share of `toy_rows`.
        omit: steps that are not made, although the learning-rate schedule counts them.
        save: a folder, and the step at which to write a checkpoint into it.
        resume: a folder with a checkpoint to resume from.
    """
    if micro_batches is None:
        share = share_of_rank(ranks.rank, ranks.world_size, *toy_rows())
        micro_batches = lambda step: share  # noqa: E731
    engine = Engine(model or Toy(), config, config.stages[0], NUM_STEPS, ranks)
    if resume is not None:
        assert engine.resume(resume, print) is not None
    made = Trained()
    while engine.step < steps:
        if engine.step in omit:
            engine.step += 1
            continue
        if save is not None and engine.step == save[1]:
            write_checkpoint(engine, save[0], ranks)
        losses: list[float] = []
        engine.train_step(
            micro_batches(engine.step),
            normalizer,
            lambda _, output, losses=losses: losses.append(float(output.loss_sum.detach())),
        )
        made.losses.append(ranks.sum(sum(losses))[0] / normalizer)
        made.loss_scales.append(engine.loss_scale)
    if save is not None and engine.step == save[1]:
        write_checkpoint(engine, save[0], ranks)
    made.skipped = engine.guard.skipped
    made.verdicts, made.bad_packs = engine.guard.read()
    made.scaler = engine._scaler and engine._scaler.state()
    made.weights = engine.full_weights()
    engine.close()
    return made


def write_checkpoint(engine: Engine, folder: Path, ranks: Ranks) -> None:
    writer = CheckpointWriter(folder, ranks)
    engine.save(writer, {})
    writer.wait()


def deviation(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference between two sets of weights; 0 on ranks that have none."""
    return max((float((a[name].float() - b[name].float()).abs().max()) for name in a), default=0.0)
