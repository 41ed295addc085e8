"""At ZeRO 3 no device holds the whole model: it is sharded before DeepSpeed moves anything."""

from __future__ import annotations

import torch
from torch import nn


def test_stage_3_shards_parameters_one_by_one(monkeypatch):
    from delib_fast.engine import Ranks
    from delib_fast.engine.sharding import shard_parameters

    Ranks("cpu")
    module = nn.Sequential(nn.Embedding(50, 8), nn.BatchNorm1d(8), nn.Linear(8, 300))
    whole = {name: p.detach().clone() for name, p in module.named_parameters()}
    monkeypatch.setattr(nn.Module, "to", _only_casts(nn.Module.to))
    shard_parameters(
        module,
        torch.device("cpu"),
        torch.bfloat16,
        {
            "train_batch_size": 1,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": 3},
        },
        3,
    )
    for name, parameter in module.named_parameters():
        assert parameter.numel() == 0, f"{name} is not sharded"
        held = parameter.ds_tensor[: parameter.ds_numel].view(parameter.ds_shape)
        assert torch.equal(held, whole[name].bfloat16()), name


def _only_casts(plain):
    def to(self, *args, **kwargs):
        assert "device" not in kwargs, "the whole module was moved"
        return plain(self, *args, **kwargs)

    return to
