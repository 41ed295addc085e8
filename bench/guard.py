"""What CI runs of the benches: the short set, and whether its shares of the roof have fallen.

    python bench/guard.py             # exits 1 if one of ours has lost more than a fifth of the committed share
    python bench/guard.py --record    # commit these figures as the ones to hold

Shares of the roof are ratios of two times of the same round, so a slow machine or a busy one slows both. Only a machine
of the class and processor that the committed figures come from is compared (bench/results/<device>/quick.json); on
another this says so and keeps nothing. What fell is measured again, after a while and twice at most, and its best share
counts: something else on one of two cores halves the share of what uses both.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from recording import device_name, processor, read_results, record, stored

HERE = Path(__file__).parent
SUITES = ("linear_cross_entropy", "varlen_attention", "step")
LEAST = 0.8  # of the committed share
PAUSES_S = (10, 40)  # before what fell is measured again


def run(tests: list[str]) -> list[dict[str, Any]]:
    """The results of some bench files, or of some of their tests (file::name)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "out.json"
        command = [
            sys.executable,
            "-m",
            "pytest",
            *tests,
            "--quick",
            "-q",
            "-p",
            "no:cacheprovider",
            "--benchmark-json",
            str(path),
        ]
        if code := subprocess.run(command, check=False).returncode:
            sys.exit(code)
        return read_results([path])


def shares(entries: list[dict[str, Any]]) -> dict[str, float]:
    """Of our backends; the reference is there to be read, not to be fast."""
    return {
        entry["name"]: entry["extra_info"]["share_of_roof"]
        for entry in entries
        if entry["extra_info"].get("contender", "").startswith("ours-")
        and entry["extra_info"]["contender"] != "ours-reference"
        and "share_of_roof" in entry["extra_info"]
    }


def fallen(now: dict[str, float], committed: dict[str, float]) -> dict[str, str]:
    """{name: what is to be said of it} of the shares that have lost more than is allowed."""
    return {
        name: f"{name}: {now[name]:.3f} of its roof, {was:.3f} committed (least allowed {LEAST * was:.3f})"
        for name, was in committed.items()
        if name in now and now[name] < LEAST * was
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench/guard.py")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    files = {suite: str(HERE / f"bench_{suite}.py") for suite in SUITES}
    entries = run(list(files.values()))
    if options.record:
        for path in record(entries):
            print(path)
        return 0
    committed = shares(
        [entry for entry in stored(device_name(), "quick") if entry["extra_info"].get("processor") == processor()]
    )
    if not committed:
        print(f"guard: no figures are committed for {device_name()}, {processor()}, so nothing was compared")
        return 0
    best = shares(entries)
    for pause in PAUSES_S:
        if not (lost := fallen(best, committed)):
            break
        print(f"guard: measuring again in {pause} s, since these fell:", *lost.values(), sep="\n  ", flush=True)
        time.sleep(pause)
        again = shares(run([f"{files[entry['suite']]}::{entry['name']}" for entry in entries if entry["name"] in lost]))
        best |= {name: max(share, best[name]) for name, share in again.items()}
    lost = fallen(best, committed)
    for line in lost.values():
        print(f"guard: {line}", file=sys.stderr)
    if not lost:
        print(f"guard: {len(committed)} shares of the roof hold on {device_name()}")
    return int(bool(lost))


if __name__ == "__main__":
    sys.exit(main())
