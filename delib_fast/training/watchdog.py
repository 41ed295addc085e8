"""Finds the rank that hangs or has died, reports it, and ends all ranks, so that no job waits forever.

Each rank writes its position (`at`) to a small file, which takes about 20 µs. A thread in each rank rewrites the file
regularly as a heartbeat, and reads the files of the other ranks. If a rank has not moved for `timeout_s`, one of two
things has happened:

- A rank's file is no longer rewritten: this rank has died, or its whole process is stopped.
- All files are rewritten: the rank that is furthest behind hangs, and the others wait for it in a collective.

The rank at fault is reported with its position and its stack, which it writes to a second file. If it holds the GIL, so
that no Python thread can write, `faulthandler` writes the stack from a C thread. The rank gets SIGKILL if it runs on
the same machine, and every rank ends with exit code 3.

The ranks exchange files because they share the run directory's file system anyway. A socket or torch's store would need
a server in one rank, which may be the one that hangs.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

EXIT_CODE = 3


class Watchdog:
    """Watches this rank, and the others through their files.

    Args:
        folder: the folder of the files of all ranks.
        timeout_s: how long a rank may stay at one position, in seconds; None turns the watchdog off.
    """

    def __init__(self, folder: Path, rank: int, world_size: int, timeout_s: float | None) -> None:
        self._folder, self._rank, self._world_size, self._timeout_s = folder, rank, world_size, timeout_s
        self._position, self._moves, self._moved = "starting", 0, time.monotonic()
        self._slow = False
        self._heartbeat: int | None = None
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._launchers = _launchers()

    # --- called by the training loop ------------------------------------------------------------------------

    def at(self, position: str) -> None:
        """Record a new position of this rank. The rank with the fewest calls is the furthest behind."""
        self._position, self._moved = position, time.monotonic()
        self._moves += 1
        self._write()

    @contextlib.contextmanager
    def suspended(self, activity: str) -> Iterator[None]:
        """Do not count this rank as hanging while the block runs, e.g. an export, whose duration is unknown."""
        self.at(activity)
        self._slow = True
        faulthandler.cancel_dump_traceback_later()
        try:
            yield
        finally:
            self._slow = False
            self._arm()  # not in the thread's next round, which would never come if the GIL is held from here on
            self.at(f"after {activity}")

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Watch while the block runs."""
        if self._timeout_s is None:
            yield
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        self._stacks = self._stack_file(self._rank).open("w")
        self._heartbeat = os.open(self._file(self._rank), os.O_RDWR | os.O_CREAT)
        self.at(self._position)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        try:
            yield
        finally:
            self._done.set()
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()
            self._stacks.close()
            os.close(self._heartbeat)
            self._heartbeat = None
            if sys.exc_info()[0] is None:
                for path in (self._file(self._rank), self._stack_file(self._rank)):
                    path.unlink(missing_ok=True)

    # --- the thread -----------------------------------------------------------------------------------------

    def _watch(self) -> None:
        assert self._timeout_s is not None
        while not self._done.wait(min(self._timeout_s / 10, 5.0)):
            if not self._slow:
                self._arm()
            self._write()
            self._follow_launcher()
            if not self._slow and time.monotonic() - self._moved > self._timeout_s:
                self._judge(self._moves)

    def _arm(self) -> None:
        """Let a C thread write the stacks and end the process, unless this is called again within the timeout."""
        if self._timeout_s is not None and self._heartbeat is not None:
            faulthandler.dump_traceback_later(
                self._timeout_s, exit=True, file=2 if self._world_size == 1 else self._stacks
            )

    def _judge(self, moves: int) -> None:
        """Report the rank at fault, and end this one. Called when this rank has not moved for too long.

        Args:
            moves: the number of moves at the time of the call; if this rank moves meanwhile, nothing is done.
        """
        assert self._timeout_s is not None
        faulthandler.cancel_dump_traceback_later()  # not needed: this thread can run, and ends the process itself
        main = sys._current_frames()[threading.main_thread().ident or 0]
        self._stacks.seek(0)
        self._stacks.truncate()
        self._stacks.write("".join(traceback.format_stack(main)))
        self._stacks.flush()
        self._write()
        time.sleep(min(self._timeout_s / 4, 6.0))  # until the others have written theirs
        ranks = self._read()
        gone = [r for r in ranks if not r["alive"] or (not r["slow"] and r["age_s"] > max(self._timeout_s / 2, 2.0))]
        if self._moves != moves or self._done.is_set() or (not gone and any(r["slow"] for r in ranks)):
            return
        for r in gone:  # its C thread writes its stack, unless the whole process is stopped
            until = time.monotonic() + min(self._timeout_s, 10.0)
            while r["alive"] and not self._stack(r) and time.monotonic() < until:
                time.sleep(0.1)
        blamed = gone or [r for r in ranks if r["moves"] == min(r["moves"] for r in ranks)]
        if self._rank == min((r["rank"] for r in ranks if r not in gone), default=self._rank):
            print(
                "\n".join(
                    [
                        f"error: no rank has made progress for {self._timeout_s:g} s (guard.hang_timeout_s)",
                        *(self._describe(r, gone, len(blamed)) for r in blamed[:4]),
                        "The same command resumes from the last checkpoint. If a step can take longer than that, "
                        "increase guard.hang_timeout_s",
                    ]
                ),
                file=sys.stderr,
                flush=True,
            )
            for r in blamed:
                if r["rank"] != self._rank and r["host"] == socket.gethostname():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(r["pid"], signal.SIGKILL)
        else:
            time.sleep(1.0)  # the rank that reports ends first
        os._exit(EXIT_CODE)

    def _describe(self, r: dict[str, Any], gone: list[dict[str, Any]], num_blamed: int) -> str:
        """One of the `num_blamed` ranks at fault: its state, position and stack."""
        if r in gone:
            silent = f"has sent no heartbeat for {r['age_s']:.0f} s"
            state = f"{silent}: it is stopped, dead, or in a call that never returns"
        elif num_blamed == self._world_size:
            state = "hangs" if num_blamed == 1 else "hangs, as do all others; they are at the same position"
        else:
            state = "hangs, and all others wait for it"
        stack = self._stack(r)
        return f"{_who(r)} {state}. Its position: {r['position']}" + (f". Its stack:\n{stack}" if stack else "")

    def _follow_launcher(self) -> None:
        """If the launcher was killed, nothing else would end this rank: save and stop as on SIGTERM."""
        if self._launchers and _launchers()[: len(self._launchers)] != self._launchers:
            self._launchers = []
            os.kill(os.getpid(), signal.SIGTERM)

    # --- files ----------------------------------------------------------------------------------------------

    def _write(self) -> None:
        if self._heartbeat is None:
            return
        record = json.dumps(
            {
                "rank": self._rank,
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "moves": self._moves,
                "slow": self._slow,
                "written": time.time(),
                "position": self._position[:256],
            }
        )
        with contextlib.suppress(OSError):  # a full disk must not abort training
            # One write of constant size, so that readers never see a part of a record.
            os.pwrite(self._heartbeat, record.encode().ljust(1024), 0)

    def _read(self) -> list[dict[str, Any]]:
        """The last record of every rank that has written one."""
        found = []
        for rank in range(self._world_size):
            with contextlib.suppress(OSError, ValueError):
                record = json.loads(self._file(rank).read_text())
                record["age_s"] = time.time() - record["written"]
                record["alive"] = record["host"] != socket.gethostname() or _is_alive(record["pid"])
                found.append(record)
        return found

    def lost_ranks(self, wait_s: float = 3.0) -> tuple[list[str], bool]:
        """Find the ranks on this machine whose processes have ended. Called after a collective failed.

        Args:
            wait_s: how long to wait for a process to end, in seconds.
        Returns:
            A sentence about each lost rank, and whether this rank is the one that reports them.
        """
        until = time.monotonic() + wait_s
        while True:
            ranks = self._read()
            dead = [r for r in ranks if not r["alive"]]
            if dead or time.monotonic() > until:
                reports = self._rank == min((r["rank"] for r in ranks if r["alive"]), default=self._rank)
                ended = [
                    f"{_who(r)} ended at: {r['position']}"
                    + (f", where it hung:\n{stack}\n" if (stack := self._stack(r)) else "")
                    for r in dead
                ]
                return ended, reports
            time.sleep(0.05)

    def _file(self, rank: int) -> Path:
        return self._folder / f"rank-{rank:05d}.json"

    def _stack(self, r: dict[str, Any]) -> str:
        """The stack that a rank has written; empty if there is none."""
        with contextlib.suppress(OSError):
            return self._stack_file(r["rank"]).read_text().rstrip()
        return ""

    def _stack_file(self, rank: int) -> Path:
        return self._folder / f"rank-{rank:05d}.stack"


def _who(r: dict[str, Any]) -> str:
    return f"rank {r['rank']} (process {r['pid']} on {r['host']})"


def _is_alive(pid: int) -> bool:
    """Whether a process of this machine exists and is not a zombie."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] not in ("Z", "X")
    except OSError:
        return False


def _launchers() -> list[int]:
    """The process ids of the parent and its parent, if they are launchers."""
    found: list[int] = []
    pid = os.getppid()
    with contextlib.suppress(OSError, ValueError, IndexError):
        while len(found) < 2:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            if not any(name in command for name in (b"deepspeed", b"torchrun", b"torch.distributed.run")):
                break
            found.append(pid)
            pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    return found
