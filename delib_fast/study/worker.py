"""One worker of a study: `python -m delib_fast.study.worker`, tasks as JSON lines in, answers as JSON lines out.

It lives through many tasks, so torch is imported once. What training prints goes to the task's log. When its standard
input ends (the study was stopped, or died) it asks the training at hand to save and stop, and ends.
"""

from __future__ import annotations

import json
import os
import queue
import resource
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

from delib_fast.config import ConfigError


def main() -> None:
    # The answers keep the standard output to themselves: whatever else prints, prints into a log.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    tasks: queue.Queue[str | None] = queue.Queue()
    busy = threading.Event()
    threading.Thread(target=_listen, args=(tasks, busy), daemon=True).start()
    while (line := tasks.get()) is not None:
        busy.set()
        answer = _answer(json.loads(line))
        busy.clear()
        try:
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
        except BrokenPipeError:
            return


def _listen(tasks: queue.Queue[str | None], busy: threading.Event) -> None:
    for line in sys.stdin:
        tasks.put(line)
    tasks.put(None)
    if busy.is_set():
        os.kill(os.getpid(), signal.SIGTERM)  # training saves and stops; anything else just ends


def _answer(task: dict[str, Any]) -> dict[str, Any]:
    began, cpu = time.perf_counter(), _cpu_seconds()
    log = Path(task["log"])
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as stream, _printing_to(stream):
        try:
            answer = {"ok": True, "result": _do(task)}
        except Exception as error:  # noqa: BLE001 (whatever it is, the study must hear of it)
            traceback.print_exc()
            plain = isinstance(error, ValueError | RuntimeError | ConfigError)
            answer = {"ok": False, "error": str(error) if plain else f"{type(error).__name__}: {error}"}
    return {**answer, "wall_s": time.perf_counter() - began, "cpu_s": _cpu_seconds() - cpu}


def _do(task: dict[str, Any]) -> Any:
    if task["do"] == "train":
        from delib_fast.config.load import parse_config
        from delib_fast.training.run import run

        run(parse_config(task["config"], where="study"))
        return None
    from delib_fast.study.measure import measure

    return measure(task)


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


class _printing_to:  # noqa: N801 (reads as a word)
    """File descriptors 1 and 2 write to this file inside: also what C++ prints."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __enter__(self) -> None:
        sys.stdout.flush()
        self._kept = (os.dup(1), os.dup(2))
        for number in (1, 2):
            os.dup2(self._stream.fileno(), number)

    def __exit__(self, *_: object) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, kept in zip((1, 2), self._kept, strict=True):
            os.dup2(kept, number)
            os.close(kept)


if __name__ == "__main__":
    main()
