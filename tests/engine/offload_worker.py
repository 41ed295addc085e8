"""Run by test_offload.py on each rank: an offloaded run trains like one without offload, and resumes exactly."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from helpers.toy_training import Toy, ToyBatch, deviation, toy_config, train_toy
from torch import nn

from delib_fast.config import ConfigError
from delib_fast.engine import Ranks
from delib_fast.ops import LossOutput

CASES: dict[str, dict[str, Any]] = {
    "z1 optimizer": {"zero_stage": 1, "offload_optimizer": "cpu"},
    "z2 optimizer": {"zero_stage": 2, "offload_optimizer": "cpu"},
    "z3 optimizer": {"zero_stage": 3, "offload_optimizer": "cpu"},
    "z3 both": {"zero_stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
}


class Wide(Toy):
    """Has two matrices that DeepSpeed swaps to a disk (more than 1 MiB a rank). With an even `width`, their gradients
    start at multiples of 512 bytes on 1 and 2 ranks."""

    def __init__(self, width: int = 40960) -> None:
        super().__init__()
        narrow = dict(self.named_children())
        for name in narrow:
            delattr(self, name)
        self.wide, self.back = nn.Linear(33, width, bias=False), nn.Linear(width, 33, bias=False)
        for name, child in narrow.items():
            setattr(self, name, child)

    def forward(self, batch: ToyBatch) -> LossOutput:
        hidden = torch.relu(self.norm(self.embed(batch.x.to(self.embed.weight.dtype))))
        return batch.loss_output(self.head(hidden + self.back(torch.relu(self.wide(hidden)))))


def main(folder: Path) -> None:
    ranks = Ranks("cpu")
    found = {}
    for precision in ("fp32", "bf16"):
        for name, keys in CASES.items():
            root = folder / f"{precision} {name}".replace(" ", "-")
            config = toy_config(precision=precision, **keys)
            plain = train_toy(ranks, toy_config(precision=precision, zero_stage=keys["zero_stage"]), 3).weights
            offloaded = train_toy(ranks, config, 3, save=(root, 2)).weights
            found[f"{precision} {name} against none"] = deviation(plain, offloaded)
            found[f"{precision} {name} resumed"] = deviation(
                offloaded, train_toy(ranks, config, 3, resume=root).weights
            )
    if ranks.rank == 0:
        print("RESULT " + json.dumps(found))


def nvme(folder: Path) -> None:
    """Offload to a disk through the `deepspeed:` block, against offload to host memory; and a resume."""
    ranks, root, disk = Ranks("cpu"), folder / "checkpoints", folder / "disk"
    engine = {"zero_stage": 3, "precision": "bf16"}
    device = {"device": "nvme", "nvme_path": str(disk)}
    config = toy_config(
        deepspeed={"zero_optimization": {"offload_optimizer": device, "offload_param": device}}, **engine
    )
    host = toy_config(offload_optimizer="cpu", offload_parameters="cpu", **engine)
    expected = train_toy(ranks, host, 3, model=Wide()).weights
    offloaded = train_toy(ranks, config, 3, model=Wide(), save=(root, 2)).weights
    found: dict[str, Any] = {
        "against the host": deviation(expected, offloaded),
        "bytes": sum(file.stat().st_size for file in disk.rglob("*.swp")),
        "resumed": deviation(offloaded, train_toy(ranks, config, 3, model=Wide(), resume=root).weights),
    }
    try:
        train_toy(ranks, config, 1, model=Wide(40961))
    except ConfigError as error:
        found["misaligned"] = str(error)
    if ranks.rank == 0:
        print("RESULT " + json.dumps(found))


if __name__ == "__main__":
    {"main": main, "nvme": nvme}[sys.argv[2]](Path(sys.argv[1]))
