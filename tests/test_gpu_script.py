"""bench/gpu.sh without a GPU: the order of its parts, and what it says before it measures."""

from __future__ import annotations

import os
import subprocess
import sys
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is available")
def test_the_parts_run_in_their_order_within_the_budget(tmp_path) -> None:
    """With a budget of 0 s each part is skipped, and no part is counted as failed."""
    status, lines = run(tmp_path, "--dry-run", BUDGET="0", DELIB_FAST_CUDA="0")
    skipped = [line.split()[1] for line in lines if line.startswith("skipped")]
    assert [name for name in skipped if name != "build"] == ["ceilings", "smoke", "loss", "attention", "step", "tests"]
    assert "NO GPU: these are small cases on the CPU; they say nothing about GPUs" in lines
    assert lines[-1].startswith(f"{status} parts did not pass")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is available")
def test_missing_packages_are_reported_first(tmp_path) -> None:
    """A package that no folder of wheels has; the script says so before anything else, and counts it."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util\nfound = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'hjson' else found(name, *a)\n"
    )
    status, lines = run(tmp_path, "--dry-run", BUDGET="0", PYTHONPATH=str(tmp_path))
    assert lines[0].startswith("missing ")
    assert "hjson" in lines[0].split()
    assert "make them with tools/gpu_wheels.sh, and set WHEELS" in lines[1]
    assert lines[2].startswith("installed; still missing: hjson (")
    assert status == 1
