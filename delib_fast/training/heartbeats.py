"""The files through which the ranks of a run watch each other: a heartbeat and a stack for each rank, and a verdict.

The folder is part of the run directory, which other users may be able to write to. It is therefore created for this
user alone, opened without following links, and a file that belongs to somebody else is ignored. No file names a
process: those are known from the rendezvous.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from delib_fast.config import ConfigError

_RECORD_BYTES = 1024
_STACK_BYTES = 1 << 16
_VERDICT = "verdict"


@dataclass(frozen=True)
class Heartbeat:
    """What a rank last wrote about itself."""

    beat: int
    """Grows with every write. A number that stays the same means a rank that is dead, stopped or keeps the GIL."""
    moves: int
    """Grows whenever the rank's main thread gets further."""
    order: int
    """How many positions the rank has reached. All ranks reach the same ones, so a smaller number is further behind."""
    local: bool
    """The rank does local work, which may take long: it waits for no other rank."""
    waits: bool
    """The rank waits for the others."""
    ended: bool
    """The rank has left its run with an exception."""
    position: str


class HeartbeatFolder:
    """The folder, opened by one rank.

    Args:
        path: created if it does not exist; its parent must exist.
        rank: the rank that writes through this object.
    Raises:
        ConfigError: the folder is a symbolic link, or other users may write to it.
    """

    def __init__(self, path: Path, rank: int) -> None:
        self._rank = rank
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        try:
            self._folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError as error:
            raise ConfigError(
                f"{path} is not a folder of this run ({error.strerror}); delete it, or give another run_dir"
            ) from None
        try:
            self._own = self._create(f"rank-{rank:05d}.json")
            self._user = os.fstat(self._own).st_uid  # on NFS not always the user id of this process
            found = os.fstat(self._folder)
            if found.st_uid != self._user or found.st_mode & 0o022:
                os.close(self._own)
                raise ConfigError(f"{path} can be written to by other users; delete it, or give another run_dir")
            self.stack: IO[str] = os.fdopen(self._create(self._stack_name(rank)), "w")
            """The file of this rank's stack."""
        except BaseException:
            os.close(self._folder)
            raise

    def close(self, *, delete: bool) -> None:
        """Close the files.

        Args:
            delete: whether to delete this rank's files, because the rank has finished.
        """
        self.stack.close()
        os.close(self._own)
        for name in (f"rank-{self._rank:05d}.json", self._stack_name(self._rank)) if delete else ():
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=self._folder)
        os.close(self._folder)

    def write(self, heartbeat: Heartbeat) -> None:
        """Replace this rank's heartbeat. A full disk must not abort training, so errors are ignored."""
        record = json.dumps(asdict(heartbeat)).encode()
        with contextlib.suppress(OSError):
            # One write of constant size, so that readers never see a part of a record.
            os.pwrite(self._own, record.ljust(_RECORD_BYTES), 0)

    def read(self, rank: int) -> Heartbeat | None:
        """The heartbeat of a rank; None if it has written none, has finished, or if its file is not one of ours."""
        try:
            data = json.loads(self._read(f"rank-{rank:05d}.json", 4 * _RECORD_BYTES))
            values = {name: data[name] for name in Heartbeat.__dataclass_fields__}
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        heartbeat = Heartbeat(**values)
        integers = (heartbeat.beat, heartbeat.moves, heartbeat.order)
        valid = all(type(n) is int for n in integers) and isinstance(heartbeat.position, str)
        return heartbeat if valid else None

    def read_stack(self, rank: int) -> str:
        """The stack that a rank has written, in printable characters; empty if there is none."""
        with contextlib.suppress(OSError):
            text = self._read(self._stack_name(rank), _STACK_BYTES).decode("utf-8", errors="replace")
            return "".join(c for c in text if c.isprintable() or c in "\n\t").rstrip()
        return ""

    def claim_verdict(self) -> bool:
        """Whether this rank is the first to give a verdict, and so the one that reports it."""
        try:
            os.close(self._create(_VERDICT, replace=False))
        except FileExistsError:
            return False
        except OSError:  # two reports are better than none
            return True
        return True

    def has_verdict(self) -> bool:
        """Whether a rank has given a verdict, after which every rank ends."""
        try:
            return os.stat(_VERDICT, dir_fd=self._folder, follow_symlinks=False).st_uid == self._user
        except OSError:
            return False

    # --- files ----------------------------------------------------------------------------------------------

    @staticmethod
    def _stack_name(rank: int) -> str:
        return f"rank-{rank:05d}.stack"

    def _create(self, name: str, *, replace: bool = True) -> int:
        if replace:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self._folder)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        return os.open(name, flags, 0o600, dir_fd=self._folder)

    def _read(self, name: str, limit: int) -> bytes:
        """The beginning of a file of ours. Raises OSError if it cannot be read, or is not one."""
        # Non-blocking, because opening a FIFO would wait for its writer.
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=self._folder)
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or found.st_uid != self._user:
                raise OSError(f"{name} is not a file of this user")
            return os.read(descriptor, limit)
        finally:
            os.close(descriptor)
