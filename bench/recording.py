"""Results on disk: bench/results/<device>/<suite>.json, what was last measured, and history.jsonl, what ever was.

    python bench/report.py --record out.json      # of pytest … --benchmark-json out.json

Only results with a roof are recorded in the history: a share of the roof and a ratio to a peer of the same run can be
compared with those of another day, a time can't.
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
    """The folder of a class of machines whose shares of the roof are comparable, e.g. cpu-avx512bf16-2-cores."""
    import torch

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
    """Vendor, family and model, as Linux tells them: one class of device has several."""
    try:
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return platform.machine()
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return " ".join(told[key] for key in ("model name", "cpu family", "model") if key in told) or platform.machine()


def machine() -> dict[str, Any]:
    """What every result says of where it comes from."""
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


def read_results(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """The benchmarks of some JSON files of pytest-benchmark, cut to what is kept of them."""
    found = []
    for path in paths:
        if not path.stat().st_size:  # a run that was ended before it wrote
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
    path = RESULTS / device / f"{suite}.json"
    return json.loads(path.read_text())["benchmarks"] if path.exists() else []


def record(entries: list[dict[str, Any]]) -> list[Path]:
    """Store them: each replaces the one of its name; a line of history for every case of ours. Returns the files."""
    written = []
    locations: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in entries:
        info = entry["extra_info"]
        locations.setdefault((info["device"], "quick" if info.get("quick") else entry["suite"]), []).append(entry)
    for (device, suite), new in locations.items():
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
    """One a case of ours: its share of the roof, and how many times as long each peer of the same run took, each
    measured against its own roof."""
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
