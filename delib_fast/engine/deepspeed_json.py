"""The DeepSpeed configuration, generated from ours so that batch arithmetic lives in one place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from delib_fast.config import Config, ConfigError, EngineConfig, StageBase, packs_per_rank

# What a user's `deepspeed:` block may not set, and where to set it instead.
_DECIDED = {
    "train_batch_size": "stages.N.tokens_per_step and stages.N.pack_capacity",
    "train_micro_batch_size_per_gpu": "nothing: a micro-batch is one pack",
    "gradient_accumulation_steps": "stages.N.tokens_per_step and stages.N.pack_capacity",
    "gradient_clipping": "stages.N.optimizer.grad_clip",
    "optimizer": "stages.N.optimizer",
    "scheduler": "stages.N.optimizer.schedule",
    "bf16.enabled": "engine.precision",
    "fp16.enabled": "engine.precision",
    "zero_optimization.stage": "engine.zero_stage",
    "zero_optimization.offload_optimizer": "engine.offload_optimizer",
    "zero_optimization.offload_param": "engine.offload_parameters",
}


def effective_zero_stage(config: Config) -> int:
    """The ZeRO stage that DeepSpeed is given.

    DeepSpeed's wrapper for half precision at stage 0 accumulates gradients in bf16; stage 1 keeps them, and the
    master weights, in fp32 (sharded over the ranks). So stage 0 is run as stage 1 unless the precision is fp32.
    """
    return max(config.engine.zero_stage, 0 if config.engine.precision == "fp32" else 1)


def deepspeed_json(config: Config, stage: StageBase, world_size: int) -> dict[str, Any]:
    """DeepSpeed's own configuration for one stage, with the user's `deepspeed:` block merged over it.

    Raises:
        ConfigError: the batch arithmetic is impossible, or the block sets what this configuration decides.
    """
    sequence_parallel = config.engine.sequence_parallel
    accumulation = packs_per_rank(stage, world_size, sequence_parallel)
    generated: dict[str, Any] = {
        # To DeepSpeed each part of a pack is a micro-batch of its rank: it shards, and averages, over all ranks.
        "train_batch_size": stage.packs_per_step * sequence_parallel,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        # DeepSpeed 0.19 clips at 1.0 where this is left out.
        "gradient_clipping": stage.optimizer.grad_clip,
        "bf16": {"enabled": config.engine.precision == "bf16"},
        "fp16": {"enabled": config.engine.precision == "fp16"},
        "zero_optimization": {"stage": effective_zero_stage(config), **_offload(config.engine)},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
    if effective_zero_stage(config) >= 1:
        generated["data_types"] = {"grad_accum_dtype": "fp32"}
    return _merge(generated, config.deepspeed, ())


def _offload(engine: EngineConfig) -> dict[str, Any]:
    pinned = torch.cuda.is_available()  # memory is pinned for a GPU to read
    devices = {"offload_optimizer": engine.offload_optimizer, "offload_param": engine.offload_parameters}
    where = {"cpu": {}, "nvme": {"nvme_path": engine.nvme_path}}
    return {
        key: {"device": device, "pin_memory": pinned, **where[device]}
        for key, device in devices.items()
        if device != "none"
    }


def _merge(ours: dict[str, Any], theirs: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    merged = dict(ours)
    for key, value in theirs.items():
        place = ".".join((*path, key))
        if place in _DECIDED and ours.get(key) != value:
            decided = f" (here {ours[key]!r})" if key in ours else ""
            raise ConfigError(
                f"deepspeed.{place}: {value!r} conflicts with what this configuration decides{decided}; "
                f"set it by {_DECIDED[place]}"
            )
        if isinstance(value, Mapping) and isinstance(ours.get(key), dict):
            merged[key] = _merge(ours[key], value, (*path, key))
        else:
            merged[key] = value
    return merged
