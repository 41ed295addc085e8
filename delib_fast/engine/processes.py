"""The identity of a rank's process, so that a signal reaches that process and never another one with its number.

A process id alone says little: the kernel reuses it, and another machine or container has its own. Here a process is
its machine (the boot id of the kernel), its pid namespace, its id and its start time.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Process:
    """A process of this or another machine, as it was when it was recorded."""

    host: str
    boot: str
    """The kernel's boot id: it differs between machines, and between two starts of one machine."""
    namespace: str
    """The pid namespace in which `pid` counts; containers have their own."""
    pid: int
    started: int
    """When it started, in clock ticks since the machine booted."""
    parent: int
    session: int
    group: int

    @classmethod
    def current(cls) -> Process:
        """The calling process."""
        stat = _Stat.read(os.getpid())
        return cls(
            host=socket.gethostname(),
            boot=_machine()[0],
            namespace=_machine()[1],
            pid=os.getpid(),
            started=stat.started if stat else 0,
            parent=os.getppid(),
            session=os.getsid(0),
            group=os.getpgrp(),
        )

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Process:
        """The process that `to_data` described. Raises TypeError or ValueError if the data does not describe one."""
        integers = ("pid", "started", "parent", "session", "group")
        if not all(type(data.get(name)) is (int if name in integers else str) for name in cls.__dataclass_fields__):
            raise ValueError("it does not describe a process")
        return cls(**data)

    def to_data(self) -> dict[str, Any]:
        """JSON values that `from_data` reads."""
        return asdict(self)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @property
    def is_here(self) -> bool:
        """Whether the process belongs to this machine and pid namespace, so that its state can be read."""
        return (self.boot, self.namespace) == _machine() and self.boot != ""

    @property
    def has_ended(self) -> bool:
        """Whether the process is known to have ended. False for processes of other machines, about which /proc has
        nothing."""
        if not self.is_here:
            return False
        stat = _Stat.read(self.pid)
        return stat is None or stat.state in "ZX" or stat.started != self.started

    def why_not_kill(self) -> str | None:
        """The reason why this process must not be killed from here; None if it is a rank that belongs to this job.

        It must run here under the same user, still be the process that was recorded, and share this process's parent
        (other than pid 1), session or process group, as the ranks of one launcher do.
        """
        if not self.is_here:
            return "it runs on another machine or in another container"
        stat = _Stat.read(self.pid)
        if stat is None or stat.started != self.started:
            return "it has ended, and its number may belong to another process"
        if stat.user != os.getuid():
            return "it belongs to another user"
        if self.pid == os.getpid():
            return "it is this process"
        related = (
            (stat.parent == os.getppid() and stat.parent > 1)
            or stat.session == os.getsid(0)
            or stat.group == os.getpgrp()
        )
        return None if related else "it has another parent, session and process group than this rank"

    def kill(self) -> str | None:
        """Send SIGKILL to the process. Returns None, or the reason why no signal was sent."""
        try:
            handle = os.pidfd_open(self.pid)  # from here on the number cannot be given to another process
        except OSError as error:
            return f"it cannot be opened: {error.strerror}"
        try:
            if (reason := self.why_not_kill()) is None:
                signal.pidfd_send_signal(handle, signal.SIGKILL)
            return reason
        except OSError as error:
            return f"the signal cannot be sent: {error.strerror}"
        finally:
            os.close(handle)


@dataclass(frozen=True)
class _Stat:
    """The fields of /proc/PID/stat that identify a process."""

    state: str
    parent: int
    group: int
    session: int
    started: int
    user: int

    @classmethod
    def read(cls, pid: int) -> _Stat | None:
        """Read the fields of a process; None if it does not exist."""
        try:
            fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rsplit(")", 1)[1].split()
            user = os.stat(f"/proc/{pid}").st_uid
        except (OSError, IndexError):
            return None
        return cls(fields[0], int(fields[1]), int(fields[2]), int(fields[3]), int(fields[19]), user)


@functools.cache
def _machine() -> tuple[str, str]:
    """The boot id and the pid namespace of this process; empty strings where /proc does not have them."""
    boot = namespace = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    return boot, namespace
