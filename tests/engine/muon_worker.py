"""Run by test_muon.py on each rank: Muon at each ZeRO stage, resumed, offloaded, and against float64 by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from state_worker import deviation, leave_checkpoint
from torch import nn

from delib_fast.config.load import parse_config
from delib_fast.engine import Engine, Ranks
from delib_fast.ops import LossOutput

LR, DECAY, BETA, ADAM_BETAS, EPS = 0.02, 0.1, 0.9, (0.9, 0.95), 1e-8
HIDDEN = {"wide.weight", "square.weight", "tall.weight", "head.weight"}


class Toy(nn.Module):
    """Odd sizes; four hidden matrices, wide, tall and square, more than there are ranks; an embedding that is none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.wide, self.square = nn.Embedding(11, 7), nn.Linear(7, 33), nn.Linear(33, 33)
        self.norm, self.tall, self.head = nn.LayerNorm(33), nn.Linear(33, 9), nn.Linear(9, 5)

    def forward(self, batch: tuple[torch.Tensor, torch.Tensor]) -> LossOutput:
        x, y = batch
        z = torch.relu(self.norm(self.square(torch.relu(self.wide(self.embed(x))))))
        nll = nn.functional.cross_entropy(self.head(torch.relu(self.tall(z))), y, reduction="none")
        return LossOutput(nll.float().sum(), nll.detach().float(), nll.detach() > 0)


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 11, (64,), generator=generator), torch.randint(0, 5, (64,), generator=generator)


def train(
    ranks: Ranks,
    engine_keys: dict[str, Any],
    steps: int,
    *,
    save: Path | None = None,
    resume: Path | None = None,
    bad: int | None = None,
) -> dict[str, torch.Tensor]:
    x, y = rows()
    config = parse_config(
        {
            "run_dir": "unused",
            "model": {"path": "unused"},
            "data": {"a": "unused"},
            "engine": {"precision": "fp32", **engine_keys},
            "stages": [
                {
                    "kind": "msm",
                    "train": ["a"],
                    "pack_capacity": 1,
                    "tokens_per_step": 4,
                    "optimizer": {
                        "name": "muon",
                        "lr": LR,
                        "weight_decay": DECAY,
                        "momentum": BETA,
                        "schedule": "constant",
                        "warmup": 0,
                        "betas": ADAM_BETAS,
                        "eps": EPS,
                        "grad_clip": 0,
                    },
                }
            ],
        }
    )
    engine = Engine(Toy(), config, config.stages[0], 10, ranks)
    if resume is not None:
        assert engine.resume(resume, print) is not None
    share = 4 // ranks.world_size
    done = engine.step
    while done < steps:
        engine.begin_step()
        for i in range(share):
            part = slice((ranks.rank * share + i) * 16, (ranks.rank * share + i + 1) * 16)
            loss = engine.forward((x[part], y[part])).loss_sum
            engine.backward(loss * (torch.inf if bad == done else 1.0), 64.0)
        engine.end_step()
        if bad == done:  # the same step once more
            bad = None
        else:
            done += 1
    if save is not None:
        leave_checkpoint(engine, save, ranks)
    weights = engine.full_weights()
    engine.close()
    return weights


def reference(steps: int) -> dict[str, torch.Tensor]:
    """float64, whole matrices, written out; Newton–Schulz by the polynomial of each singular value."""
    model, (x, y) = Toy().double(), rows()
    m = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    v = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for step in range(1, steps + 1):
        model.zero_grad()
        (
            nn.functional.cross_entropy(
                model.head(
                    torch.relu(model.tall(torch.relu(model.norm(model.square(torch.relu(model.wide(model.embed(x))))))))
                ),
                y,
                reduction="sum",
            )
            / 64
        ).backward()
        with torch.no_grad():
            for name, p in model.named_parameters():
                beta = BETA if name in HIDDEN else ADAM_BETAS[0]
                m[name] = beta * m[name] + (1 - beta) * p.grad
                if name in HIDDEN:
                    u, s, vt = torch.linalg.svd(beta * m[name] + (1 - beta) * p.grad, full_matrices=False)
                    s = s / s.norm()
                    for _ in range(5):
                        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
                    update = 0.2 * max(p.shape) ** 0.5 * (u * s) @ vt
                else:
                    v[name] = ADAM_BETAS[1] * v[name] + (1 - ADAM_BETAS[1]) * p.grad**2
                    update = (
                        m[name] / (1 - ADAM_BETAS[0] ** step) / ((v[name] / (1 - ADAM_BETAS[1] ** step)).sqrt() + EPS)
                    )
                p.mul_(1 - LR * (DECAY if p.ndim > 1 else 0)).sub_(LR * update)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed_alike(weights: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """Over the hidden matrices the smallest cosine between what a step changed and what it should have."""
    if not weights:  # rank 0 alone has them
        return 1.0
    before = {name: p.detach() for name, p in Toy().double().named_parameters()}
    return min(
        float(
            nn.functional.cosine_similarity(
                (weights[name] - before[name]).flatten(), (exact[name] - before[name]).flatten(), dim=0
            )
        )
        for name in sorted(HIDDEN)
    )


def main(folder: str | Path) -> int:
    ranks, found = Ranks("cpu"), {}
    exact = {steps: reference(steps) for steps in (1, 3)}
    for stage in (0, 1, 2, 3):
        root, keys = Path(folder) / f"z{stage}-{ranks.world_size}", {"zero_stage": stage}
        whole = train(ranks, keys, 3)
        found[f"z{stage} one step"] = deviation(train(ranks, keys, 1, save=root), exact[1])
        found[f"z{stage} three steps"] = deviation(whole, exact[3])
        found[f"z{stage} resumed"] = deviation(whole, train(ranks, keys, 3, resume=root))
        found[f"z{stage} bad step left out"] = deviation(whole, train(ranks, keys, 3, bad=1))
        if stage:
            found[f"z{stage} offloaded"] = deviation(whole, train(ranks, keys | {"offload_optimizer": "cpu"}, 3))
        half = train(ranks, keys | {"precision": "bf16"}, 1)
        found[f"z{stage} bf16"] = changed_alike(half, exact[1])
    found["taken over"] = deviation(train(ranks, {"zero_stage": 3}, 3, resume=Path(folder) / "z0-1"), exact[3])
    if ranks.rank == 0:
        print("RESULT " + json.dumps(found))
    return 0
