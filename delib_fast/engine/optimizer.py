"""The optimizer and its learning-rate schedule: pure functions of the configuration and the step."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import nn

from delib_fast.config import ConfigError, OptimizerConfig
from delib_fast.engine.cpu_adam import CPUAdam
from delib_fast.engine.muon import Muon, hidden_matrices

ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")


def learning_rate(step: int, num_steps: int, config: OptimizerConfig) -> float:
    """Learning rate of update `step` (0-based) of `num_steps`.

    Rises linearly over the first `warmup` share of the steps, reaching lr at its end, then falls to
    lr · min_lr_ratio by a half cosine or a line, or stays; or (wsd) stays and falls by a line over the last `decay`
    share of the steps (arXiv 2404.06395).
    """
    warmup_steps = min(math.ceil(config.warmup * num_steps), num_steps - 1)
    if step < warmup_steps:
        return config.lr * (step + 1) / (warmup_steps + 1)
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "wsd":
        fall_steps = max(1, min(math.ceil(config.decay * num_steps), num_steps - warmup_steps))
        fall = min(1.0, (num_steps - step) / fall_steps)
        return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * fall)
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    fall = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * fall)


def build_optimizer(
    module: nn.Module, config: OptimizerConfig, precision: str = "fp32", *, cpu_adam: bool = False
) -> torch.optim.Optimizer:
    """The optimizer over the module's trainable parameters; weight decay only on matrices. cpu_adam: by DeepSpeed's
    AdamW for a CPU.

    It starts with a learning rate of 0: DeepSpeed takes an optimizer step with zero gradients to allocate its
    state, and AdamW's decoupled decay would shrink every weight by lr · decay in it.
    """
    matrices = hidden_matrices(module) if config.name == "muon" else []
    trainable = [p for p in module.parameters() if p.requires_grad and all(p is not m for m in matrices)]
    groups = [
        {"params": [p for p in trainable if _full_ndim(p) >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if _full_ndim(p) < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=0.0)
    adamw = partial(torch.optim.AdamW, lr=0.0, betas=config.betas, eps=config.eps, fused=True)
    if cpu_adam:
        return CPUAdam(groups, lr=0.0, betas=config.betas, eps=config.eps)
    if config.name == "adamw":
        return adamw(groups)
    if not matrices:
        raise ConfigError("optimizer.name is muon, and no hidden matrix is trained; set adamw")
    return Muon(
        matrices,
        groups,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        adamw=adamw,
        dtype=torch.float32 if precision == "fp32" else torch.bfloat16,
    )


def moments_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> tuple[str, ...]:
    """Names of the tensors that the optimizer keeps for a parameter, of its shape."""
    if isinstance(optimizer, Muon):
        return optimizer.moments(parameter)
    return () if isinstance(optimizer, torch.optim.SGD) else ADAM_MOMENTS


def _full_ndim(parameter: nn.Parameter) -> int:
    """Dimensions of the parameter before ZeRO-3 flattened it into its partitions."""
    return len(getattr(parameter, "ds_shape", parameter.shape))
