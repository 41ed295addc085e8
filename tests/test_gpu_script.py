"""bench/gpu.sh without a GPU: the order of its parts, and what it says before it measures."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def run(out: Path, *arguments: str, **environment: str) -> tuple[int, list[str]]:
    done = subprocess.run(
        ["bash", "bench/gpu.sh", *arguments, out],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, "WHEELS": str(out / "none"), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, (out / "summary.txt").read_text().splitlines()


def without(folder: Path, name: str) -> dict[str, str]:
    """An environment in which Python does not find a module."""
    (folder / "sitecustomize.py").write_text(
        "import importlib.machinery\nfinder = importlib.machinery.PathFinder\nfind = finder.find_spec\n"
        f"finder.find_spec = lambda name, *a, **k: None if name == {name!r} else find(name, *a, **k)\n"
    )
    return {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is available")
def test_missing_packages_are_reported_first(tmp_path) -> None:
    """The script names a package that no folder of wheels has, and skips the parts that cannot run without it.

    With a budget of 0 s each other part is skipped too, in the order of the parts, and is not counted as failed.
    """
    status, lines = run(tmp_path, "--dry-run", BUDGET="0", DELIB_FAST_CUDA="0", **without(tmp_path, "execnet"))
    assert lines[0].startswith("missing ")
    assert "execnet" in lines[0].split()
    assert "make them with tools/gpu_wheels.sh, and set WHEELS" in lines[1]
    assert lines[2].startswith("installed; still missing: execnet (")
    assert lines[3] == "          tests will be skipped: it cannot import execnet"
    assert "skipped   tests (cannot import execnet)" in lines
    assert "skipped   smoke (the budget of 0 s is used up)" in lines
    assert "NO GPU: these are small cases on the CPU; they say nothing about GPUs" in lines
    skipped = [line.split()[1] for line in lines if line.startswith("skipped")]
    assert [name for name in skipped if name != "build"] == [
        "ceilings",
        "smoke",
        "loss",
        "attention",
        "step",
        "roofline",
        "tests",
    ]
    assert lines[-1].startswith("1 parts did not pass")
    assert status == 1


# In place of Python: it imports nothing of this project, and each part behaves as a test says.
FAKE = """#!/bin/sh
case "$*" in
  -) code=$(cat); case "$code" in *delib_fast.engine*) ;; *) echo "$code" | {python} - ;; esac ;;
  *gpu_smoke*) echo "passed  the first check"; {smoke} ;;
  *"-m pytest"*) exit 3 ;;
  *) exec {python} "$@" ;;
esac
"""
SLOW = """
trap 'echo "passed  what was measured until then"; exit 130' INT
touch "{out}/started"
while :; do sleep 0.2; done
"""


def fake_python(folder: Path, smoke: str) -> str:
    path = folder / "python"
    path.write_text(FAKE.format(python=sys.executable, smoke=smoke))
    path.chmod(0o755)
    return str(path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is available")
def test_later_parts_run_after_a_failure(tmp_path) -> None:
    python = fake_python(tmp_path, "exit 2")
    status, lines = run(tmp_path, "--dry-run", PYTHON=python, DELIB_FAST_CUDA="0")
    outcomes = [line.split()[:2] for line in lines if line.startswith(("passed", "FAILED"))]
    failed = [["FAILED", name] for name in ("smoke", "loss", "attention", "step", "roofline", "tests")]
    assert [found for found in outcomes if found[1] != "build"] == [["passed", "ceilings"], *failed]
    assert "          passed  the first check" in lines
    assert status == 6


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is available")
@pytest.mark.parametrize("by", ["its limit", "a signal"])
def test_an_interrupted_part_keeps_what_it_measured(tmp_path, by) -> None:
    """A part gets SIGINT at its limit, and when the script is interrupted, and can write its results.

    The script starts with SIGINT ignored, as a program in the background of another script does.
    """
    python = fake_python(tmp_path, SLOW.format(out=tmp_path))
    script = subprocess.Popen(
        ["bash", "bench/gpu.sh", "--dry-run", tmp_path],
        cwd=ROOT,
        env=os.environ
        | {"PYTHON": python, "WHEELS": "none", "DELIB_FAST_CUDA": "0"}
        | ({"SMOKE_SECONDS": "5"} if by == "its limit" else {}),
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    if by == "a signal":
        deadline = time.monotonic() + 300
        while not (tmp_path / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        script.send_signal(signal.SIGINT)
    status = script.wait(300)
    lines = (tmp_path / "summary.txt").read_text().splitlines()
    assert "          passed  what was measured until then" in lines
    if by == "its limit":
        assert "timed out smoke (limit 5 s)" in lines
        assert status == 6
    else:
        assert "skipped   loss (interrupted)" in lines
        assert "interrupted; what was measured is kept" in lines
        assert status == 130
    assert len(list(tmp_path.glob("*.json*"))) + 2 <= 8
