"""Files that survive a crash: atomic writes, folder replacement, fsync, locks, and hashes of weights.

This is the only module of the project that calls `fsync` and `flock`.
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
    """Hash a file, or all files below a folder in the order of their paths: 128-bit blake2b, in hexadecimal.

    Names are not hashed, so a moved or renamed file keeps its hash. If nothing exists at `path` (a hub name, for
    example), the string itself is hashed.
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
    """Write a whole file atomically. After a crash it has either the old content or the new one, never a mixture.

    Concurrent writers of the same file wait for each other; the last one wins.

    Args:
        path: its folder must exist.
        data: text is written as UTF-8; a lone surrogate becomes `?`.
    """
    # A fixed name: the next write reuses the file that a killed write leaves.
    temporary = path.with_name(f".{path.name}.tmp")
    while True:
        with open(temporary, "ab", opener=_open_regular) as file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(file.fileno(), temporary):  # another writer has renamed the file that we waited for
                continue
            file.truncate(0)
            file.write(data.encode("utf-8", errors="replace") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
            break
    sync_folder(path.parent)


def _open_regular(path: str, flags: int) -> int:
    """An opener that refuses a symbolic link, which someone else may have put there."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether `path` still names the file that is open as `descriptor`."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def remove_temporary_files(folder: Path) -> None:
    """Delete the temporary files of killed `write_atomic` calls. No other process may be writing to the folder."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def replace_folder(folder: str | os.PathLike[str], write: Callable[[Path], None]) -> Path:
    """Create or replace a whole folder. A reader sees the old folder, no folder, or the new one, never a part of one.

    Args:
        folder: where the result goes. An existing folder is replaced; a missing parent folder is created.
        write: creates the folder at the path that it receives, and fills it. The files are then flushed to disk.
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
    """Flush an open file to disk, given its descriptor."""
    os.fsync(descriptor)


def sync_file(path: Path) -> None:
    """Flush the contents of a file to disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush the entries of a folder (new files, renames) to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- locks --------------------------------------------------------------------------------------------------


class FileLock:
    """An exclusive lock between processes. The kernel releases it when the process ends, however it ends.

    Args:
        path: the lock file. It is created if it does not exist, and never deleted.
        wait: whether to wait until the lock is free.
    Raises:
        BlockingIOError: another process holds the lock, and `wait` is false.
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
    """Wait for the lock of a file, and hold it while the block runs."""
    lock = FileLock(path, wait=True)
    try:
        yield
    finally:
        lock.release()
