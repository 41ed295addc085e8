"""Start ranks on the CPU as a launcher does (one process each, connected by gloo), and serve a model over HTTP."""

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
HANG_S = 900.0
"""Seconds after which a test calls a process hanging. Only a hang may take that long, on however busy a machine."""


def free_port() -> int:
    """A free port, below those that the system assigns to outgoing connections and might take before it is used."""
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
    """The base URL of `transformers serve` for the model in a folder. Skips the test if packages are missing."""
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
        end = time.monotonic() + HANG_S
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=30).read()
                break
            assert server.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < end, f"transformers serve did not start: {log.read_text()[-2000:]}"
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(HANG_S)


class Rank:
    """One running rank. Its output goes to a file, because a full pipe would block it."""

    def __init__(self, command: Sequence[str], env: dict[str, str]) -> None:
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115 (open as long as the rank runs)
        self.process = subprocess.Popen(
            [sys.executable, *command], env=env, stdout=self._output, stderr=subprocess.STDOUT, text=True, cwd=ROOT
        )

    def output(self) -> str:
        self._output.seek(0)
        return self._output.read()


def start_ranks(command: Sequence[str], world_size: int, **extra: str) -> list[Rank]:
    """Start `python command…` once for each rank."""
    port = free_port()
    return [Rank(command, rank_environment(rank, world_size, port, **extra)) for rank in range(world_size)]


def run_ranks(
    command: Sequence[str], world_size: int, *, timeout: float = HANG_S, exit_code: int = 0, **extra: str
) -> list[str]:
    """Run all ranks to the end and return their outputs. Fails, with the output, if a rank has another exit code."""
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
    """What a worker printed for its test: the JSON after RESULT."""
    line = next(line for line in output.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))
