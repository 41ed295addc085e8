"""Start real ranks on the CPU, as a launcher would: one process each, gloo between them; and a server of a model."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    """Below the ports that the system hands to outgoing connections: one of those may be gone before it is used."""
    while True:
        port = random.SystemRandom().randrange(15000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def rank_environment(rank: int, world_size: int, port: int, **extra: str) -> dict[str, str]:
    threads = str(max(1, (os.cpu_count() or 1) // world_size))
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    return os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": threads,
        "PYTHONPATH": path,
        **extra,
    }


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The base URL of `transformers serve` with the model in the folder. Skips without what it needs."""
    pytest.importorskip("uvicorn", reason="transformers serve needs fastapi and uvicorn (extra `test`)")
    port, log = free_port(), folder.parent / "serve.log"
    with log.open("w") as file:
        server = subprocess.Popen(
            [
                str(Path(sys.executable).with_name("transformers")),
                "serve",
                str(folder),
                "--host",
                "127.0.0.1",
                "--port",
                str(port),
                "--device",
                "cpu",
            ],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )
    try:
        end = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).read()
                break
            assert server.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < end, f"transformers serve never came up: {log.read_text()[-2000:]}"
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(20)


class Rank:
    """One started rank; its output goes to a file, so that no pipe can fill up and hold it."""

    def __init__(self, command: Sequence[str], env: dict[str, str]) -> None:
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115 (open as long as the rank is)
        self.process = subprocess.Popen(
            [sys.executable, *command], env=env, stdout=self._output, stderr=subprocess.STDOUT, text=True, cwd=ROOT
        )

    def output(self) -> str:
        self._output.seek(0)
        return self._output.read()


def start_ranks(command: Sequence[str], world_size: int, **extra: str) -> list[Rank]:
    """Start `python command...` once for each rank."""
    port = free_port()
    return [Rank(command, rank_environment(rank, world_size, port, **extra)) for rank in range(world_size)]


def run_ranks(
    command: Sequence[str], world_size: int, *, timeout: float = 300, exit_code: int = 0, **extra: str
) -> list[str]:
    """Run to the end and return each rank's output. Fails the test, with the output, if a rank ends otherwise."""
    ranks = start_ranks(command, world_size, **extra)
    try:
        for rank in ranks:
            rank.process.wait(timeout)
    finally:
        for rank in ranks:
            rank.process.kill()
    for number, rank in enumerate(ranks):
        code = rank.process.returncode
        assert code == exit_code, f"rank {number} of {world_size} exited with {code}:\n{rank.output()}"
    return [rank.output() for rank in ranks]


def result_of(output: str) -> Any:
    """What a worker printed for its test: JSON behind RESULT."""
    line = next(line for line in output.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))
