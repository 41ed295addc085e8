"""What offload to a disk needs, found out before weights are loaded: DeepSpeed's async_io, and a folder for it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from deepspeed.ops.op_builder import AsyncIOBuilder
from torch import nn

from delib_fast.config import ConfigError, EngineConfig
from delib_fast.engine.cpu_adam import build_failure

_ALIGNED = 512  # bytes: what a read past the page cache has to be aligned to


def check_nvme(engine: EngineConfig) -> None:
    """Nothing where nothing goes to a disk. Compiles async_io the first time (a minute or two).

    Raises ConfigError: async_io can't be built or loaded here, or `engine.nvme_path` can't be written as it writes;
    parameters on a disk in fp32 (on one rank weights were 0.16 off after three updates, where bf16 was exact).
    """
    keys = [key for key in ("offload_optimizer", "offload_parameters") if getattr(engine, key) == "nvme"]
    if not keys or engine.nvme_path is None:
        return
    if engine.offload_parameters == "nvme" and engine.precision == "fp32":
        raise ConfigError(
            "engine.offload_parameters is nvme, with which DeepSpeed 0.19 trains wrongly in fp32; set "
            "engine.precision to bf16, or offload_parameters to cpu"
        )
    reason = (
        "libaio is not there" if not AsyncIOBuilder().is_compatible(verbose=False) else build_failure(AsyncIOBuilder)
    )
    if reason is not None:
        raise ConfigError(
            f"engine.{keys[0]} is nvme, by DeepSpeed's async_io, and {reason}; install libaio's "
            "development files (apt install libaio-dev, dnf install libaio-devel; CFLAGS=-I… and "
            f"LDFLAGS=-L… where they are elsewhere), or set engine.{keys[0]}: cpu"
        )
    try:
        _write_directly(Path(engine.nvme_path))
    except OSError as error:
        raise ConfigError(
            f"engine.nvme_path: {engine.nvme_path} can't be written past the page cache (O_DIRECT), as "
            f"async_io does: {error.strerror}; give a folder on a local disk"
        ) from None


def _write_directly(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        os.close(os.open(file.name, os.O_WRONLY | os.O_DIRECT))


def refuse_misaligned(zero: Any, module: nn.Module) -> None:
    """Refuses a model of which a gradient would be read to a place in memory that past the page cache can't be read to:
    DeepSpeed 0.19 doesn't look at what the read said, and takes whatever lies there for the gradient.

    Raises ConfigError; not where the ranks' parts of all matrices are multiples of 128 numbers, as they mostly are.
    """
    swapper = getattr(zero, "optimizer_swapper", None)
    if swapper is None:
        return
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        group, offset, numbers = zero.grad_position[zero.get_param_id(parameter)]
        if (
            zero._swappable_optimizer_subgroup(group)
            and swapper.is_swappable_tensor(numel=int(numbers))
            and int(offset) * swapper.swap_element_size % _ALIGNED
        ):
            raise ConfigError(
                f"engine.offload_optimizer is nvme, and the gradient of {name} would lie at byte "
                f"{int(offset) * swapper.swap_element_size:,} of its group, no multiple of {_ALIGNED}, "
                "where DeepSpeed can't read it from a disk; set offload_optimizer to cpu, or another "
                "number of ranks"
            )
