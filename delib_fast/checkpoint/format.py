"""The format of training checkpoints: names, manifest, verification, and reading.

A checkpoint is a folder of safetensors and JSON files; none of them is a pickle. It is written into a temporary
folder, every file is synced and hashed into a manifest, and only then is the folder renamed to its final name and
recorded in `latest`. A kill at any moment therefore leaves either a complete checkpoint or a folder that is ignored.

A checkpoint that does not match its manifest is never loaded: it is set aside with a warning, and the previous one is
used. If none is intact, reading raises CheckpointError; training never restarts silently. An intact checkpoint of
another format raises OtherFormatError, because an older one would be older work.

    checkpoints/msm/
        latest                                 the name of the last checkpoint
        step-00000012/
            state-00000-of-00002.safetensors   fp32 weights and optimizer moments of the parameters that rank 0 wrote
            trainer.json                       step, configuration, data fingerprint, running totals of the log, and
                                               the number and hash of the records in metrics.jsonl
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
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors import safe_open
from torch import Tensor

from delib_fast.digests import DamagedError, seal, unseal
from delib_fast.files import (
    hash_file,
    open_regular,
    read_text,
    remove_temporary_files,
    remove_tree,
    sync_folder,
    write_atomic,
)

MANIFEST = "manifest.json"
LATEST = "latest"
FORMAT = 3
_NAME = re.compile(r"^step-(\d{8})$")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read or written. The message says why, and what to do."""


class OtherFormatError(CheckpointError):
    """An intact checkpoint has a format that this version does not read."""


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

    def reader(self) -> TensorReader:
        """Return a reader of the tensors of all files."""
        return TensorReader(self)


class TensorReader:
    """Maps a key to its full tensor, read from whichever file of a checkpoint holds it.

    Raises:
        CheckpointError (when called): no file has a tensor of that key.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._folder = checkpoint.folder
        self._handles: dict[str, Any] = {}
        for name in checkpoint.files:
            if name.endswith(".safetensors"):
                handle = safe_open(checkpoint.folder / name, framework="pt")
                self._handles.update(dict.fromkeys(handle.keys(), handle))  # type: ignore[no-untyped-call]
        self._unread = set(self._handles)

    def __call__(self, key: str) -> Tensor:
        if key not in self._handles:
            raise CheckpointError(f"{self._folder} has no tensor {key!r}: {_ANOTHER_MODEL}")
        self._unread.discard(key)
        tensor: Tensor = self._handles[key].get_tensor(key)
        return tensor

    def refuse_unread(self) -> None:
        """Raise CheckpointError if a tensor was never read: the model that is restored has no place for it."""
        if self._unread:
            key = min(self._unread)
            raise CheckpointError(f"{self._folder} has a tensor {key!r}, which the model lacks: {_ANOTHER_MODEL}")


_ANOTHER_MODEL = (
    "another model or optimizer wrote it; use another run_dir, or delete the checkpoints of the stage to train it again"
)


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
    if final.exists() or final.is_symlink():
        raise CheckpointError(f"{final} already exists; a checkpoint is never overwritten")
    temporary.rename(final)
    sync_folder(root)
    write_atomic(root / LATEST, f"{final.name}\n".encode())
    return final


def _manifest(step: int, files: dict[str, Any]) -> bytes:
    return seal({"format": FORMAT, "step": step, "files": files}, indent=1).encode()


def prune(root: Path, keep_last: int, keep_every: int | None) -> None:
    """Delete old and damaged checkpoints.

    A folder is renamed before it is deleted, so that a kill during the deletion leaves no partial checkpoint under a
    final name. Of a symbolic link, only the link is deleted.

    Args:
        root: the folder of a stage's checkpoints.
        keep_last: the number of newest checkpoints to keep.
        keep_every: also keep the checkpoints at multiples of this many steps.
    """
    for step in list_steps(root)[:-keep_last]:
        if not (keep_every and step % keep_every == 0):
            doomed = root / f".deleting-step-{step:08d}"
            remove_tree(doomed)
            step_folder(root, step).rename(doomed)
    for pattern in (".deleting-step-*", "damaged-step-*"):
        for path in root.glob(pattern):
            remove_tree(path)


def remove_leftovers(root: Path) -> None:
    """Delete the unfinished folders of a killed save or `prune`. No other process may be writing to `root`."""
    if root.is_dir():
        for pattern in (".writing-step-*", ".deleting-step-*"):
            for path in root.glob(pattern):
                with contextlib.suppress(OSError):
                    remove_tree(path)
        with contextlib.suppress(OSError):
            remove_temporary_files(root)


# --- reading ------------------------------------------------------------------------------------------------


def verify(folder: Path, group: Group | None = None) -> Checkpoint:
    """Check every file of a checkpoint against its manifest. A collective: the hashing is split across the ranks.

    Raises:
        OtherFormatError: on every rank, if the checkpoint has a format that this version does not read.
        CheckpointError: on every rank, if a file is missing or differs from the manifest.
    """
    group = group or SingleProcess()
    checkpoint: Checkpoint | None = None
    fault = {"kind": "", "message": ""}
    try:
        with group.local_work("verifying a checkpoint"):
            checkpoint = _verify_share(folder, group.rank, group.world_size)
    except CheckpointError as error:
        fault = {"kind": type(error).__name__, "message": str(error)}
    faults = [found for found in map(json.loads, group.gather_texts(json.dumps(fault))) if found["kind"]]
    if faults:
        kind = OtherFormatError if faults[0]["kind"] == OtherFormatError.__name__ else CheckpointError
        raise kind(faults[0]["message"])
    assert checkpoint is not None
    return checkpoint


def _verify_share(folder: Path, rank: int, world_size: int) -> Checkpoint:
    """Check names and sizes of all files, and the hashes of every `world_size`-th one."""
    try:
        step, files = _read_manifest(folder)
        for number, (name, expected) in enumerate(sorted(files.items())):
            _verify_file(folder / name, expected, with_hash=number % world_size == rank)
        with open_regular(folder / "trainer.json") as file:
            trainer = json.load(file)
        if not isinstance(trainer, dict) or trainer["step"] != step:
            raise CheckpointError(f"{folder}: trainer.json is not that of step {step}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{folder}: cannot be read ({error})") from None
    return Checkpoint(folder, step, trainer, tuple(sorted(files)))


def _read_manifest(folder: Path) -> tuple[int, dict[str, Any]]:
    """The step of a checkpoint, and the size and hash of each file, keyed by file name."""
    with open_regular(folder / MANIFEST) as file:
        content = file.read()
    try:
        manifest = unseal(content)
    except DamagedError as error:
        if _is_format_2(content):
            manifest = {"format": 2}
        else:
            raise CheckpointError(f"{folder}: {MANIFEST} was changed after it was written: {error}") from None
    if manifest["format"] != FORMAT:
        raise OtherFormatError(
            f"{folder}: its format is {manifest['format']}, and this version of delib_fast reads format {FORMAT}. "
            "Finish the run with the version that began it, or give another run_dir"
        )
    step, files = int(manifest["step"]), dict(manifest["files"])
    if content != _manifest(step, files) or folder.name != step_folder(folder.parent, step).name:
        raise CheckpointError(f"{folder}: {MANIFEST} was changed after it was written")
    if outside := [name for name in files if Path(name).name != name]:
        raise CheckpointError(f"{folder}: {MANIFEST} names {outside[0]!r}, which is not a file of the folder")
    return step, files


def _is_format_2(content: bytes) -> bool:
    """Whether this is the intact manifest of format 2, which had no digest."""
    try:
        manifest = json.loads(content)
        return bool(json.dumps(manifest, indent=1, sort_keys=True).encode() == content and manifest["format"] == 2)
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def _verify_file(path: Path, expected: dict[str, Any], *, with_hash: bool) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path.parent}: {path.name} is missing")
    if path.stat().st_size != expected["bytes"]:
        raise CheckpointError(f"{path.parent}: {path.name} has {path.stat().st_size} bytes, not {expected['bytes']}")
    if with_hash and hash_file(path) != expected["sha256"]:
        raise CheckpointError(
            f"{path.parent}: {path.name} does not match its sha256: it was damaged after it was written"
        )


def _refuse_dangling_link(root: Path) -> None:
    """Raise CheckpointError if the folder of the checkpoints is a link to what is not there, such as another disk."""
    for folder in (root.parent, root):
        if folder.is_symlink() and not folder.exists():
            raise CheckpointError(
                f"{folder} is a symbolic link to {folder.readlink()}, which does not exist: mount or restore it, or "
                "delete the link to train the stage again from its start"
            )


def load_newest(root: Path, warn: Callable[[str], None], group: Group | None = None) -> Checkpoint | None:
    """Return the newest intact checkpoint under `root`, or None if none was ever written. A collective.

    Args:
        warn: called with a message for each damaged checkpoint that is skipped. Such a checkpoint is renamed, so
            that it is reported once.
    Raises:
        CheckpointError: checkpoints were written, but none is intact; the newest one has a format that this version
            does not read; or the ranks see different checkpoints.
    """
    group = group or SingleProcess()
    _refuse_dangling_link(root)
    steps = _agreed_steps(root, group)
    damaged: list[tuple[int, str]] = []
    found: Checkpoint | None = None
    for step in reversed(steps):
        try:
            found = verify(step_folder(root, step), group)
            break
        except OtherFormatError:
            raise
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
            remove_tree(aside)
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
        match = _NAME.match(read_text(root / LATEST).strip())
    except (OSError, UnicodeDecodeError):
        return None
    return int(match.group(1)) if match else None
