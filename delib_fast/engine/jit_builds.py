"""Ops that DeepSpeed compiles on first use: in a folder of this project, under a lock that the kernel releases.

torch marks a build that is running with a file named `lock` in the user's folder of extensions. A process that is
killed while it compiles leaves that file, and every later process then waits for it forever. Here a build also holds a
lock of its own, so that the file of a killed build is known to be stale and is deleted.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from delib_fast.data.disk_cache import cache_folder
from delib_fast.files import locked

_VARIABLE = "TORCH_EXTENSIONS_DIR"


def guard_builds(builder: type[Any]) -> None:
    """Ensure that a build of an op builder class (DeepSpeed's `OpBuilder`) that is killed never blocks later ones.

    If $TORCH_EXTENSIONS_DIR is set, builds go there and torch's own locks are kept: another program may hold them.
    """
    plain = builder.jit_load

    def jit_load(self: Any, verbose: bool = True) -> Any:
        if _VARIABLE in os.environ:
            return plain(self, verbose)
        with cache_folder(None) as cache:
            folder = cache / "torch_extensions" / f"py{platform.python_version()}-torch{torch.__version__}"
            folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / f"{self.name}.lock"):
            Path(folder, self.name, "lock").unlink(missing_ok=True)
            os.environ[_VARIABLE] = str(folder)
            try:
                return plain(self, verbose)
            finally:
                del os.environ[_VARIABLE]

    builder.jit_load = jit_load
