"""Evaluation mode for a block of code."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def eval_mode(*modules: nn.Module) -> Iterator[None]:
    """Run a block in evaluation mode and without gradients.

    On exit, the training mode of every submodule is restored, including those that were already in evaluation mode.
    """
    modes = [(submodule, submodule.training) for module in modules for submodule in module.modules()]
    try:
        for module in modules:
            module.eval()
        with torch.no_grad():
            yield
    finally:
        for submodule, training in modes:
            submodule.training = training
