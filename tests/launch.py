"""Start real ranks on the CPU, as a launcher would: one process each, gloo between them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_environment(rank: int, world_size: int, port: int, **extra: str) -> dict[str, str]:
    threads = str(max(1, (os.cpu_count() or 1) // world_size))
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    return os.environ | {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "OMP_NUM_THREADS": threads, "PYTHONPATH": path, **extra}


def start_ranks(command: Sequence[str], world_size: int, **extra: str) -> list[subprocess.Popen[str]]:
    """Start `python command...` once for each rank; output is captured, stderr with stdout."""
    port = free_port()
    return [subprocess.Popen([sys.executable, *command], env=rank_environment(rank, world_size, port, **extra),
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
            for rank in range(world_size)]


def run_ranks(command: Sequence[str], world_size: int, *, timeout: float = 240, **extra: str) -> list[str]:
    """Run to the end and return each rank's output. Fails the test, with the output, if a rank fails."""
    processes = start_ranks(command, world_size, **extra)
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, (process, output) in enumerate(zip(processes, outputs, strict=True)):
        assert process.returncode == 0, f"rank {rank} of {world_size} exited with {process.returncode}:\n{output}"
    return outputs
