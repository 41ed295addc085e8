"""What offload to a disk needs, found out before weights are loaded: DeepSpeed's async_io, and a folder for it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from deepspeed.ops.op_builder import AsyncIOBuilder

from delib_fast.config import ConfigError, EngineConfig
from delib_fast.engine.cpu_adam import build_failure


def check_nvme(engine: EngineConfig) -> None:
    """Nothing where nothing goes to a disk. Compiles async_io the first time (a minute or two).

    Raises ConfigError: async_io can't be built or loaded here, or `engine.nvme_path` can't be written as it writes.
    """
    keys = [key for key in ("offload_optimizer", "offload_parameters") if getattr(engine, key) == "nvme"]
    if not keys or engine.nvme_path is None:
        return
    reason = "libaio is not there" if not AsyncIOBuilder().is_compatible(verbose=False) else \
        build_failure(AsyncIOBuilder)
    if reason is not None:
        raise ConfigError(f"engine.{keys[0]} is nvme, by DeepSpeed's async_io, and {reason}; install libaio's "
                          "development files (apt install libaio-dev, dnf install libaio-devel; CFLAGS=-I… and "
                          f"LDFLAGS=-L… where they are elsewhere), or set engine.{keys[0]}: cpu")
    try:
        _write_directly(Path(engine.nvme_path))
    except OSError as error:
        raise ConfigError(f"engine.nvme_path: {engine.nvme_path} can't be written past the page cache (O_DIRECT), as "
                          f"async_io does: {error.strerror}; give a folder on a local disk") from None


def _write_directly(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        os.close(os.open(file.name, os.O_WRONLY | os.O_DIRECT))
