"""The format of training checkpoints: names, manifest, verification, and reading.

A checkpoint is a folder of safetensors and JSON files; none of them is a pickle. It is written into a temporary
folder, every file is synced and hashed into a manifest, and only then is the folder renamed to its final name and
recorded in `latest`. A kill at any moment therefore leaves either a complete checkpoint or a folder that is ignored.

A checkpoint that does not match its manifest is never loaded: it is set aside with a warning, and the previous one is
used. If none is intact, reading raises CheckpointError; training never restarts silently.

    checkpoints/msm/
        latest                                 the name of the last checkpoint
        step-00000012/
            state-00000-of-00002.safetensors   fp32 weights and optimizer moments of the parameters that rank 0 wrote
            trainer.json                       step, optimizer steps, running totals of the log, data fingerprint
            manifest.json                      size and sha256 of every other file
        .writing-step-00000016/                a checkpoint that is being written
        damaged-step-00000020/                 a damaged checkpoint; deleted after the next one is written

torch.distributed.checkpoint is not used: it saves shards of DTensors, which ZeRO does not have; it pickles its
metadata; and it neither hashes what it writes nor publishes a checkpoint with one rename.

This module names, publishes, verifies and reads checkpoints; `writer` writes the tensors.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors import safe_open
from torch import Tensor

from delib_fast.files import hash_file, remove_temporary_files, sync_folder, write_atomic

MANIFEST = "manifest.json"
LATEST = "latest"
FORMAT = 2
_NAME = re.compile(r"^step-(\d{8})$")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read or written. The message says why, and what to do."""


class Group(Protocol):
    """The part of a process group that this package needs. `engine.Ranks` and `SingleProcess` implement it."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    def barrier(self) -> None: ...
    def gather_texts(self, text: str) -> list[str]: ...
    @property
    def local_work(self) -> Callable[[str], AbstractContextManager[None]]: ...


class SingleProcess:
    """The process group of one process, without torch.distributed."""

    rank, world_size, sequence_parallel = 0, 1, 1

    def barrier(self) -> None:
        """Return immediately: there is no other rank to wait for."""

    def gather_texts(self, text: str) -> list[str]:
        return [text]

    def local_work(self, activity: str) -> AbstractContextManager[None]:
        """Enter work of unknown duration. No other rank waits for it."""
        return contextlib.nullcontext()


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: its folder, its step, the content of trainer.json, and the names of its files."""

    folder: Path
    step: int
    trainer: dict[str, Any]
    files: tuple[str, ...] = ()

    def reader(self) -> Callable[[str], Tensor]:
        """Return a function that maps a key to its full tensor, read from whichever file holds it.

        Raises:
            CheckpointError (the returned function): no file has a tensor of that key.
        """
        handles: dict[str, Any] = {}
        for name in self.files:
            if name.endswith(".safetensors"):
                handle = safe_open(self.folder / name, framework="pt")
                handles.update(dict.fromkeys(handle.keys(), handle))  # type: ignore[no-untyped-call]

        def read(key: str) -> Tensor:
            if key not in handles:
                raise CheckpointError(
                    f"{self.folder} has no tensor {key!r}: another model or optimizer wrote it; use another run_dir, "
                    "or delete the checkpoint to start again"
                )
            tensor: Tensor = handles[key].get_tensor(key)
            return tensor

        return read


# --- the folder of a stage's checkpoints --------------------------------------------------------------------


def step_folder(root: Path, step: int) -> Path:
    """The folder of the finished checkpoint of a step."""
    return root / f"step-{step:08d}"


def temporary_folder(root: Path, step: int) -> Path:
    """The folder in which the checkpoint of a step is written before it is published."""
    return root / f".writing-step-{step:08d}"


def list_steps(root: Path) -> list[int]:
    """The steps of the finished checkpoints under `root`, in ascending order."""
    if not root.is_dir():
        return []
    return sorted(int(m.group(1)) for p in root.iterdir() if (m := _NAME.match(p.name)))


def publish(root: Path, step: int, trainer: dict[str, Any], shards: dict[str, dict[str, Any]]) -> Path:
    """Turn the temporary folder of a step into its checkpoint: write trainer.json and the manifest, rename, update
    `latest`.

    Args:
        trainer: JSON-serializable trainer state; `step` is added to it.
        shards: the size and hash of each rank's shard in the temporary folder: `{"bytes": …, "sha256": …}` by file
            name.
    Returns:
        The checkpoint's folder.
    Raises:
        CheckpointError: a checkpoint of this step already exists.
    """
    temporary, final = temporary_folder(root, step), step_folder(root, step)
    content = json.dumps({**trainer, "step": step}, indent=1).encode()
    write_atomic(temporary / "trainer.json", content)
    files = {**shards, "trainer.json": {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
    write_atomic(temporary / MANIFEST, _manifest(step, files))
    if final.exists():
        raise CheckpointError(f"{final} already exists; a checkpoint is never overwritten")
    temporary.rename(final)
    sync_folder(root)
    write_atomic(root / LATEST, f"{final.name}\n".encode())
    return final


def _manifest(step: int, files: dict[str, Any]) -> bytes:
    return json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1, sort_keys=True).encode()


def prune(root: Path, keep_last: int, keep_every: int | None) -> None:
    """Delete old and damaged checkpoints.

    A folder is renamed before it is deleted, so that a kill during the deletion leaves no partial checkpoint under a
    final name.

    Args:
        root: the folder of a stage's checkpoints.
        keep_last: the number of newest checkpoints to keep.
        keep_every: also keep the checkpoints at multiples of this many steps.
    """
    for step in list_steps(root)[:-keep_last]:
        if not (keep_every and step % keep_every == 0):
            step_folder(root, step).rename(root / f".deleting-step-{step:08d}")
    for pattern in (".deleting-step-*", "damaged-step-*"):
        for path in root.glob(pattern):
            shutil.rmtree(path)


def remove_leftovers(root: Path) -> None:
    """Delete the unfinished folders of a killed save or `prune`. No other process may be writing to `root`."""
    if root.is_dir():
        for pattern in (".writing-step-*", ".deleting-step-*"):
            for path in root.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)
        remove_temporary_files(root)


# --- reading ------------------------------------------------------------------------------------------------


def verify(folder: Path, group: Group | None = None) -> Checkpoint:
    """Check every file of a checkpoint against its manifest. A collective: the hashing is split across the ranks.

    Raises:
        CheckpointError: on every rank, if a file is missing or differs from the manifest.
    """
    group = group or SingleProcess()
    checkpoint: Checkpoint | None = None
    fault = ""
    try:
        with group.local_work("verifying a checkpoint"):
            checkpoint = _verify_share(folder, group.rank, group.world_size)
    except CheckpointError as error:
        fault = str(error)
    faults = [text for text in group.gather_texts(fault) if text]
    if faults:
        raise CheckpointError(faults[0])
    assert checkpoint is not None
    return checkpoint


def _verify_share(folder: Path, rank: int, world_size: int) -> Checkpoint:
    """Check names and sizes of all files, and the hashes of every `world_size`-th one."""
    try:
        content = (folder / MANIFEST).read_bytes()
        manifest = json.loads(content)
        step, files = int(manifest["step"]), dict(manifest["files"])
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{folder}: its format is {manifest['format']}; this version reads format {FORMAT}")
        if content != _manifest(step, files) or folder.name != f"step-{step:08d}":
            raise CheckpointError(f"{folder}: {MANIFEST} was changed after it was written")
        for number, (name, expected) in enumerate(sorted(files.items())):
            _verify_file(folder / name, expected, with_hash=number % world_size == rank)
        trainer = json.loads((folder / "trainer.json").read_text())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: the manifest cannot be read ({error})") from None
    return Checkpoint(folder, step, trainer, tuple(sorted(files)))


def _verify_file(path: Path, expected: dict[str, Any], *, with_hash: bool) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path.parent}: {path.name} is missing")
    if path.stat().st_size != expected["bytes"]:
        raise CheckpointError(f"{path.parent}: {path.name} has {path.stat().st_size} bytes, not {expected['bytes']}")
    if with_hash and hash_file(path) != expected["sha256"]:
        raise CheckpointError(
            f"{path.parent}: {path.name} does not match its sha256: it was damaged after it was written"
        )


def load_newest(root: Path, warn: Callable[[str], None], group: Group | None = None) -> Checkpoint | None:
    """Return the newest intact checkpoint under `root`, or None if none was ever written. A collective.

    Args:
        warn: called with a message for each damaged checkpoint that is skipped. Such a checkpoint is renamed, so
            that it is reported once.
    Raises:
        CheckpointError: checkpoints were written, but none is intact; or the ranks see different checkpoints.
    """
    group = group or SingleProcess()
    steps = _agreed_steps(root, group)
    damaged: list[tuple[int, str]] = []
    found: Checkpoint | None = None
    for step in reversed(steps):
        try:
            found = verify(step_folder(root, step), group)
            break
        except CheckpointError as error:
            damaged.append((step, str(error)))
    latest = _latest(root)
    if latest is not None and latest > max(steps, default=-1):
        damaged.insert(0, (latest, f"{step_folder(root, latest)} is missing, although {LATEST} names it"))
    if found is None and (damaged or any(root.glob("damaged-step-*"))):
        raise CheckpointError(
            "\n".join(
                [
                    f"{root}: no intact checkpoint is left:",
                    *(f"  {reason}" for _, reason in damaged),
                    f"restore one from a copy, or delete {root} to train the stage again from its start",
                ]
            )
        )
    group.barrier()
    for step, reason in damaged:
        warn(f"{reason}; resuming from the previous checkpoint")
        if group.rank == 0 and step in steps:
            aside = root / f"damaged-step-{step:08d}"
            shutil.rmtree(aside, ignore_errors=True)
            step_folder(root, step).rename(aside)
    if group.rank == 0 and damaged and found is not None:
        write_atomic(root / LATEST, f"{found.folder.name}\n".encode())
    group.barrier()
    return found


def _agreed_steps(root: Path, group: Group) -> Sequence[int]:
    """The steps of the finished checkpoints; raises CheckpointError if the ranks do not see the same ones."""
    steps = list_steps(root)
    if len(set(group.gather_texts(str(steps[-4:])))) > 1:
        raise CheckpointError(
            f"the ranks see different checkpoints under {root}: run_dir must be on a file system that all ranks share"
        )
    return steps


def _latest(root: Path) -> int | None:
    """The step that `latest` names; None if the file is missing or unreadable."""
    try:
        match = _NAME.match((root / LATEST).read_text().strip())
    except (OSError, UnicodeDecodeError):
        return None
    return int(match.group(1)) if match else None
