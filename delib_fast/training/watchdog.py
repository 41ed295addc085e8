"""Finds the rank that hangs or has died, reports it, and ends all ranks, so that no job waits forever.

Each rank writes its position (`at`) to a small file, which takes about 20 µs. A thread in each rank rewrites the file
regularly as a heartbeat. One rank watches the files of all others, and every rank watches the processes of its own
machine:

- A rank whose heartbeat stays the same for `timeout_s` is dead, is stopped, or keeps the GIL, whatever it was doing. So
  is a rank whose process has ended while its file remains.
- If every heartbeat changes, but no rank has moved for `timeout_s`, the rank that is furthest behind hangs and the
  others wait for it in a collective. Only `local_work`, in which a rank waits for no other, may take longer.

The rank at fault is reported with its position and its stack, which it writes to a second file. If it holds the GIL, so
that no Python thread can write, `faulthandler` writes the stack from a C thread. The rank gets SIGKILL if its process
runs here and belongs to this job, and every rank ends with exit code 3.

The ranks exchange files because they share the run directory's file system anyway, and because torch's store is served
by a rank, which may be the one that hangs. The watching rank is the lowest one whose heartbeat changes. Ages are
measured on its own clock from the moments at which it saw a file change, so the clocks of two machines are never
compared.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from delib_fast.config import ConfigError
from delib_fast.engine.processes import Process
from delib_fast.terminal import echo
from delib_fast.training.heartbeats import Heartbeat, HeartbeatFolder

EXIT_CODE = 3
# How long a rank may take to end after its process or another rank has failed: it may still print the reason.
_GRACE_S = 10.0


@dataclass
class _Observed:
    """What this rank has seen of another one, with times of this rank's monotonic clock."""

    heartbeat: Heartbeat
    beaten: float
    """When its heartbeat was last seen to change."""
    moved: float
    """When it was last seen to move."""
    gone: float | None = None
    """When its process was first seen to have ended."""


class Watchdog:
    """Watches this rank, and the others through their files.

    Args:
        folder: the folder of the files of all ranks.
        processes: the process of each rank.
        timeout_s: how long a rank may stay at one position, or be silent, in seconds; None turns the watchdog off.
    """

    def __init__(self, folder: Path, rank: int, processes: Mapping[int, Process], timeout_s: float | None) -> None:
        self._path, self._rank, self._processes, self._timeout_s = folder, rank, processes, timeout_s
        self._position, self._moves, self._order, self._beat = "starting", 0, 0, 0
        self._moved = time.monotonic()
        self._local = self._waits = self._ended = self._watches_all = False
        self._files: HeartbeatFolder | None = None
        self._seen: dict[int, _Observed] = {}
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._launchers = _launchers()

    # --- called by the training loop ------------------------------------------------------------------------

    def at(self, position: str) -> None:
        """Record a new position of this rank. The rank with the fewest calls is the furthest behind."""
        self._position = position
        self._order += 1
        self._move()
        self._write()

    @contextlib.contextmanager
    def local_work(self, activity: str) -> Iterator[None]:
        """Do not count this rank as hanging while the block runs: work of unknown duration without a collective.

        Its heartbeat must continue. In collectives of `Ranks` and `Rendezvous` inside the block it counts as waiting.
        """
        before, was_local = self._position, self._local
        self._position, self._local = activity, True
        self._move()
        self._write()
        try:
            yield
        finally:
            self._position, self._local = before if was_local else f"after {activity}", was_local
            self._move()
            self._write()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count this rank as waiting for the others while the block runs, also inside `local_work`."""
        was_local, self._local, self._waits = self._local, False, True
        self._move()
        try:
            yield
        finally:
            self._local, self._waits = was_local, False
            self._move()

    def _move(self) -> None:
        self._moved = time.monotonic()
        self._moves += 1

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Watch while the block runs. Raises ConfigError if the folder or the thread cannot be created."""
        if self._timeout_s is None:
            yield
            return
        self._files = HeartbeatFolder(self._path, self._rank)
        self._move()
        self._write()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            raise ConfigError(
                f"the watchdog cannot start: {error}; raise the limit on processes (ulimit -u), or set "
                "guard.hang_timeout_s: null"
            ) from None
        try:
            yield
        finally:
            failed = sys.exc_info()[0] is not None
            self._done.set()
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()
            self._ended = failed
            self._write()
            self._files.close(delete=not failed)
            self._files = None

    # --- the thread -----------------------------------------------------------------------------------------

    def _watch(self) -> None:
        assert self._timeout_s is not None
        assert self._files is not None
        looked, written_for = time.monotonic(), -1
        while not self._done.wait(period := min(self._timeout_s / 10, 5.0)):
            self._arm()
            self._write()
            self._follow_launcher()
            if self._files.has_verdict():
                self._end_after_report()
            now = time.monotonic()
            if now - looked > 2 * period + 2:  # this process was stopped itself: what it last saw says nothing
                self._seen.clear()
            looked = now
            self._look(now)
            silent = self._silent(now)
            hanging = not silent and self._all_wait(now)
            if self._is_unmoved(now) and written_for != self._moves:
                written_for = self._moves
                self._write_own_stack()
            if silent:
                self._judge_silent(silent)
            elif hanging:
                self._judge_hanging()

    def _arm(self) -> None:
        """Let a C thread write the stacks and end the process, unless this is called again within the timeout."""
        if self._timeout_s is not None and self._files is not None:
            file = 2 if len(self._processes) == 1 else self._files.stack
            faulthandler.dump_traceback_later(self._timeout_s, exit=True, file=file)

    def _is_unmoved(self, now: float) -> bool:
        return not self._local and now - self._moved > (self._timeout_s or 0)

    def _look(self, now: float) -> None:
        """Read the heartbeats that this rank watches: of lower ranks up to one that is alive, else of all ranks."""
        assert self._files is not None
        assert self._timeout_s is not None
        self._watches_all = True
        observed: dict[int, _Observed | None] = {}
        for rank in range(self._rank):
            found = observed[rank] = self._observe(rank, now)
            if found is not None and found.gone is None and now - found.beaten <= self._timeout_s:
                self._watches_all = False
                break
        for rank, process in self._processes.items():
            if rank not in (self._rank, *observed) and (self._watches_all or process.has_ended):
                observed[rank] = self._observe(rank, now)
        # What was seen of a rank that is not read any more says nothing about it.
        self._seen = {rank: found for rank, found in observed.items() if found is not None}

    def _observe(self, rank: int, now: float) -> _Observed | None:
        """Read the heartbeat of another rank. None if it has not started, or has finished."""
        assert self._files is not None
        heartbeat = self._files.read(rank)
        if heartbeat is None:
            return None
        seen = self._seen.setdefault(rank, _Observed(heartbeat, now, now))
        if heartbeat.beat != seen.heartbeat.beat:
            seen.beaten = now
        if heartbeat.moves != seen.heartbeat.moves or heartbeat.local:
            seen.moved = now
        seen.heartbeat = heartbeat
        if heartbeat.ended or self._processes[rank].has_ended:
            seen.gone = seen.gone or now
        return seen

    def _silent(self, now: float) -> list[int]:
        """The ranks that are dead, stopped, or keep the GIL."""
        assert self._timeout_s is not None
        grace = min(self._timeout_s, _GRACE_S)
        return [
            rank
            for rank, seen in sorted(self._seen.items())
            if now - seen.beaten > self._timeout_s or (seen.gone is not None and now - seen.gone > grace)
        ]

    def _all_wait(self, now: float) -> bool:
        """Whether no rank has moved for too long, although every heartbeat changes. Only the watching rank can know."""
        assert self._timeout_s is not None
        stuck = all(now - seen.moved > self._timeout_s for seen in self._seen.values())
        return self._watches_all and self._is_unmoved(now) and stuck

    # --- the verdict ----------------------------------------------------------------------------------------

    def _judge_silent(self, ranks: list[int]) -> None:
        """Report ranks without a heartbeat, and end this one."""
        assert self._files is not None
        assert self._timeout_s is not None
        faulthandler.cancel_dump_traceback_later()  # not needed: this thread can run, and ends the process itself
        until = time.monotonic() + min(self._timeout_s, _GRACE_S)
        # The C thread of a rank writes its stack, unless its process is stopped or has ended.
        while not any(self._has_gone(r) or self._files.read_stack(r) for r in ranks) and time.monotonic() < until:
            time.sleep(0.1)
        if self._done.is_set() or not self._files.claim_verdict():
            return self._end_after_report()
        lines = [f"{self._who(r)} {self._state(r)}. Its position: {self._position_of(r)}" for r in ranks[:4]]
        self._report("a rank is lost", lines, ranks)

    def _judge_hanging(self) -> None:
        """Report the ranks that are furthest behind, and end this one; return if a rank moves meanwhile."""
        assert self._files is not None
        assert self._timeout_s is not None
        moves = self._moves
        time.sleep(min(self._timeout_s / 4, 6.0))  # until the others have written their stacks
        now = time.monotonic()
        self._look(now)
        if self._moves != moves or self._done.is_set() or self._silent(now) or not self._all_wait(now):
            return
        if not self._files.claim_verdict():
            return self._end_after_report()
        ranks = {self._rank: self._heartbeat(), **{rank: seen.heartbeat for rank, seen in self._seen.items()}}
        behind = [r for r, h in ranks.items() if h.order == min(other.order for other in ranks.values())]
        working = [r for r in behind if not ranks[r].waits]
        blamed = sorted(working or behind)
        if len(blamed) == len(ranks):
            state = "hangs" if len(blamed) == 1 else "hangs, as do all others; they are at the same position"
        elif working:
            state = "hangs, and all others wait for it"
        else:  # one left a collective that another waits in
            blamed, state = sorted(ranks), "waits for the others, which wait at other positions"
        lines = [f"{self._who(r)} {state}. Its position: {self._position_of(r)}" for r in blamed[:4]]
        self._report(f"no rank has made progress for {self._timeout_s:g} s (guard.hang_timeout_s)", lines, blamed)

    def _report(self, what: str, lines: list[str], blamed: Iterable[int]) -> NoReturn:
        assert self._files is not None
        text = [f"error: {what}"]
        for rank, line in zip(blamed, lines, strict=False):
            stack = self._files.read_stack(rank)
            text.append(line + (f". Its stack:\n{stack}" if stack else ""))
        text.append(
            "The same command resumes from the last checkpoint. If a step can take longer than that, increase "
            "guard.hang_timeout_s"
        )
        echo("\n".join(text), err=True)
        for rank in blamed:
            process = self._processes[rank]
            if rank != self._rank and process.is_here and not process.has_ended and (reason := process.kill()):
                echo(f"{self._who(rank)} was not killed: {reason}", err=True)
        os._exit(EXIT_CODE)

    def _end_after_report(self) -> None:
        """End this rank a moment after the one that reports, unless its main thread is ending it."""
        if not self._done.wait(1.0):
            os._exit(EXIT_CODE)

    def _state(self, rank: int) -> str:
        if self._has_gone(rank):
            return "has ended"
        silent = time.monotonic() - self._seen[rank].beaten if rank in self._seen else 0.0
        return f"has sent no heartbeat for {silent:.0f} s: it is stopped, dead, or in a call that never returns"

    def _has_gone(self, rank: int) -> bool:
        heartbeat = self._seen[rank].heartbeat if rank in self._seen else None
        return self._processes[rank].has_ended or (heartbeat is not None and heartbeat.ended)

    def _who(self, rank: int) -> str:
        return f"rank {rank} ({self._processes[rank]})"

    def _position_of(self, rank: int) -> str:
        if rank == self._rank:
            return self._position
        return "".join(c for c in self._seen[rank].heartbeat.position if c.isprintable())

    def _follow_launcher(self) -> None:
        """If the launcher was killed, nothing else would end this rank: save and stop as on SIGTERM."""
        if self._launchers and _launchers()[: len(self._launchers)] != self._launchers:
            self._launchers = []
            os.kill(os.getpid(), signal.SIGTERM)

    # --- files ----------------------------------------------------------------------------------------------

    def _heartbeat(self) -> Heartbeat:
        return Heartbeat(
            self._beat, self._moves, self._order, self._local, self._waits, self._ended, self._position[:256]
        )

    def _write(self) -> None:
        if self._files is not None:
            self._beat += 1
            self._files.write(self._heartbeat())

    def _write_own_stack(self) -> None:
        """Write the stack of the main thread, for the rank that reports."""
        assert self._files is not None
        faulthandler.cancel_dump_traceback_later()  # not needed: this thread can run, and ends the process itself
        main = sys._current_frames()[threading.main_thread().ident or 0]
        self._files.stack.seek(0)
        self._files.stack.truncate()
        self._files.stack.write("".join(traceback.format_stack(main)))
        self._files.stack.flush()

    def lost_ranks(self, wait_s: float = 3.0) -> tuple[list[str], bool]:
        """Find the ranks that have ended. Called after a collective failed.

        Args:
            wait_s: how long to wait for a process to end, in seconds.
        Returns:
            A sentence about each lost rank, and whether this rank is the one that reports them.
        """
        until = time.monotonic() + wait_s
        files = self._files
        while True:
            for rank in self._processes if files is not None else ():
                if rank != self._rank:
                    self._observe(rank, time.monotonic())
            ended = [r for r in sorted(self._processes) if r != self._rank and self._has_gone(r)]
            if ended or time.monotonic() > until:
                break
            time.sleep(0.05)
        if files is None or not ended:
            return [f"{self._who(r)} has ended" for r in ended], True
        self._done.set()  # this thread reports, so the watchdog's thread must not end the process
        return [self._lost(files, rank) for rank in ended], files.claim_verdict()

    def _lost(self, files: HeartbeatFolder, rank: int) -> str:
        if rank not in self._seen:
            return f"{self._who(rank)} has ended"
        stack = files.read_stack(rank)
        where = f", where it hung:\n{stack}\n" if stack else ""
        return f"{self._who(rank)} ended at: {self._position_of(rank)}{where}"


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
