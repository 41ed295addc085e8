"""Checkpoints that are either whole or not there.

A checkpoint is a folder of safetensors and JSON. It is written beside its final place, each file is synced
and hashed into a manifest, the folder is renamed into place, and only then is it a checkpoint. One that does
not match its manifest is never loaded: the one before it is, and that is said. Nothing in it is pickle.

    checkpoints/msm/step-00000012/
        state-00000-of-00002.safetensors   fp32 weights and moments of the parameters that rank 0 wrote
        trainer.json                       step, optimizer steps, what the run looked like
        manifest.json                      bytes and sha256 of every other file
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

MANIFEST = "manifest.json"
_NAME = re.compile(r"^step-(\d{8})$")


class CheckpointError(RuntimeError):
    """A checkpoint that can't be used, with the reason and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    step: int
    trainer: dict[str, Any]

    def reader(self) -> Callable[[str], Tensor]:
        """A function from tensor key to full tensor, over all the files of the checkpoint."""
        where: dict[str, Any] = {}
        for file in sorted(self.folder.glob("state-*.safetensors")):
            handle = safe_open(file, framework="pt")
            where.update(dict.fromkeys(handle.keys(), handle))

        def read(key: str) -> Tensor:
            if key not in where:
                raise CheckpointError(f"{self.folder} holds no tensor {key!r}: it was written by another model or "
                                      "optimizer; use another run_dir, or delete the checkpoint to start again")
            return where[key].get_tensor(key)

        return read


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_sha256(folder: Path) -> str:
    """One hash over the names and contents of a model folder's safetensors files."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(f"{path.name} {file_sha256(path)}\n".encode())
    return digest.hexdigest()


def write_synced(path: Path, data: bytes) -> None:
    """Write a whole file so that after a crash it holds either the old bytes or the new."""
    beside = path.with_name(path.name + ".tmp")
    with beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    beside.rename(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def save(
    root: Path,
    step: int,
    tensors: Iterable[tuple[str, Callable[[], Tensor]]],
    trainer: dict[str, Any],
    *,
    rank: int,
    world_size: int,
    barrier: Callable[[], None],
    keep_last: int,
) -> Path:
    """Write the checkpoint of `step` under `root`. All ranks call it; each writes its share of the tensors.

    Raises:
        OSError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    final = root / f"step-{step:08d}"
    beside = root / f".writing-step-{step:08d}"
    if rank == 0:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    barrier()
    mine: dict[str, Tensor] = {}
    for index, (key, assemble) in enumerate(tensors):
        tensor = assemble()  # a collective: every rank assembles, one keeps
        if index % world_size == rank:
            mine[key] = tensor.to("cpu", copy=True).contiguous()
    shard = beside / f"state-{rank:05d}-of-{world_size:05d}.safetensors"
    save_file(mine, shard)
    _sync_file(shard)
    barrier()
    if rank == 0:
        write_synced(beside / "trainer.json", json.dumps({**trainer, "step": step}, indent=1).encode())
        files = sorted(p for p in beside.iterdir() if p.name != MANIFEST)
        manifest = {"format": 1, "step": step, "files": {
            p.name: {"bytes": p.stat().st_size, "sha256": file_sha256(p)} for p in files}}
        write_synced(beside / MANIFEST, json.dumps(manifest, indent=1).encode())
        if final.exists():  # the same step again, after a rollback: it never counts as overwritten in place
            shutil.rmtree(final)
        beside.rename(final)
        sync_folder(root)
        for old in _steps(root)[:-keep_last]:
            shutil.rmtree(root / f"step-{old:08d}")
    barrier()
    return final


def _steps(root: Path) -> list[int]:
    if not root.is_dir():
        return []
    return sorted(int(m.group(1)) for p in root.iterdir() if (m := _NAME.match(p.name)))


def verify(folder: Path) -> Checkpoint:
    """Read a checkpoint's manifest and check every file against it. Raises CheckpointError, saying what is wrong."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: no readable manifest ({error})") from None
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder}: {name} is missing")
        if path.stat().st_size != expected["bytes"]:
            raise CheckpointError(f"{folder}: {name} has {path.stat().st_size} bytes, not {expected['bytes']}")
        if file_sha256(path) != expected["sha256"]:
            raise CheckpointError(f"{folder}: {name} does not match its sha256: it was damaged after it was written")
    trainer = json.loads((folder / "trainer.json").read_text())
    return Checkpoint(folder, int(manifest["step"]), trainer)


def newest(root: Path, complain: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint under `root`, or None. `complain` hears of every damaged one passed over."""
    for step in reversed(_steps(root)):
        try:
            return verify(root / f"step-{step:08d}")
        except CheckpointError as error:
            complain(f"{error}; going on from the one before")
    return None


def remove_leftovers(root: Path) -> None:
    """Delete what a save that was killed left beside the checkpoints."""
    if root.is_dir():
        for path in root.glob(".writing-step-*"):
            shutil.rmtree(path, ignore_errors=True)


