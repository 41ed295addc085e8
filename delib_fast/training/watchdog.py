"""Names a rank that hangs or is gone, and ends all of them, so that no job waits for ever or leaves a process behind.

Each rank's training loop says where it is (`at`): a line in a small file, some 20 µs. A thread of each rank writes it
again now and then, as a sign of life, and reads the files of the others. When a rank has not moved for `timeout_s`:

- one whose file is no longer written is gone, or the whole process is stopped;
- else the one that is furthest behind is stuck, and the others wait for it in a collective;
- its stack is in a file beside. Where it keeps the interpreter's lock, so that no thread of Python can write,
  `faulthandler` does it from a thread of C.

The rank to blame is told with where it was and its stack, it gets SIGKILL if it is on the same machine, and every rank
ends with exit code 3.

A file and not a socket or torch's store: the store lives in rank 0, which may be the one that hangs, and the run
directory is on a file system that all ranks share anyway.
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
    """Watches one rank of `world_size`, and the others through their files under `folder`.

    Args:
        timeout_s: how long a rank may stay at one place; None watches nothing.
    """

    def __init__(self, folder: Path, rank: int, world_size: int, timeout_s: float | None) -> None:
        self._folder, self._rank, self._world_size, self._timeout_s = folder, rank, world_size, timeout_s
        self._place, self._moves, self._moved = "starting", 0, time.monotonic()
        self._slow = False
        self._heartbeat: int | None = None
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._launchers = _launchers()

    # --- what the training loop says ------------------------------------------------------------------------

    def at(self, place: str) -> None:
        """The loop has come to a new place. The rank with the fewest calls is the furthest behind."""
        self._place, self._moved = place, time.monotonic()
        self._moves += 1
        self._write()

    @contextlib.contextmanager
    def suspended(self, what: str) -> Iterator[None]:
        """Something of unknown length (encoding, an export): nobody is stuck while a rank that lives does it."""
        self.at(what)
        self._slow = True
        faulthandler.cancel_dump_traceback_later()
        try:
            yield
        finally:
            self._slow = False
            self._arm()  # now: the thread's next round may come too late, if the lock is kept from here on
            self.at(f"after {what}")

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        if self._timeout_s is None:
            yield
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        self._stacks = self._stack_file(self._rank).open("w")
        self._heartbeat = os.open(self._file(self._rank), os.O_RDWR | os.O_CREAT)
        self.at(self._place)
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
        """Have a thread of C write the stacks and end the process, unless it is armed anew within the time-out."""
        if self._timeout_s is not None and self._heartbeat is not None:
            faulthandler.dump_traceback_later(
                self._timeout_s, exit=True, file=2 if self._world_size == 1 else self._stacks
            )

    def _judge(self, moves: int) -> None:
        """This rank has not moved for too long: is it because of another one?"""
        assert self._timeout_s is not None
        faulthandler.cancel_dump_traceback_later()  # this thread runs, and ends the process itself
        main = sys._current_frames()[threading.main_thread().ident or 0]
        self._stacks.seek(0)
        self._stacks.truncate()
        self._stacks.write("".join(traceback.format_stack(main)))
        self._stacks.flush()
        self._write()
        time.sleep(min(self._timeout_s / 4, 6.0))  # the others write theirs
        ranks = self._read()
        gone = [r for r in ranks if not r["lives"] or (not r["slow"] and r["age_s"] > max(self._timeout_s / 2, 2.0))]
        if self._moves != moves or self._done.is_set() or (not gone and any(r["slow"] for r in ranks)):
            return
        for r in gone:  # its stack comes from a thread of C, if it is not stopped altogether
            until = time.monotonic() + min(self._timeout_s, 10.0)
            while r["lives"] and not self._stack(r) and time.monotonic() < until:
                time.sleep(0.1)
        blamed = gone or [r for r in ranks if r["moves"] == min(r["moves"] for r in ranks)]
        if self._rank == min((r["rank"] for r in ranks if r not in gone), default=self._rank):
            print(
                "\n".join(
                    [
                        f"error: no rank has moved for {self._timeout_s:g} s (guard.hang_timeout_s)",
                        *(self._describe(r, gone, len(blamed)) for r in blamed[:4]),
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
            time.sleep(1.0)  # the one that tells of it comes first
        os._exit(EXIT_CODE)

    def _describe(self, r: dict[str, Any], gone: list[dict[str, Any]], blamed: int) -> str:
        if r in gone:
            state = f"gives no sign of life for {r['age_s']:.0f} s: stopped, gone, or in a call that never returns"
        elif blamed == self._world_size:
            state = "does not move" if blamed == 1 else "does not move, nor does any other: they are equally far"
        else:
            state = "does not move, and all others wait for it"
        stack = self._stack(r)
        return f"{_who(r)} {state}. It is at: {r['place']}" + (f". Its stack:\n{stack}" if stack else "")

    def _follow_launcher(self) -> None:
        """If the launcher was killed, nobody would end this rank: it saves and ends as if it were asked to."""
        if self._launchers and _launchers()[: len(self._launchers)] != self._launchers:
            self._launchers = []
            os.kill(os.getpid(), signal.SIGTERM)

    # --- files ----------------------------------------------------------------------------------------------

    def _write(self) -> None:
        if self._heartbeat is None:
            return
        told = json.dumps(
            {
                "rank": self._rank,
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "moves": self._moves,
                "slow": self._slow,
                "written": time.time(),
                "place": self._place[:256],
            }
        )
        with contextlib.suppress(OSError):  # a full disk must not end a run that trains
            os.pwrite(self._heartbeat, told.encode().ljust(1024), 0)  # one write, always as long: it is read whole

    def _read(self) -> list[dict[str, Any]]:
        """What every rank last wrote; of one that wrote nothing, nothing."""
        found = []
        for rank in range(self._world_size):
            with contextlib.suppress(OSError, ValueError):
                told = json.loads(self._file(rank).read_text())
                told["age_s"] = time.time() - told["written"]
                told["lives"] = told["host"] != socket.gethostname() or _lives(told["pid"])
                found.append(told)
        return found

    def lost(self, wait_s: float = 3.0) -> tuple[list[str], bool]:
        """After a collective broke: the ranks on this machine whose process has ended, and whether this rank is the
        one to tell of them. Waits a little for a process that is just ending."""
        until = time.monotonic() + wait_s
        while True:
            ranks = self._read()
            dead = [r for r in ranks if not r["lives"]]
            if dead or time.monotonic() > until:
                speaks = self._rank == min((r["rank"] for r in ranks if r["lives"]), default=self._rank)
                told = [
                    f"{_who(r)} ended at: {r['place']}"
                    + (f", where it hung:\n{stack}\n" if (stack := self._stack(r)) else "")
                    for r in dead
                ]
                return told, speaks
            time.sleep(0.05)

    def _file(self, rank: int) -> Path:
        return self._folder / f"rank-{rank:05d}.json"

    def _stack(self, r: dict[str, Any]) -> str:
        with contextlib.suppress(OSError):
            return self._stack_file(r["rank"]).read_text().rstrip()
        return ""

    def _stack_file(self, rank: int) -> Path:
        return self._folder / f"rank-{rank:05d}.stack"


def _who(r: dict[str, Any]) -> str:
    return f"rank {r['rank']} (process {r['pid']} on {r['host']})"


def _lives(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] not in ("Z", "X")
    except OSError:
        return False


def _launchers() -> list[int]:
    """The parent, and its parent, as far as they start ranks."""
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
