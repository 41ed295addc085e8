"""Run by test_muon.py on each rank: Muon at each ZeRO stage, resumed and offloaded, against torch.optim.Muon."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from helpers.toy_training import ROWS, ToyBatch, deviation, share_of_rank, toy_config, train_toy
from torch import nn

from delib_fast.engine import Ranks
from delib_fast.ops import LossOutput

LR, DECAY, BETA, ADAM_BETAS, EPS = 0.02, 0.1, 0.9, (0.9, 0.95), 1e-8
HIDDEN = {"wide.weight", "square.weight", "tall.weight", "head.weight"}


class Toy(nn.Module):
    """Odd sizes; an embedding, which Muon does not train, and more hidden matrices than ranks: wide, tall, square."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.wide, self.square = nn.Embedding(11, 7), nn.Linear(7, 33), nn.Linear(33, 33)
        self.norm, self.tall, self.head = nn.LayerNorm(33), nn.Linear(33, 9), nn.Linear(9, 5)

    def forward(self, batch: ToyBatch) -> LossOutput:
        z = torch.relu(self.norm(self.square(torch.relu(self.wide(self.embed(batch.x))))))
        return batch.loss_output(self.head(torch.relu(self.tall(z))))


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 11, (ROWS,), generator=generator), torch.randint(0, 5, (ROWS,), generator=generator)


def train(
    ranks: Ranks,
    steps: int,
    *,
    save: tuple[Path, int] | None = None,
    resume: Path | None = None,
    bad: int | None = None,
    **engine: Any,
) -> dict[str, torch.Tensor]:
    """bad: a step whose loss is infinite."""
    optimizer = {
        "name": "muon",
        "lr": LR,
        "weight_decay": DECAY,
        "momentum": BETA,
        "schedule": "constant",
        "warmup": 0,
        "betas": ADAM_BETAS,
        "eps": EPS,
        "grad_clip": 0,
    }
    share = share_of_rank(ranks.rank, ranks.world_size, *rows())
    return train_toy(
        ranks,
        toy_config(optimizer, **{"precision": "fp32"} | engine),
        steps,
        model=Toy(),
        micro_batches=lambda step: [replace(batch, scale=torch.inf if step == bad else 1.0) for batch in share],
        save=save,
        resume=resume,
    ).weights


def reference(*world_sizes: int) -> dict[str, torch.Tensor]:
    """The same steps by torch.optim.Muon and torch.optim.AdamW on whole matrices, in one process.

    world_sizes: for each step, how many ranks to imitate: the gradients of the micro-batches are added in their order.
    Newton–Schulz in bf16 would magnify another order: three steps then differ by 1e-3.
    """
    model = Toy()
    parameters = dict(model.named_parameters())
    decays = {name: DECAY if p.ndim > 1 else 0.0 for name, p in parameters.items() if name not in HIDDEN}
    optimizers = [
        torch.optim.Muon(
            [parameters[name] for name in sorted(HIDDEN)],
            lr=LR,
            weight_decay=DECAY,
            momentum=BETA,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(
            [{"params": [parameters[name]], "weight_decay": decay} for name, decay in decays.items()],
            lr=LR,
            betas=ADAM_BETAS,
            eps=EPS,
        ),
    ]
    for world_size in world_sizes:
        of_ranks = []
        for rank in range(world_size):
            model.zero_grad()
            for batch in share_of_rank(rank, world_size, *rows()):
                (model(batch).loss_sum * (world_size / ROWS)).backward()
            of_ranks.append([p.grad.clone() for p in parameters.values()])
        for p, *gradients in zip(parameters.values(), *of_ranks, strict=True):
            p.grad = sum(gradients) / world_size
        for optimizer in optimizers:
            optimizer.step()
    return {name: p.detach().clone() for name, p in parameters.items()}


def smallest_cosine(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Between the changes of the hidden matrices and the expected changes; 1 on ranks without weights."""
    if not weights:
        return 1.0
    before = {name: p.detach() for name, p in Toy().named_parameters()}
    return min(
        float(
            nn.functional.cosine_similarity(
                (weights[name] - before[name]).flatten(), (expected[name] - before[name]).flatten(), dim=0
            )
        )
        for name in sorted(HIDDEN)
    )


def main(folder: str | Path) -> int:
    ranks, found = Ranks("cpu"), {}
    size = ranks.world_size
    expected = {steps: reference(*[size] * steps) for steps in (1, 3)}
    for stage in (0, 1, 2, 3):
        root, keys = Path(folder) / f"z{stage}-{size}", {"zero_stage": stage}
        whole = train(ranks, 3, **keys)
        found[f"z{stage} one step"] = deviation(train(ranks, 1, save=(root, 1), **keys), expected[1])
        found[f"z{stage} three steps"] = deviation(whole, expected[3])
        found[f"z{stage} resumed"] = deviation(whole, train(ranks, 3, resume=root, **keys))
        found[f"z{stage} bad step skipped"] = deviation(whole, train(ranks, 4, bad=1, **keys))
        if stage:
            found[f"z{stage} offloaded"] = deviation(whole, train(ranks, 3, offload_optimizer="cpu", **keys))
        half = train(ranks, 1, precision="bf16", **keys)
        found[f"z{stage} bf16"] = smallest_cosine(half, expected[1])
    elsewhere = train(ranks, 3, zero_stage=3, resume=Path(folder) / "z0-1")
    found["resumed elsewhere"] = deviation(elsewhere, reference(1, size, size))
    if ranks.rank == 0:
        print("RESULT " + json.dumps(found))
    return 0
