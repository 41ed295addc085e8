"""Kills a rank at a chosen disk operation, for tests that kill a run at every write, sync and rename.

Every operation in the run directory has a label: the operation and its file, without the numbers of steps and ranks,
e.g. `fsync checkpoints/msm/.writing-step-N/state-N-of-N.safetensors`. A rank that `helpers.forking` starts reads these
settings from its environment; without them, nothing is patched.

    FAULT_DIR    the run directory; without it, no operation is watched
    FAULT        the label at whose first occurrence the process gets SIGKILL (in a write, after half of it)
    FAULT_RANK   the rank to watch (default 0)
    FAULT_TRACE  a file to which every label is written, in order
    FAULT_SEEN   a file to which each step's [data digest, epoch, step, example ids] is written
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
    """The label of an operation; None for a file outside the run directory."""
    whole = os.path.abspath(os.fspath(path))
    if whole != root and not whole.startswith(root + os.sep):
        return None
    if os.path.relpath(whole, root).startswith(".ranks"):  # heartbeats have no fixed order
        return None
    return f"{operation} {_NUMBERS.sub('N', os.path.relpath(whole, root))}"


def install() -> None:
    """Install what the environment of this rank requests."""
    if os.environ.get("RANK", "0") == os.environ.get("FAULT_RANK", "0") and "FAULT_DIR" in os.environ:
        Faults(os.path.abspath(os.environ["FAULT_DIR"]), os.environ.get("FAULT"), os.environ.get("FAULT_TRACE"))
    if "FAULT_SEEN" in os.environ:
        _record_examples(os.environ["FAULT_SEEN"] + "-" + os.environ.get("RANK", "0"))


class Faults:
    """Records the disk operations under `root`, and kills the process at the label `fatal`."""

    def __init__(self, root: str, fatal: str | None, trace: str | None) -> None:
        self._root, self._fatal = root, fatal
        self._trace = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if trace else None
        self._patch(os, "fsync", lambda args: os.readlink(f"/proc/self/fd/{args[0]}"))
        for name in ("rename", "replace", "unlink", "mkdir"):
            self._patch(os, name, lambda args: args[0])
        self._patch(shutil, "rmtree", lambda args: args[0])
        self._open = io.open
        io.open = builtins.open = self._open_watched  # pathlib calls one of them, transformers the other
        self._patch_safetensors()

    def record(
        self, operation: str, path: str | os.PathLike[str], before_death: Callable[[], Any] = lambda: None
    ) -> None:
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
            if "dir_fd" not in options:  # not a call that rmtree makes: rmtree is one operation
                self.record(name, path_of(args))
            return plain(*args, **options)

        setattr(module, name, faulty)

    def _open_watched(self, file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        opened = self._open(file, mode, *args, **options)
        writes = not isinstance(file, int) and any(c in mode for c in "wax+")
        return _WatchedFile(self, opened, file) if writes and label("write", file, self._root) else opened

    def _patch_safetensors(self) -> None:
        import safetensors.torch
        import transformers.modeling_utils

        from delib_fast.checkpoint import writer as checkpoint_writer

        plain = safetensors.torch.save_file

        def save_file(tensors: Any, filename: Any, *args: Any, **options: Any) -> None:
            def torn() -> None:
                plain(tensors, filename, *args, **options)
                os.truncate(filename, os.path.getsize(filename) // 2)

            self.record("write", filename, torn)
            plain(tensors, filename, *args, **options)

        for module in (safetensors.torch, checkpoint_writer, transformers.modeling_utils):
            for name in ("save_file", "safe_save_file"):
                if hasattr(module, name):
                    setattr(module, name, save_file)


class _WatchedFile:
    """A file whose writes are recorded as operations. A kill during a write leaves half of it."""

    def __init__(self, faults: Faults, file: Any, path: Any) -> None:
        self._faults, self._file, self._path = faults, file, path

    def write(self, data: Any) -> int:
        def torn() -> None:
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        self._faults.record("write", self._path, torn)
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
