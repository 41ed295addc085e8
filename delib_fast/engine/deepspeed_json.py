"""Generates DeepSpeed's configuration from ours, so that the batch arithmetic has one source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from delib_fast.config import REDUCE_BUCKET, Config, ConfigError, StageBase, effective_zero_stage, packs_per_rank

# What the user's `deepspeed:` block may not set, and which key of ours to set instead, if there is one.
_RESERVED = {
    "train_batch_size": "stages.N.tokens_per_step and stages.N.pack_capacity",
    "train_micro_batch_size_per_gpu": None,  # a micro-batch is always one pack
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


def deepspeed_json(config: Config, stage: StageBase, world_size: int, *, gpu: bool = False) -> dict[str, Any]:
    """DeepSpeed's configuration for one stage, with the user's `deepspeed:` block merged into it.

    Args:
        world_size: the number of ranks.
        gpu: whether the ranks compute on GPUs.
    Raises:
        ConfigError: a step's packs cannot be divided evenly among the ranks; or the block sets a reserved key, or
            an offload to NVMe with which DeepSpeed trains wrongly.
    """
    engine = config.engine
    zero_stage = effective_zero_stage(config, stage, world_size, engine.precision, gpu=gpu)
    accumulation = packs_per_rank(stage, world_size, engine.sequence_parallel)
    pin_memory = torch.cuda.is_available()
    offload = {"offload_optimizer": engine.offload_optimizer, "offload_param": engine.offload_parameters}
    generated: dict[str, Any] = {
        # DeepSpeed averages over all ranks, so it counts each shard of a pack as a micro-batch.
        "train_batch_size": stage.packs_per_step * engine.sequence_parallel,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": stage.optimizer.grad_clip,  # without this key, DeepSpeed 0.19 clips at 1.0
        "bf16": {"enabled": engine.precision == "bf16"},
        "fp16": {"enabled": engine.precision == "fp16"},
        "zero_optimization": {
            "stage": zero_stage,
            **{key: {"device": d, "pin_memory": pin_memory} for key, d in offload.items() if d != "none"},
            # Gradients are summed during the backward pass, from two buffers of this many elements.
            **({"overlap_comm": True, "reduce_bucket_size": REDUCE_BUCKET} if gpu and zero_stage == 2 else {}),
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
    if zero_stage >= 1:
        generated["data_types"] = {"grad_accum_dtype": "fp32"}
    merged = _merge(generated, config.deepspeed, ())
    _refuse_wrong_nvme(merged["zero_optimization"], engine.precision, stage.optimizer.name)
    return merged


def _merge(ours: dict[str, Any], theirs: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    """`theirs` merged into `ours`. Raises ConfigError if a reserved key has another value."""
    merged = dict(ours)
    for key, value in theirs.items():
        name = ".".join((*path, key))
        if name in _RESERVED and ours.get(key) != value and not _is_nvme(value):
            decided = f" (here {ours[key]!r})" if key in ours else ""
            ours_key = _RESERVED[name]
            raise ConfigError(
                f"deepspeed.{name}: {value!r} conflicts with what this configuration decides{decided}; "
                f"{f'set {ours_key} instead' if ours_key else 'remove it'}"
            )
        if isinstance(value, Mapping) and isinstance(ours.get(key), dict):
            merged[key] = _merge(ours[key], value, (*path, key))
        else:
            merged[key] = value
    return merged


def _is_nvme(value: Any) -> bool:
    """Whether a value of the `deepspeed:` block is an offload to NVMe, for which this project has no key."""
    return isinstance(value, Mapping) and value.get("device") == "nvme"


def _refuse_wrong_nvme(zero: Mapping[str, Any], precision: str, optimizer: str) -> None:
    """Raise ConfigError for an offload to NVMe with which DeepSpeed 0.19 trains wrongly.

    With fp32 parameters on NVMe, weights were wrong by 0.16 after three steps on one rank; in bf16 they were exact.
    `engine.sharding.refuse_misaligned_swap` checks what depends on the model.
    """
    for key in ("offload_optimizer", "offload_param"):
        if not _is_nvme(zero.get(key)):
            continue
        name = f"deepspeed.zero_optimization.{key}.device is nvme"
        if zero["stage"] != 3:
            raise ConfigError(f"{name}, which needs ZeRO 3: set engine.zero_stage to 3, or remove it")
        if key == "offload_param" and precision == "fp32":
            raise ConfigError(
                f"{name}, with which DeepSpeed 0.19 trains wrongly in fp32; set engine.precision to bf16, or remove it "
                "and set engine.offload_parameters to cpu"
            )
        if key == "offload_optimizer" and optimizer == "muon":
            raise ConfigError(f"{name}, but muon needs whole matrices in memory; set optimizer.name to adamw")
