"""Checkpoints that are either whole or not there.

A checkpoint is a folder of safetensors and JSON. It is written beside its final place, each file is synced
and hashed into a manifest, the folder is renamed into place, and only then is it a checkpoint, and named `latest`.
One that does not match its manifest is never loaded: the one before it is, and that is said. Where none is left the
run ends, by name: it never starts again in silence. Nothing in it is pickle.

    checkpoints/msm/
        latest                                 the name of the last one that was written
        step-00000012/
            state-00000-of-00002.safetensors   fp32 weights and moments of the parameters that rank 0 wrote
            trainer.json                       step, optimizer steps, tallies, what the run looked like
            manifest.json                      bytes and sha256 of every other file
        .writing-step-00000016/                one that is being written
        damaged-step-00000020/                 one that was found damaged; goes with the next one written

`checkpoint_writer` writes them; this module names, checks and reads them.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Sequence
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
    """A checkpoint that can't be used or written, with the reason and what to do."""


class Group(Protocol):
    """What this package needs of the process group (`engine.Ranks` has it)."""

    rank: int
    world_size: int

    def barrier(self) -> None: ...
    def gather_texts(self, text: str) -> list[str]: ...


class Alone:
    """A group of one."""

    rank, world_size = 0, 1

    def barrier(self) -> None:
        pass

    def gather_texts(self, text: str) -> list[str]:
        return [text]


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    step: int
    trainer: dict[str, Any]
    files: tuple[str, ...] = ()

    def reader(self) -> Callable[[str], Tensor]:
        """A function from tensor key to full tensor, over all the files of the checkpoint."""
        where: dict[str, Any] = {}
        for name in self.files:
            if name.endswith(".safetensors"):
                handle = safe_open(self.folder / name, framework="pt")
                where.update(dict.fromkeys(handle.keys(), handle))

        def read(key: str) -> Tensor:
            if key not in where:
                raise CheckpointError(
                    f"{self.folder} holds no tensor {key!r}: it was written by another model or "
                    "optimizer; use another run_dir, or delete the checkpoint to start again"
                )
            return where[key].get_tensor(key)

        return read


# --- files that survive a crash -----------------------------------------------------------------------------


# --- the folder of a stage's checkpoints --------------------------------------------------------------------


def folder_of(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def writing(root: Path, step: int) -> Path:
    """Where the checkpoint of `step` is put together."""
    return root / f".writing-step-{step:08d}"


def steps_of(root: Path) -> list[int]:
    """Steps that a checkpoint stands under the final name of, oldest first."""
    if not root.is_dir():
        return []
    return sorted(int(m.group(1)) for p in root.iterdir() if (m := _NAME.match(p.name)))


def publish(root: Path, step: int, trainer: dict[str, Any], shards: dict[str, dict[str, Any]]) -> Path:
    """Make what lies under `writing(root, step)` the checkpoint of `step`: trainer state and manifest, the rename,
    and then its name in `latest`. shards: bytes and sha256 of each rank's file, by name."""
    beside, final = writing(root, step), folder_of(root, step)
    told = json.dumps({**trainer, "step": step}, indent=1).encode()
    write_atomic(beside / "trainer.json", told)
    files = {**shards, "trainer.json": {"bytes": len(told), "sha256": hashlib.sha256(told).hexdigest()}}
    write_atomic(beside / MANIFEST, _manifest(step, files))
    if final.exists():
        raise CheckpointError(f"{final} is there already; a checkpoint is never overwritten")
    beside.rename(final)
    sync_folder(root)
    write_atomic(root / LATEST, f"{final.name}\n".encode())
    return final


def _manifest(step: int, files: dict[str, Any]) -> bytes:
    return json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1, sort_keys=True).encode()


def prune(root: Path, keep_last: int, keep_every: int | None) -> None:
    """Delete all but the last `keep_last` checkpoints and those at multiples of `keep_every`, and damaged ones.

    A folder is renamed before it is deleted, so that a kill in between leaves none half there under its name.
    """
    for step in steps_of(root)[:-keep_last]:
        if not (keep_every and step % keep_every == 0):
            folder_of(root, step).rename(root / f".deleting-step-{step:08d}")
    for pattern in (".deleting-step-*", "damaged-step-*"):
        for path in root.glob(pattern):
            shutil.rmtree(path)


def remove_leftovers(root: Path) -> None:
    """Delete what a save or a pruning that was killed left beside the checkpoints."""
    if root.is_dir():
        for pattern in (".writing-step-*", ".deleting-step-*"):
            for path in root.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)
        remove_temporary_files(root)


# --- reading ------------------------------------------------------------------------------------------------


def verify(folder: Path, group: Group | None = None) -> Checkpoint:
    """Read a checkpoint's manifest and check every file against it; the ranks of a group share out the hashing.

    Raises CheckpointError on every rank, saying what is wrong.
    """
    group = group or Alone()
    found: Checkpoint | None = None
    wrong = ""
    try:
        found = _verify_share(folder, group.rank, group.world_size)
    except CheckpointError as error:
        wrong = str(error)
    told = [text for text in group.gather_texts(wrong) if text]
    if told:
        raise CheckpointError(told[0])
    assert found is not None
    return found


def _verify_share(folder: Path, rank: int, world_size: int) -> Checkpoint:
    try:
        written = (folder / MANIFEST).read_bytes()
        manifest = json.loads(written)
        step, files = int(manifest["step"]), dict(manifest["files"])
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{folder}: its format is {manifest['format']}, this version reads {FORMAT}")
        if written != _manifest(step, files) or folder.name != f"step-{step:08d}":
            raise CheckpointError(f"{folder}: {MANIFEST} was changed after it was written")
        for number, (name, expected) in enumerate(sorted(files.items())):
            _verify_file(folder / name, expected, hashed=number % world_size == rank)
        trainer = json.loads((folder / "trainer.json").read_text())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: no readable manifest ({error})") from None
    return Checkpoint(folder, step, trainer, tuple(sorted(files)))


def _verify_file(path: Path, expected: dict[str, Any], *, hashed: bool) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path.parent}: {path.name} is missing")
    if path.stat().st_size != expected["bytes"]:
        raise CheckpointError(f"{path.parent}: {path.name} has {path.stat().st_size} bytes, not {expected['bytes']}")
    if hashed and hash_file(path) != expected["sha256"]:
        raise CheckpointError(
            f"{path.parent}: {path.name} does not match its sha256: it was damaged after it was written"
        )


def newest(root: Path, complain: Callable[[str], None], group: Group | None = None) -> Checkpoint | None:
    """The newest whole checkpoint under `root`; None where none was ever written. All ranks call it.

    `complain` hears of every damaged one passed over; it is set aside under another name.
    Raises:
        CheckpointError: there were checkpoints and none is whole, or ranks see different ones.
    """
    group = group or Alone()
    seen = _agreed(root, group)
    damaged: list[tuple[int, str]] = []
    found: Checkpoint | None = None
    for step in reversed(seen):
        try:
            found = verify(folder_of(root, step), group)
            break
        except CheckpointError as error:
            damaged.append((step, str(error)))
    latest = _latest(root)
    if latest is not None and latest > max(seen, default=-1):
        damaged.insert(0, (latest, f"{folder_of(root, latest)} is gone, though {LATEST} names it"))
    if found is None and (damaged or any(root.glob("damaged-step-*"))):
        raise CheckpointError(
            "\n".join(
                [
                    f"{root}: no checkpoint is left that is whole:",
                    *(f"  {reason}" for _, reason in damaged),
                    f"put one back from a copy, or delete {root} to train the stage again from its start",
                ]
            )
        )
    group.barrier()
    for step, reason in damaged:
        complain(f"{reason}; going on from the one before")
        if group.rank == 0 and step in seen:
            aside = root / f"damaged-step-{step:08d}"
            shutil.rmtree(aside, ignore_errors=True)
            folder_of(root, step).rename(aside)
    if group.rank == 0 and damaged and found is not None:
        write_atomic(root / LATEST, f"{found.folder.name}\n".encode())
    group.barrier()
    return found


def _agreed(root: Path, group: Group) -> Sequence[int]:
    steps = steps_of(root)
    if len(set(group.gather_texts(str(steps[-4:])))) > 1:
        raise CheckpointError(
            f"ranks see different checkpoints under {root}: run_dir must be on a file system that all ranks share"
        )
    return steps


def _latest(root: Path) -> int | None:
    try:
        match = _NAME.match((root / LATEST).read_text().strip())
    except (OSError, UnicodeDecodeError):
        return None
    return int(match.group(1)) if match else None
