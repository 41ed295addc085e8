"""A server process that forks ranks: it imports the slow packages once, so that a rank starts immediately.

    with ForkServer() as server:
        job = server.start("helpers.tiny_run:run", [path], world_size=2, FAULT="fsync manifest.json")
        codes = server.wait(job)      # negative: the signal that ended it
        server.output(job)

This is safe because the server only imports: it runs no tensor operation, starts no thread and joins no process group,
so a forked process is like a new one. With OMP_NUM_THREADS=1 there is no thread pool that a fork would lose.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.launch import HANG_S, ROOT, free_port


@dataclass
class Job:
    """The ranks of one `ForkServer.start`. A code is None while its rank runs, and negative for a signal."""

    pids: list[int]
    logs: list[Path]
    codes: list[int | None]


class ForkServer:
    """Starts the server process; a context manager that ends it."""

    def __init__(self) -> None:
        self._logs = tempfile.TemporaryDirectory()
        folders = (
            ROOT,
            ROOT / "tests",
            ROOT / "tests" / "engine",
            ROOT / "tests" / "training",
            ROOT / "tests" / "attack",
            os.environ.get("PYTHONPATH", ""),
        )
        path = os.pathsep.join(map(str, folders))
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ
            | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"},
        )
        self._number = 0
        self._ask({"do": "start", "logs": []})  # it answers when it has imported everything

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait(HANG_S)
        self._logs.cleanup()

    def start(self, target: str, args: list[Any], *, world_size: int = 1, **env: str) -> Job:
        """Fork `world_size` ranks that each call `module:function(*args)`; its result is the exit code."""
        self._number += 1
        logs = [Path(self._logs.name) / f"{self._number}-{rank}.log" for rank in range(world_size)]
        pids = self._ask(
            {
                "do": "start",
                "target": target,
                "args": [str(a) for a in args],
                "port": free_port(),
                "logs": [str(log) for log in logs],
                "env": env,
            }
        )
        return Job(pids, logs, [None] * world_size)

    def poll(self, job: Job) -> list[int | None]:
        for i, pid in enumerate(job.pids):
            if job.codes[i] is None:
                job.codes[i] = self._ask({"do": "poll", "pid": pid})
        return job.codes

    def wait(self, job: Job, *, timeout: float = HANG_S, after_death: float | None = None) -> list[int]:
        """Wait for the exit codes. Ranks that outlive a dead one by `after_death` seconds are killed."""
        end = time.monotonic() + timeout
        while None in self.poll(job):
            if after_death is not None and any(code for code in job.codes):
                end, after_death = min(end, time.monotonic() + after_death), None
            if time.monotonic() > end:
                self.signal(job, signal.SIGKILL)
            time.sleep(0.01)
        return job.codes

    def run(
        self,
        target: str,
        args: list[Any],
        *,
        world_size: int = 1,
        timeout: float = HANG_S,
        code: int | None = 0,
        **env: str,
    ) -> list[str]:
        """Start, wait, and return the output of each rank. Fails unless every rank exits with `code` (None: any)."""
        job = self.start(target, args, world_size=world_size, **env)
        codes = self.wait(job, timeout=timeout)
        outputs = self.output(job)
        assert code is None or codes == [code] * world_size, f"ranks ended with {codes}:\n" + "\n".join(outputs)
        return outputs

    def signal(self, job: Job, number: int, rank: int | None = None) -> None:
        for i, pid in enumerate(job.pids):
            if job.codes[i] is None and rank in (None, i):
                os.kill(pid, number)

    def output(self, job: Job) -> list[str]:
        return [log.read_text(errors="replace") for log in job.logs]

    def _ask(self, request: dict[str, Any]) -> Any:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


# --- the server ---------------------------------------------------------------------------------------------

_PRELOADED = (
    "helpers.tiny_run",
    "helpers.faults",
    "delib_fast.training.dataset",
    "delib_fast.engine.engine",
    "delib_fast.models",
    "delib_fast.training.console",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.models.auto.modeling_auto",
    "tokenizers",
    "torch.optim.adamw",
    "torch.utils.checkpoint",
    "importlib.metadata",
    "deepspeed.runtime.engine",
    "transformers.models.auto.tokenization_auto",
    "rich.progress",
)


def serve() -> None:
    for name in _PRELOADED:
        importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "poll":
            pid, status = os.waitpid(request["pid"], os.WNOHANG)
            answer: Any = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = [_fork(request, rank) for rank in range(len(request["logs"]))]
        print(json.dumps(answer), flush=True)


def _fork(request: dict[str, Any], rank: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        _become_rank(request, rank)
        module, function = request["target"].split(":")
        from helpers import faults

        faults.install()
        code = int(getattr(importlib.import_module(module), function)(*request["args"]) or 0)
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
    except BaseException:  # noqa: BLE001 (this process must end here, and not continue as a server)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _become_rank(request: dict[str, Any], rank: int) -> None:
    log = os.open(request["logs"][rank], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    for stream in (1, 2):
        os.dup2(log, stream)
    world_size = len(request["logs"])
    os.environ.update(request["env"])
    if world_size > 1 or request["env"].get("LAUNCHED"):
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(request["port"]),
        )


if __name__ == "__main__":
    serve()
