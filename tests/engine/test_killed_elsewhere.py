"""A run or a test run that is killed at any moment leaves nothing outside its own folders that blocks the next one.

Both get a HOME of their own, without the variables that move caches. They are killed (SIGKILL to the whole process
tree) at random moments, and started again. At the end they must succeed, and no lock file of a dead process is left
that anything would wait for: the kernel releases `flock`, but a lock that exists as a file stays.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
from helpers.launch import HANG_S, ROOT, free_port
from helpers.tiny_run import metrics, tiny

# Variables that say where caches are kept.
MOVES_CACHES = ("DELIB_FAST_CACHE", "HF_HOME", "MPLCONFIGDIR", "TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR")
# What a process that is killed while it holds a lock leaves, and a later one waits for.
BLOCKING = ("lock", "*.matplotlib-lock", "*.softlock")
LAUNCHER = ["-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port"]
# Tests that compile, draw, load models, or start ranks.
TESTS = (
    "tests/models/test_zero.py",
    "tests/models/test_layers.py",
    "tests/engine/test_builds.py",
    "tests/engine/test_state.py",
    "tests/reports/test_run_page.py",
)


def home_of_its_own(folder: Path) -> dict[str, str]:
    (folder / "home").mkdir()
    kept = {name: value for name, value in os.environ.items() if name not in MOVES_CACHES and "XDG" not in name}
    return kept | {
        "HOME": str(folder / "home"),
        "TMPDIR": str(folder),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }


def start(command: Sequence[str], environment: dict[str, str], output: Path) -> subprocess.Popen[bytes]:
    with output.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
        )


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the process and all its descendants, first the parents, so that none starts another one."""
    tree = [psutil.Process(process.pid)]
    with contextlib.suppress(psutil.NoSuchProcess):
        tree += tree[0].children(recursive=True)
    for member in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait(HANG_S)
    psutil.wait_procs(tree, timeout=HANG_S)


def end_of(process: subprocess.Popen[bytes], output: Path) -> None:
    process.wait(2 * HANG_S)
    assert process.returncode == 0, output.read_text()[-4000:]


def blocking_files(home: Path) -> list[str]:
    return [str(path.relative_to(home)) for pattern in BLOCKING for path in home.rglob(pattern)]


def kill_and_restart(command, folder, kills, generator, longest_s):
    """Kill `command` at `kills` random moments, and then let it finish. Returns how many kills hit a living process."""
    environment, output = home_of_its_own(folder), folder / "output"
    hits = 0
    for _ in range(kills):
        process = start(command(), environment, output)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(generator.uniform(0.5, longest_s))
        hits += process.poll() is None
        kill_tree(process)
    end_of(start(command(), environment, output), output)
    assert blocking_files(folder / "home") == []
    return hits


@pytest.mark.full
@pytest.mark.parametrize("layers", ["eager", "compile"])
@pytest.mark.parametrize("seed", range(2))
def test_a_run_of_two_ranks(tmp_path, layers, seed):
    path = tiny(tmp_path / "run")
    settings = [f"model.layers={layers}", "checkpoint.every_steps=2", "log.tensorboard=false"]

    def command():
        overrides = [word for item in settings for word in ("--set", item)]
        return [*LAUNCHER, str(free_port()), "delib_fast/train.py", "--config", str(path), *overrides]

    hits = kill_and_restart(command, tmp_path, 5, random.Random(seed), 45.0 if layers == "eager" else 120.0)
    print(f"{layers}, seed {seed}: {hits} of 5 kills hit a run that had not ended")
    steps = [(record["stage"], record["step"]) for record in metrics(tmp_path / "run" / "run")]
    assert len(steps) == len(set(steps)), "each step is recorded once"
    assert steps[-1][0] == "aft"


@pytest.mark.full
@pytest.mark.parametrize("seed", range(2))
def test_the_tests_themselves(tmp_path, seed):
    """The tests that compile, draw, load models or start ranks run as under `make test`."""
    command = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--basetemp", str(tmp_path / "base"), *TESTS]
    hits = kill_and_restart(lambda: command, tmp_path, 5, random.Random(seed), 90.0)
    print(f"seed {seed}: {hits} of 5 kills hit tests that had not ended")


def test_a_file_that_blocks_is_found(tmp_path):
    """The harness itself: a lock as torch leaves it is not overlooked."""
    folder = tmp_path / ".cache" / "torch_extensions" / "py311_cpu" / "deepspeed_shm_comm"
    folder.mkdir(parents=True)
    (folder / "lock").touch()
    (folder / "build.ninja").touch()
    assert blocking_files(tmp_path) == [".cache/torch_extensions/py311_cpu/deepspeed_shm_comm/lock"]
    until = time.monotonic() + HANG_S
    process = subprocess.Popen([sys.executable, "-c", "import subprocess; subprocess.run(['sleep', '600'])"])
    while not (children := psutil.Process(process.pid).children()):
        assert time.monotonic() < until
        time.sleep(0.01)
    kill_tree(process)
    assert not children[0].is_running() or children[0].status() == psutil.STATUS_ZOMBIE
