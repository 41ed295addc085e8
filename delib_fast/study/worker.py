"""A worker process of a study: `python -m delib_fast.study.worker`.

It reads tasks as JSON lines from standard input and writes answers as JSON lines to standard output. It runs many
tasks, so that torch is imported once; the output of a task goes to its log. When standard input ends, because the study
was stopped or killed, the worker makes the current training run save and stop, and exits.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from delib_fast.config import ConfigError
from delib_fast.config.load import parse_config
from delib_fast.files import open_without_links
from delib_fast.study.measure import measure
from delib_fast.terminal import echo, guard_process_output

_OUTPUTS = (1, 2)  # the file descriptors of standard output and standard error


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # only answers go to the standard output, whatever else prints
    tasks: queue.Queue[str | None] = queue.Queue()
    busy = threading.Event()
    threading.Thread(target=_read_tasks, args=(tasks, busy), daemon=True).start()
    while (line := tasks.get()) is not None:
        busy.set()
        answer = _answer(json.loads(line))
        busy.clear()
        try:
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
        except BrokenPipeError:
            return


def _read_tasks(tasks: queue.Queue[str | None], busy: threading.Event) -> None:
    for line in sys.stdin:
        tasks.put(line)
    tasks.put(None)
    if busy.is_set():
        os.kill(os.getpid(), signal.SIGTERM)  # training saves and stops; any other task is aborted


def _answer(task: dict[str, Any]) -> dict[str, Any]:
    start, cpu_start = time.perf_counter(), _cpu_seconds()
    log = Path(task["log"])
    log.parent.mkdir(parents=True, exist_ok=True)
    with _output_to(log):
        try:
            answer = {"ok": True, "result": _run(task)}
        except Exception as error:  # noqa: BLE001 (the study reports any error and continues with other tasks)
            echo(traceback.format_exc(), err=True)
            readable = isinstance(error, ValueError | RuntimeError | ConfigError)
            answer = {"ok": False, "error": str(error) if readable else f"{type(error).__name__}: {error}"}
    return {**answer, "wall_s": time.perf_counter() - start, "cpu_s": _cpu_seconds() - cpu_start}


def _run(task: dict[str, Any]) -> Any:
    if task["do"] == "train":
        # Imported here, where standard output is the task's log, because importing deepspeed prints to it.
        from delib_fast.training.run import run

        run(parse_config(task["config"], where="study"))
        return None
    return measure(task)


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


@contextlib.contextmanager
def _output_to(log: Path) -> Iterator[None]:
    """Append the output of the process to a file, including what C++ libraries and child processes print."""
    sys.stdout.flush()
    kept = [os.dup(number) for number in _OUTPUTS]
    try:
        with open(log, "ab", opener=open_without_links) as file:
            for number in _OUTPUTS:
                os.dup2(file.fileno(), number)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, original in zip(_OUTPUTS, kept, strict=True):
            os.dup2(original, number)
            os.close(original)


if __name__ == "__main__":
    guard_process_output()
    main()
