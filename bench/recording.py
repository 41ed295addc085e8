"""Results on disk: the latest figures in bench/results/<device>/<suite>.json, all earlier ones in history.jsonl.

    python bench/report.py --record out.json      # out.json: written by pytest bench/... --benchmark-json out.json

The history only has results with a roof: a share of the roof, and a ratio to a peer of the same run, can be compared
between days; a time cannot.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
HISTORY = "history.jsonl"
_PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "deepspeed",
    "trl",
    "liger-kernel",
    "cut-cross-entropy",
    "quack-kernels",
    "flash-attn",
)


def device_name() -> str:
    """The class of machines whose shares of the roof are comparable, e.g. `cpu-avx512bf16-2-cores`; a folder name."""
    import torch  # takes seconds, and bench/report.py does not need it

    if torch.cuda.is_available():
        return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    if torch.cpu._is_amx_tile_supported():
        kind = "amx"
    elif torch.cpu._is_avx512_bf16_supported():
        kind = "avx512bf16"
    else:
        kind = torch.backends.cpu.get_cpu_capability().lower()
    return f"cpu-{kind}-{os.cpu_count()}-cores"


def processor() -> str:
    """Vendor, family and model of the processor, as Linux reports them: one class of device has several."""
    try:
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return platform.machine()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    keys = ("model name", "cpu family", "model")
    return " ".join(fields[key] for key in keys if key in fields) or platform.machine()


def machine() -> dict[str, Any]:
    """Device, processor, threads, commit and package versions: stored with every result."""
    import torch

    root = Path(__file__).parent
    commit = ""
    if shutil.which("git"):
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False, cwd=root
        ).stdout.strip()
    return {
        "device": device_name(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "commit": commit,
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def append_case(name: str, median_s: float, info: dict[str, Any]) -> None:
    """Append a measured case to the file $DELIB_FAST_CASES, if it is set, and flush it: nothing later can lose it."""
    if path := os.environ.get("DELIB_FAST_CASES"):
        with open(path, "a") as file:
            file.write(json.dumps({"name": name, "median_ms": median_s * 1e3, **info}) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_results(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Read JSON files of pytest-benchmark and return their benchmarks, reduced to the fields that are stored."""
    found = []
    for path in paths:
        if not path.stat().st_size:  # the run was killed before it wrote its results
            continue
        for entry in json.loads(path.read_text())["benchmarks"]:
            suite = entry["fullname"].partition("::")[0].rpartition("bench_")[2].removesuffix(".py")
            found.append(
                {
                    "suite": suite,
                    "name": entry["name"],
                    "median_ms": entry["stats"]["median"] * 1e3,
                    "extra_info": entry["extra_info"],
                }
            )
    return found


def stored(device: str, suite: str) -> list[dict[str, Any]]:
    """The stored benchmarks of a suite on a device; empty if there are none."""
    path = RESULTS / device / f"{suite}.json"
    if not path.exists():
        return []
    benchmarks: list[dict[str, Any]] = json.loads(path.read_text())["benchmarks"]
    return benchmarks


def record(entries: list[dict[str, Any]]) -> list[Path]:
    """Store benchmarks and append to the history; return the files written.

    A benchmark replaces the stored one of the same suite and name. The figures of `--quick` go to quick.json.
    """
    written = []
    by_file: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in entries:
        info = entry["extra_info"]
        by_file.setdefault((info["device"], "quick" if info.get("quick") else entry["suite"]), []).append(entry)
    for (device, suite), new in by_file.items():
        names = {(e["suite"], e["name"]) for e in new}
        kept = [e for e in stored(device, suite) if (e.get("suite", suite), e["name"]) not in names]
        path = RESULTS / device / f"{suite}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"benchmarks": kept + new}, indent=1) + "\n")
        with (path.parent / HISTORY).open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in history_lines(new))
        written += [path, path.parent / HISTORY]
    return written


def history_lines(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One history record for each case and backend of ours.

    A record has the backend's share of the roof, and for each peer of the same run the ratio of the peer's time to
    ours. Each time counts in units of the roof that was measured next to it.
    """
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    cases: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in entries:
        if "share_of_roof" in (info := entry["extra_info"]) and "case" in info:
            cases.setdefault((entry["suite"], info["case"]), []).append(info)
    lines = []
    for (suite, case), infos in cases.items():
        for ours in (info for info in infos if info["contender"].startswith("ours")):
            peers = {
                i["contender"]: round(ours["share_of_roof"] / i["share_of_roof"], 3)
                for i in infos
                if not i["contender"].startswith("ours")
            }
            lines.append(
                {
                    "time": now,
                    "commit": ours["commit"],
                    "suite": suite,
                    "case": case,
                    "quick": bool(ours.get("quick")),
                    "contender": ours["contender"],
                    "share_of_roof": round(ours["share_of_roof"], 4),
                    "peers": peers,
                    "versions": ours["versions"],
                }
            )
    return lines
