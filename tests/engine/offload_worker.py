"""Run by test_offload.py on each rank: what is offloaded trains as it does without, and resumes exactly."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from state_worker import Toy, deviation, leave_checkpoint
from torch import nn

from delib_fast.config import ConfigError
from delib_fast.config.load import parse_config
from delib_fast.engine import Engine, Ranks
from delib_fast.ops import LossOutput

CASES: dict[str, dict[str, Any]] = {
    "z1 optimizer": {"zero_stage": 1, "offload_optimizer": "cpu"},
    "z2 optimizer": {"zero_stage": 2, "offload_optimizer": "cpu"},
    "z3 optimizer": {"zero_stage": 3, "offload_optimizer": "cpu"},
    "z3 both": {"zero_stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
}


# What goes to a disk: the optimizer, and with bf16 the parameters too (DeepSpeed trains wrongly with those in fp32).
DISK: dict[str, tuple[str, dict[str, Any]]] = {
    "fp32 optimizer": ("fp32", {"offload_optimizer": "nvme"}),
    "bf16 optimizer": ("bf16", {"offload_optimizer": "nvme"}),
    "bf16 both": ("bf16", {"offload_optimizer": "nvme", "offload_parameters": "nvme"}),
}


class Wide(Toy):
    """With two matrices that are large enough for DeepSpeed to bring to a disk (1 MiB a rank), whose gradients begin at
    multiples of 512 bytes on 1 and 2 ranks."""

    def __init__(self) -> None:
        super().__init__()
        narrow = dict(self.named_children())
        for name in narrow:
            delattr(self, name)
        self.wide, self.back = nn.Linear(33, 40960, bias=False), nn.Linear(40960, 33, bias=False)
        for name, child in narrow.items():
            setattr(self, name, child)

    def forward(self, batch: tuple[torch.Tensor, torch.Tensor]) -> LossOutput:
        x, y = batch
        hidden = torch.relu(self.norm(self.embed(x.to(self.embed.weight.dtype))))
        z = self.head(hidden + self.back(torch.relu(self.wide(hidden))))
        nll = nn.functional.cross_entropy(z.float(), y, reduction="none")
        return LossOutput(nll.sum(), nll.detach(), nll.detach() > 0)


class Misaligned(Wide):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.back = nn.Linear(33, 40961, bias=False), nn.Linear(40961, 33, bias=False)


def train(
    ranks: Ranks,
    engine_keys: dict[str, Any],
    precision: str,
    steps: int,
    *,
    save: Path | None = None,
    resume: Path | None = None,
    toy: type[Toy] = Toy,
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(64, 7, generator=generator), torch.randint(0, 5, (64,), generator=generator)
    config = parse_config(
        {
            "run_dir": "unused",
            "model": {"path": "unused"},
            "data": {"a": "unused"},
            "engine": {"precision": precision, **engine_keys},
            "stages": [
                {
                    "kind": "msm",
                    "train": ["a"],
                    "pack_capacity": 1,
                    "tokens_per_step": 4,
                    "optimizer": {"lr": 0.05, "weight_decay": 0.1, "warmup": 0.2},
                }
            ],
        }
    )
    engine = Engine(toy(), config, config.stages[0], 10, ranks)
    if resume is not None:
        assert engine.resume(resume, print) is not None
    share = 4 // ranks.world_size
    while engine.step < steps:
        if save is not None and engine.step == steps - 1:
            leave_checkpoint(engine, save, ranks)
        engine.begin_step()
        for i in range(share):
            rows = slice((ranks.rank * share + i) * 16, (ranks.rank * share + i + 1) * 16)
            engine.backward(engine.forward((x[rows], y[rows])).loss_sum, 64.0)
        engine.end_step()
    weights = engine.full_weights()
    engine.close()
    return weights


def main(folder: Path) -> None:
    ranks = Ranks("cpu")
    found = {}
    for precision in ("fp32", "bf16"):
        for name, keys in CASES.items():
            root = folder / f"{precision} {name}".replace(" ", "-")
            plain = train(ranks, {"zero_stage": keys["zero_stage"]}, precision, 3)
            offloaded = train(ranks, keys, precision, 3, save=root)
            found[f"{precision} {name} against none"] = deviation(plain, offloaded)
            found[f"{precision} {name} resumed"] = deviation(offloaded, train(ranks, keys, precision, 3, resume=root))
    if ranks.rank == 0:
        print("RESULT " + json.dumps(found))


def cpu_adam(folder: Path) -> None:
    """DeepSpeed's CPU Adam against torch's: the weights, and a resume of each."""
    ranks, found = Ranks("cpu"), {}
    for name, keys in CASES.items():
        root = folder / name.replace(" ", "-")
        torchs = train(ranks, keys | {"cpu_adam": "torch"}, "fp32", 4)
        deepspeeds = train(ranks, keys | {"cpu_adam": "deepspeed"}, "fp32", 4, save=root)
        found[f"{name} against torch"] = deviation(torchs, deepspeeds)
        found[f"{name} resumed"] = deviation(
            deepspeeds, train(ranks, keys | {"cpu_adam": "deepspeed"}, "fp32", 4, resume=root)
        )
    if ranks.rank == 0:
        print("RESULT " + json.dumps(found))


def disk(folder: Path) -> None:
    """On a disk against in the host's memory, and a resume; and a model whose gradients lie where no read may go."""
    ranks, found = Ranks("cpu"), {}
    for name, (precision, keys) in DISK.items():
        keys, root = {"zero_stage": 3, **keys}, folder / name.replace(" ", "-")
        host = {key: "cpu" if value == "nvme" else value for key, value in keys.items()}
        keys["nvme_path"] = str(folder / "disk")
        expected = train(ranks, host, precision, 3, toy=Wide)
        offloaded = train(ranks, keys, precision, 3, toy=Wide, save=root)
        written = sum(file.stat().st_size for file in (folder / "disk").rglob("*.swp"))
        found[name] = {
            "against the host": deviation(expected, offloaded),
            "bytes": written,
            "resumed": deviation(offloaded, train(ranks, keys, precision, 3, toy=Wide, resume=root)),
        }
    try:
        train(ranks, keys, "bf16", 1, toy=Misaligned)
    except ConfigError as error:
        found["misaligned"] = str(error)
    if ranks.rank == 0:
        print("RESULT " + json.dumps(found))


if __name__ == "__main__":
    {"main": main, "cpu_adam": cpu_adam, "disk": disk}[sys.argv[2]](Path(sys.argv[1]))
