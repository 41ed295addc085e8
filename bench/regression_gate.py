"""Run the quick benches as CI does, and fail if a share of the roof has dropped.

    python bench/regression_gate.py             # exit code 1 if one of our backends lost over a fifth of its share
    python bench/regression_gate.py --record    # store the new figures as the ones to compare with

A share of the roof is the ratio of two times of one round, so a slow or busy machine slows both. Shares are only
compared on the class of device and the processor that the stored figures (bench/results/<device>/quick.json) come from;
on any other machine the gate prints that nothing was compared, and passes. A share that dropped is measured again after
a pause, at most twice, and the best measurement counts: another process on one of two cores halves the share of an
operation that uses both.
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
MIN_RELATIVE_SHARE = 0.8  # of the stored share
RETRY_PAUSES_S = (10, 40)  # before each further measurement of a share that dropped


def run(tests: list[str]) -> list[dict[str, Any]]:
    """Run bench files, or single tests of them (file::name), and return their results."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "out.json"
        options = ["--quick", "-q", "-p", "no:cacheprovider", "--benchmark-json", str(path)]
        if code := subprocess.run([sys.executable, "-m", "pytest", *tests, *options], check=False).returncode:
            sys.exit(code)
        return read_results([path])


def shares(entries: list[dict[str, Any]]) -> dict[str, float]:
    """Return {test name: share of the roof} of our backends, except the reference, which is not optimized."""
    return {
        entry["name"]: entry["extra_info"]["share_of_roof"]
        for entry in entries
        if entry["extra_info"].get("contender", "").startswith("ours-")
        and entry["extra_info"]["contender"] != "ours-reference"
        and "share_of_roof" in entry["extra_info"]
    }


def dropped(now: dict[str, float], stored_shares: dict[str, float]) -> dict[str, str]:
    """Return {test name: message} for each share that is below MIN_RELATIVE_SHARE of the stored one."""
    return {
        name: f"{name}: {now[name]:.3f} of its roof, {before:.3f} stored (at least {MIN_RELATIVE_SHARE * before:.3f} "
        "required)"
        for name, before in stored_shares.items()
        if name in now and now[name] < MIN_RELATIVE_SHARE * before
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench/regression_gate.py")
    parser.add_argument("--record", action="store_true", help="store the figures instead of comparing them")
    options = parser.parse_args()
    files = {suite: str(HERE / f"bench_{suite}.py") for suite in SUITES}
    entries = run(list(files.values()))
    if options.record:
        for path in record(entries):
            print(path)
        return 0
    stored_shares = shares(
        [entry for entry in stored(device_name(), "quick") if entry["extra_info"].get("processor") == processor()]
    )
    if not stored_shares:
        print(f"regression gate: no figures are stored for {device_name()}, {processor()}, so nothing was compared")
        return 0
    best = shares(entries)
    for pause in RETRY_PAUSES_S:
        if not (low := dropped(best, stored_shares)):
            break
        print(
            f"regression gate: these shares dropped; measuring again in {pause} s:",
            *low.values(),
            sep="\n  ",
            flush=True,
        )
        time.sleep(pause)
        again = shares(run([f"{files[entry['suite']]}::{entry['name']}" for entry in entries if entry["name"] in low]))
        best |= {name: max(share, best[name]) for name, share in again.items()}
    low = dropped(best, stored_shares)
    for message in low.values():
        print(f"regression gate: {message}", file=sys.stderr)
    if not low:
        print(f"regression gate: {len(stored_shares)} shares of the roof hold on {device_name()}")
    return int(bool(low))


if __name__ == "__main__":
    sys.exit(main())
