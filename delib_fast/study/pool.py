"""As many workers as the machine takes, and tasks handed to them as soon as what they need is done."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_GIB_A_WORKER = 2  # torch, deepspeed and a small model, with room


class StudyError(RuntimeError):
    """Some tasks failed; the others are done. Says which, and where their logs are."""


@dataclass(frozen=True)
class Task:
    """Something for a worker to do, after other tasks."""

    name: str
    """shown to people"""
    work: Mapping[str, Any]
    needs: tuple[str, ...] = field(default=())
    """names of tasks that must be done before"""


def worker_environments(wanted: int | str, device: str) -> list[dict[str, str]]:
    """One environment a worker: its GPU, or its share of the CPU's cores."""
    import torch

    gpus = torch.cuda.device_count() if device != "cpu" else 0
    cores = len(os.sched_getaffinity(0))
    fits = gpus or max(1, min(cores, _available_gib() // _GIB_A_WORKER))
    count = fits if wanted == "auto" else int(wanted)
    if gpus:
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        visible = named.split(",") if named else [str(k) for k in range(gpus)]
        return [{"CUDA_VISIBLE_DEVICES": visible[k % gpus]} for k in range(count)]
    return [{"OMP_NUM_THREADS": str(max(1, cores // count)), "DS_ACCELERATOR": "cpu"} for _ in range(count)]


def _available_gib() -> int:
    try:
        return int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30)
    except (ValueError, OSError):
        return _GIB_A_WORKER


def run_tasks(
    tasks: Sequence[Task], environments: Sequence[Mapping[str, str]], done: Callable[[Task, dict[str, Any]], None]
) -> None:
    """Do every task; `done` is told of each with its answer, one call at a time.

    A task that fails takes those that need it with it, and nothing else.
    Raises:
        StudyError: after everything that could be done is done.
        KeyboardInterrupt: workers have been asked to save and stop, and have ended.
    """
    board = _Board(tasks)
    count = min(len(environments), len(tasks))
    threads = [threading.Thread(target=_serve, args=(board, environment, done)) for environment in environments[:count]]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)  # an endless join can't be interrupted
    except KeyboardInterrupt:
        board.stop()
        for thread in threads:
            thread.join()
        raise
    if board.failures:
        raise StudyError("\n".join(board.failures))


class _Board:
    """Which tasks are waiting, at work, done or failed; shared by the threads that serve workers."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._waiting = list(tasks)
        self._finished: set[str] = set()
        self._at_work = 0
        self._changed = threading.Condition()
        self.stopping = False
        self.failures: list[str] = []
        self.processes: list[subprocess.Popen[str]] = []

    def take(self) -> Task | None:
        """The first task that nothing holds up; waits for one; None when there will be none."""
        with self._changed:
            while not self.stopping:
                for task in self._waiting:
                    if self._finished.issuperset(task.needs):
                        self._waiting.remove(task)
                        self._at_work += 1
                        return task
                if not self._at_work:
                    return None  # what still waits, waits for something that failed
                self._changed.wait()
            return None

    def close(self, task: Task, error: str | None, done: Callable[[], None]) -> None:
        with self._changed:
            self._at_work -= 1
            if error is None:
                self._finished.add(task.name)
                done()
            elif not self.stopping:
                self.failures.append(f"{task.name}: {error} (log: {task.work['log']})")
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self.stopping = True
            for process in self.processes:
                if process.stdin is not None:
                    process.stdin.close()
            self._changed.notify_all()


def _serve(board: _Board, environment: Mapping[str, str], done: Callable[[Task, dict[str, Any]], None]) -> None:
    """One worker's thread: hand it tasks one by one; a worker that dies is replaced for the next task."""
    process: subprocess.Popen[str] | None = None
    while (task := board.take()) is not None:
        if process is None or process.poll() is not None:
            process = _start(environment)
            board.processes.append(process)
        answer = _ask(process, task)
        board.close(
            task, None if answer["ok"] else answer["error"], lambda task=task, answer=answer: done(task, answer)
        )  # type: ignore[misc]
    if process is not None:
        if process.stdin is not None and not process.stdin.closed:
            process.stdin.close()
        process.wait()


def _start(environment: Mapping[str, str]) -> subprocess.Popen[str]:
    # In a session of its own: Ctrl-C is for the study, which then closes the worker's input.
    return subprocess.Popen(
        [sys.executable, "-m", "delib_fast.study.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        start_new_session=True,
    )


def _ask(process: subprocess.Popen[str], task: Task) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(task.work) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
    except (OSError, ValueError):  # ValueError: closed by stop()
        line = ""
    if not line:
        return {"ok": False, "error": f"its worker ended (exit code {process.wait()})"}
    return dict(json.loads(line))
