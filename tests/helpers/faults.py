"""Die or fail at a chosen operation on the disk: for tests that kill a run at every write, sync and rename.

Every operation in the run directory has a label: what is done and to which file, numbers of steps and processes left
out, e.g. `fsync checkpoints/msm/.writing-step-N/state-N-of-N.safetensors`. Read from the environment by a rank that
`forking` starts; a run without these variables is not touched.

    FAULT_DIR    the run directory; without it nothing is installed
    FAULT        the label at whose first occurrence the process gets SIGKILL (a write is left half done)
    FAULT_RANK   on this rank only (default 0)
    FAULT_TRACE  a file that every label is written to, in order
    FAULT_SEEN   a file that gets a line [stage seed…] of the examples of each step that is assembled
"""

from __future__ import annotations

import builtins
import io
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

_NUMBERS = re.compile(r"\d{4,}|(?<=-)\d+")


def label(operation: str, path: str | os.PathLike[str], root: str) -> str | None:
    """None for a file outside the run directory."""
    whole = os.path.abspath(os.fspath(path))
    if whole != root and not whole.startswith(root + os.sep):
        return None
    if os.path.relpath(whole, root).startswith(".ranks"):  # heartbeats come when they come
        return None
    return f"{operation} {_NUMBERS.sub('N', os.path.relpath(whole, root))}"


def install() -> None:
    if os.environ.get("RANK", "0") == os.environ.get("FAULT_RANK", "0") and "FAULT_DIR" in os.environ:
        Faults(os.path.abspath(os.environ["FAULT_DIR"]), os.environ.get("FAULT"), os.environ.get("FAULT_TRACE"))
    if "FAULT_SEEN" in os.environ:
        _record_examples(os.environ["FAULT_SEEN"] + "-" + os.environ.get("RANK", "0"))


class Faults:
    def __init__(self, root: str, fatal: str | None, trace: str | None) -> None:
        self._root, self._fatal = root, fatal
        self._trace = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if trace else None
        self._patch(os, "fsync", lambda args: os.readlink(f"/proc/self/fd/{args[0]}"))
        for name in ("rename", "replace", "unlink", "mkdir"):
            self._patch(os, name, lambda args: args[0])
        self._patch(shutil, "rmtree", lambda args: args[0])
        self._open = io.open
        io.open = builtins.open = self._opening  # pathlib calls the one, transformers the other
        self._patch_safetensors()

    def at(self, operation: str, path: str | os.PathLike[str], before_death: Callable[[], Any] = lambda: None) -> None:
        here = label(operation, path, self._root)
        if here is None:
            return
        if self._trace is not None:
            os.write(self._trace, f"{here}\n".encode())
        if here == self._fatal:
            before_death()
            os.kill(os.getpid(), signal.SIGKILL)

    def _patch(self, module: Any, name: str, path_of: Callable[[Any], Any]) -> None:
        plain = getattr(module, name)

        def faulty(*args: Any, **options: Any) -> Any:
            if "dir_fd" not in options:  # rmtree's own calls: the whole of it is one operation
                self.at(name, path_of(args))
            return plain(*args, **options)

        setattr(module, name, faulty)

    def _opening(self, file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        opened = self._open(file, mode, *args, **options)
        writes = not isinstance(file, int) and any(c in mode for c in "wax+")
        return _Written(self, opened, file) if writes and label("write", file, self._root) else opened

    def _patch_safetensors(self) -> None:
        import safetensors.torch
        import transformers.modeling_utils

        from delib_fast.checkpoint import writer as checkpoint_writer

        plain = safetensors.torch.save_file

        def save_file(tensors: Any, filename: Any, *args: Any, **options: Any) -> None:
            def torn() -> None:
                plain(tensors, filename, *args, **options)
                os.truncate(filename, os.path.getsize(filename) // 2)

            self.at("write", filename, torn)
            plain(tensors, filename, *args, **options)

        for module in (safetensors.torch, checkpoint_writer, transformers.modeling_utils):
            for name in ("save_file", "safe_save_file"):
                if hasattr(module, name):
                    setattr(module, name, save_file)


class _Written:
    """A file whose writes are operations; killed in one, it leaves half of it."""

    def __init__(self, faults: Faults, file: Any, path: Any) -> None:
        self._faults, self._file, self._path = faults, file, path

    def write(self, data: Any) -> int:
        def torn() -> None:
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        self._faults.at("write", self._path, torn)
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Any:
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self._file.__exit__(*error)

    def __iter__(self) -> Any:
        return iter(self._file)


def _record_examples(path: str) -> None:
    from delib_fast.data import PackedDataLoader

    plain = PackedDataLoader.step

    def step(self: PackedDataLoader, index: int) -> Any:
        packs = plain(self, index)
        ids = [i for pack in packs for i in pack.example_ids if i >= 0]
        with Path(path).open("a") as file:
            file.write(json.dumps([self.examples.digest(), self.epoch_of(index), index, ids]) + "\n")
        return packs

    PackedDataLoader.step = step
