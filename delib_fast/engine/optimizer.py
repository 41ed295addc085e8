"""The optimizer and its learning-rate schedule, as functions of the configuration and the step."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import nn

from delib_fast.config import ConfigError, OptimizerConfig
from delib_fast.engine.muon import Muon, hidden_matrices

ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")


def learning_rate(step: int, num_steps: int, config: OptimizerConfig) -> float:
    """The learning rate of a step (0-based) of a stage of `num_steps` steps.

    It rises linearly to `lr` over the first `warmup` share of the steps. Then it falls to lr · min_lr_ratio along a
    half cosine or a line, or it stays constant; with `wsd` it stays constant and falls along a line over the last
    `decay` share of the steps (arXiv 2404.06395).
    """
    warmup_steps = min(math.ceil(config.warmup * num_steps), num_steps - 1)
    if step < warmup_steps:
        return config.lr * (step + 1) / (warmup_steps + 1)
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "wsd":
        decay_steps = max(1, min(math.ceil(config.decay * num_steps), num_steps - warmup_steps))
        remaining = min(1.0, (num_steps - step) / decay_steps)
        return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * remaining)
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * remaining)


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer over the module's trainable parameters. Weight decay applies only to parameters of two or more
    dimensions.

    The learning rate starts at 0: DeepSpeed makes an optimizer step with zero gradients to allocate the optimizer's
    state, in which AdamW's decoupled decay would shrink every weight by lr · decay. `Engine` sets it at each step.

    Raises:
        ConfigError: `optimizer.name` is muon, and the module trains no hidden matrix.
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
    if config.name == "adamw":
        return adamw(groups)
    if not matrices:
        raise ConfigError("optimizer.name is muon, but no hidden matrix is trained; set adamw")
    return Muon(matrices, groups, momentum=config.momentum, weight_decay=config.weight_decay, adamw=adamw)


def moments_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> tuple[str, ...]:
    """The names of the tensors that the optimizer keeps for a parameter; each has the parameter's shape."""
    if isinstance(optimizer, Muon):
        return optimizer.moments(parameter)
    return () if isinstance(optimizer, torch.optim.SGD) else ADAM_MOMENTS


def _full_ndim(parameter: nn.Parameter) -> int:
    """The parameter's number of dimensions before ZeRO 3 flattened it into shards."""
    return len(getattr(parameter, "ds_shape", parameter.shape))
