"""A pool of worker processes. A task starts when a worker is free and the tasks that it depends on are done."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

_GIB_PER_WORKER = 2  # torch, deepspeed and a small model, with a margin


class StudyError(RuntimeError):
    """Some tasks failed, and the others are done. The message lists the failed tasks with their logs."""


@dataclass(frozen=True)
class Task:
    """A task for a worker."""

    name: str
    """Shown in progress messages."""
    work: Mapping[str, Any]
    """What the worker receives, as JSON."""
    depends_on: tuple[str, ...] = ()
    """Names of the tasks that have to be done before this one."""


def worker_environments(workers: int | str, device: str) -> list[dict[str, str]]:
    """The environment variables of each worker, which give it its GPU or its share of the CPU cores.

    Args:
        workers: number of workers, or "auto".
        device: "cpu" uses no GPU.
    """
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    cores = len(os.sched_getaffinity(0))
    fitting = gpus or max(1, min(cores, _available_gib() // _GIB_PER_WORKER))
    count = fitting if workers == "auto" else int(workers)
    if gpus:
        listed = os.environ.get("CUDA_VISIBLE_DEVICES")
        visible = listed.split(",") if listed else [str(k) for k in range(gpus)]
        return [{"CUDA_VISIBLE_DEVICES": visible[k % gpus]} for k in range(count)]
    return [{"OMP_NUM_THREADS": str(max(1, cores // count)), "DS_ACCELERATOR": "cpu"} for _ in range(count)]


def _available_gib() -> int:
    try:
        return int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30)
    except (ValueError, OSError):
        return _GIB_PER_WORKER


def run_tasks(
    tasks: Sequence[Task], environments: Sequence[Mapping[str, str]], on_done: Callable[[Task, dict[str, Any]], None]
) -> None:
    """Run all tasks. If one fails, the tasks that depend on it are skipped, and all others still run.

    Args:
        on_done: called with each completed task and its answer, one call at a time.
    Raises:
        StudyError: tasks have failed. It is raised after all other tasks are done.
        KeyboardInterrupt: the workers have saved, stopped and exited.
    """
    queue = _TaskQueue(tasks)
    count = min(len(environments), len(tasks))
    threads = [threading.Thread(target=_serve, args=(queue, env, on_done)) for env in environments[:count]]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)  # a join without a timeout cannot be interrupted
    except KeyboardInterrupt:
        queue.stop()
        for thread in threads:
            thread.join()
        raise
    if queue.failures:
        raise StudyError("\n".join(queue.failures))


class _TaskQueue:
    """The tasks that are waiting or running; shared by the threads, each of which serves one worker."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._waiting = list(tasks)
        self._done: set[str] = set()
        self._running = 0
        self._changed = threading.Condition()
        self._processes: list[subprocess.Popen[str]] = []
        self.stopping = False
        self.failures: list[str] = []

    def take(self) -> Task | None:
        """Wait for a task whose dependencies are done, and take it. Returns None if no further task can start."""
        with self._changed:
            while not self.stopping:
                for task in self._waiting:
                    if self._done.issuperset(task.depends_on):
                        self._waiting.remove(task)
                        self._running += 1
                        return task
                if not self._running:
                    return None  # the remaining tasks depend on one that failed
                self._changed.wait()
            return None

    def finish(self, task: Task, answer: dict[str, Any], on_done: Callable[[Task, dict[str, Any]], None]) -> None:
        """Record the answer of a worker."""
        with self._changed:
            self._running -= 1
            if answer["ok"]:
                self._done.add(task.name)
                on_done(task, answer)
            elif not self.stopping:
                self.failures.append(f"{task.name}: {answer['error']} (log: {task.work['log']})")
            self._changed.notify_all()

    def add_process(self, process: subprocess.Popen[str]) -> None:
        """Register a worker for `stop`."""
        self._processes.append(process)

    def stop(self) -> None:
        """Assign no more tasks, and close the input of all workers, which then save and exit."""
        with self._changed:
            self.stopping = True
            for process in self._processes:
                if process.stdin is not None:
                    process.stdin.close()
            self._changed.notify_all()


def _serve(queue: _TaskQueue, environment: Mapping[str, str], on_done: Callable[[Task, dict[str, Any]], None]) -> None:
    """Start a worker and send it tasks one by one. If the worker dies, the next task gets a new one."""
    process: subprocess.Popen[str] | None = None
    while (task := queue.take()) is not None:
        if process is None or process.poll() is not None:
            process = _start_worker(environment)
            queue.add_process(process)
        queue.finish(task, _send(process, task), on_done)
    if process is not None:
        if process.stdin is not None and not process.stdin.closed:
            process.stdin.close()
        process.wait()


def _start_worker(environment: Mapping[str, str]) -> subprocess.Popen[str]:
    # In a session of its own: Ctrl-C reaches only the study, which then closes the input of its workers.
    return subprocess.Popen(
        [sys.executable, "-m", "delib_fast.study.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        start_new_session=True,
    )


def _send(process: subprocess.Popen[str], task: Task) -> dict[str, Any]:
    """Send a task to a worker, and wait for the answer."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(task.work) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
    except (OSError, ValueError):  # ValueError: stop() has closed the input
        line = ""
    if not line:
        return {"ok": False, "error": f"the worker exited with code {process.wait()}"}
    return dict(json.loads(line))
