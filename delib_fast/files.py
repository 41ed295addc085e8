"""Files that survive a crash: atomic writes, folder replacement, fsync, locks, and hashes of weights.

This is the only module of the project that calls `fsync`, `flock` and `rename` for files that must be whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

# --- hashes -------------------------------------------------------------------------------------------------


def hash_file(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(folder: Path) -> dict[str, str]:
    """The sha256 of each file directly inside a model folder, by file name. Hidden files are excluded."""
    return {
        path.name: hash_file(path)
        for path in sorted(folder.glob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def hash_weights(files: Mapping[str, str]) -> str:
    """The hash of a model's weights: one sha256 over the names and hashes of its safetensors files.

    The ledger, evaluations and studies all identify a model by this hash.

    Args:
        files: the sha256 of each file, by name, as `hash_files` returns them.
    """
    digest = hashlib.sha256()
    for name, sha256 in sorted(files.items()):
        if name.endswith(".safetensors"):
            digest.update(f"{name} {sha256}\n".encode())
    return digest.hexdigest()


def hash_tree(path: str) -> str:
    """The hash of an input: of a file's bytes, or of all files of a folder and its subfolders, in order of their paths.

    Names do not count, so that a moved or renamed input keeps its hash. What is neither a file nor a folder, such as a
    hub name, is represented by the string itself.
    """
    found = Path(path)
    files = [found] if found.is_file() else sorted(found.rglob("*")) if found.is_dir() else []
    digest = hashlib.blake2b(b"" if files else path.encode(), digest_size=16)
    for file in (f for f in files if f.is_file()):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "blake2b").digest())
    return digest.hexdigest()


# --- writing ------------------------------------------------------------------------------------------------


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a whole file. After a crash the file holds either the old bytes or the new ones, never a mixture.

    Processes that write the same file take turns; the last one wins.

    Args:
        path: its folder must exist.
        data: text is written as UTF-8; a lone surrogate becomes `?`.
    """
    temporary = path.with_name(f".{path.name}.tmp")  # one name, so that a killed write leaves one file, which is reused
    while True:
        with open(temporary, "ab", opener=_open_regular) as file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(file.fileno(), temporary):  # another process has renamed it meanwhile
                continue
            file.truncate(0)
            file.write(data.encode("utf-8", errors="replace") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
            break
    sync_folder(path.parent)


def _open_regular(path: str, flags: int) -> int:
    """Open a file, but never through a symbolic link that someone else put there."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def remove_temporary_files(folder: Path) -> None:
    """Delete what killed `write_atomic` calls left in a folder. No other process may be writing to it."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def replace_folder(folder: str | os.PathLike[str], write: Callable[[Path], None]) -> Path:
    """Create or replace a whole folder. A reader sees the old folder, no folder, or the new one, never a part of one.

    Args:
        folder: where the result goes. An existing folder is replaced; a missing parent folder is created.
        write: fills the folder that it is given, which does not exist yet. Its files are synced afterwards.
    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.writing-{os.getpid()}")
    for pattern in ("writing", "old"):  # left by a call that was killed
        for leftover in folder.parent.glob(f".{folder.name}.{pattern}-*"):
            shutil.rmtree(leftover, ignore_errors=True)
    try:
        write(temporary)
        for file in temporary.iterdir():
            sync_file(file)
        rename_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def rename_folder(source: Path, folder: Path) -> None:
    """Rename `source` to `folder`, which is replaced if it exists, and sync the parent folder."""
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    shutil.rmtree(old, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        folder.rename(old)
    source.rename(folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync_descriptor(descriptor: int) -> None:
    """Return when all that was written to an open file is on the disk."""
    os.fsync(descriptor)


def sync_file(path: Path) -> None:
    """Return when a file's contents are on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Return when a folder's entries (new files, renames) are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- locks --------------------------------------------------------------------------------------------------


class FileLock:
    """An exclusive lock between processes. The kernel releases it when the process ends, however it ends.

    Args:
        path: the lock file; it is created and stays.
        wait: wait until the lock is free.
    Raises:
        BlockingIOError: the lock is taken by another process and `wait` is false.
        OSError: the file cannot be created, or the file system has no locks.
    """

    def __init__(self, path: Path, *, wait: bool) -> None:
        self._file = path.open("a")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            self._file.close()
            raise

    def release(self) -> None:
        self._file.close()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file while the block runs; wait for it first."""
    lock = FileLock(path, wait=True)
    try:
        yield
    finally:
        lock.release()
