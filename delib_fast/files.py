"""Files that survive a crash: atomic writes, appends, folder replacement, fsync and locks.

This is the only module of the project that calls `fsync` and `flock`. What it creates has a new random name or is
opened with `O_NOFOLLOW`, so that a symbolic link, a named pipe or a hard link that someone else left in a shared folder
is neither followed nor waited for.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from glob import escape as glob_escape
from io import BufferedReader
from pathlib import Path

# --- reading ------------------------------------------------------------------------------------------------

_KINDS = {stat.S_IFIFO: "a named pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket"}


def open_regular(path: str | os.PathLike[str]) -> BufferedReader:
    """Open a regular file for reading.

    Raises:
        OSError: it cannot be opened, or it is a named pipe, a device or a socket, which may block forever or never
            end.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _refuse_irregular(descriptor, path)
    except OSError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def read_text(path: str | os.PathLike[str], *, encoding: str = "utf-8") -> str:
    """The text of a regular file. Raises OSError as `open_regular` does, or UnicodeDecodeError."""
    with open_regular(path) as file:
        return file.read().decode(encoding).replace("\r\n", "\n").replace("\r", "\n")


def hash_file(path: Path) -> str:
    """The sha256 of a file, in hexadecimal. Reads the whole file."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refuse_irregular(descriptor: int, path: str | os.PathLike[str]) -> None:
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, f"is {_KINDS.get(stat.S_IFMT(mode), 'special')}, not a regular file", str(path))


# --- writing ------------------------------------------------------------------------------------------------


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a whole file atomically. After a crash it has either the old content or the new one, never a mixture.

    Of several concurrent writers, the last one wins. A symbolic link at `path` is replaced, not followed.

    Args:
        path: its folder must exist.
        data: text is written as UTF-8; a lone surrogate becomes `?`.
    """
    _remove_abandoned(path)
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.randbelow(10**12):012d}.tmp")
        with open(temporary, "xb", opener=open_without_links) as file:
            descriptor = file.fileno()
            try:
                with contextlib.suppress(OSError):  # some file systems have no locks
                    fcntl.flock(file, fcntl.LOCK_EX)  # shows other writers that this one lives
                if not _is_at(descriptor, temporary):  # another writer took it for abandoned before it was locked
                    continue
                file.write(data.encode("utf-8", errors="replace") if isinstance(data, str) else data)
                file.flush()
                os.fsync(descriptor)
                temporary.replace(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        break
    sync_folder(path.parent)


def open_without_links(path: str | os.PathLike[str], flags: int) -> int:
    """Open a file that is written to. Raises OSError for a symbolic link, and for anything but a regular file."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    try:
        _refuse_irregular(descriptor, path)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _remove_abandoned(path: Path) -> None:
    """Delete the temporary files of writers of `path` that were killed: those on which nobody holds a lock."""
    for left in path.parent.glob(f".{glob_escape(path.name)}.{'[0-9]' * 12}.tmp"):
        with contextlib.suppress(OSError):
            descriptor = open_without_links(left, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()
            finally:
                os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether `path` still names the file that is open as `descriptor`."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def remove_temporary_files(folder: Path) -> None:
    """Delete the temporary files of killed `write_atomic` calls. No other process may be writing to the folder."""
    for path in folder.glob(".*.tmp"):
        remove_tree(path)


def remove_tree(path: Path) -> None:
    """Delete a file, a folder with everything in it, or a symbolic link (but not what it names).

    Nothing happens if there is none. Raises OSError if something cannot be deleted.
    """
    try:
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        else:
            shutil.rmtree(path)
    except FileNotFoundError:
        return


class AppendFile:
    """A file to which lines are appended, each flushed to the operating system.

    If a crash cut off the last line, the next one begins on a line of its own.

    Raises:
        OSError: the file cannot be opened, or is a symbolic link or not a regular file.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "a+b", opener=open_without_links)  # noqa: SIM115
        try:
            descriptor = self._file.fileno()
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                self._file.write(b"\n")
                self._file.flush()
        except OSError:
            self._file.close()
            raise

    def write_line(self, line: str) -> None:
        self._file.write(f"{line}\n".encode(errors="replace"))
        self._file.flush()

    def sync(self) -> None:
        """Flush all lines to disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def replace_folder(folder: str | os.PathLike[str], write: Callable[[Path], None]) -> Path:
    """Create or replace a whole folder. A reader sees the old folder, no folder, or the new one, never a part of one.

    Args:
        folder: where the result goes. An existing folder is replaced; a missing parent folder is created.
        write: fills the empty folder that it receives. The files are then flushed to disk.
    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    for pattern in ("writing", "old"):  # left by a call that was killed
        for leftover in folder.parent.glob(f".{glob_escape(folder.name)}.{pattern}-*"):
            with contextlib.suppress(OSError):
                remove_tree(leftover)
    temporary = folder.with_name(f".{folder.name}.writing-{secrets.randbelow(10**12):012d}")
    temporary.mkdir()
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
    old = folder.with_name(f".{folder.name}.old-{secrets.randbelow(10**12):012d}")
    with contextlib.suppress(FileNotFoundError):
        folder.rename(old)
    source.rename(folder)
    sync_folder(folder.parent)
    with contextlib.suppress(OSError):  # the next call deletes it
        remove_tree(old)


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


_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class FileLock:
    """An exclusive lock between processes. The kernel releases it when the process ends, however it ends.

    Args:
        path: the lock file. It is created if it does not exist, and never deleted.
        wait: whether to wait until the lock is free.
    Raises:
        BlockingIOError: another process holds the lock, and `wait` is false.
        OSError: the file cannot be created, is a symbolic link or not a regular file, or the file system has no locks.
    """

    def __init__(self, path: Path, *, wait: bool) -> None:
        self._descriptor = open_without_links(path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException as error:
            os.close(self._descriptor)
            if isinstance(error, OSError) and error.errno in _WITHOUT_LOCKS:
                why = f"its file system gives no file locks ({os.strerror(error.errno)}; NFS needs its lock service)"
                raise OSError(error.errno, why, str(path)) from None
            raise

    def release(self) -> None:
        """Release the lock. Further calls do nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait for the lock of a file, and hold it while the block runs."""
    lock = FileLock(path, wait=True)
    try:
        yield
    finally:
        lock.release()
