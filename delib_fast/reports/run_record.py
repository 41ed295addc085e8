"""Run directories as `delib-fast report` reads them: the ledger, the lines of metrics, and series over a run's life."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from delib_fast.config import ConfigError
from delib_fast.config.load import flatten

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Series:
    """Points of one figure over a run: updates counted over all stages, tokens likewise."""

    updates: list[int]
    tokens: list[int]
    values: list[float]


@dataclass(frozen=True)
class RunRecord:
    """What one run directory holds. It may belong to a run that is still going on."""

    path: Path
    name: str
    ledger: dict[str, Any]
    lines: list[dict[str, Any]]
    """of metrics.jsonl, in the order of the stages, each with `update` and `all_tokens` counted over all of them"""
    config: dict[str, Any]

    @property
    def stages(self) -> list[dict[str, Any]]:
        return self.ledger["stages"]

    @property
    def segments(self) -> list[str]:
        return list(dict.fromkeys(name for line in self.lines for name in line["segments"]))

    def series(self, value: Callable[[Line], float | None]) -> Series:
        """A figure of each line that has it."""
        points = [
            (line["update"], line["all_tokens"], found) for line in self.lines if (found := value(line)) is not None
        ]
        return Series([p[0] for p in points], [p[1] for p in points], [float(p[2]) for p in points])

    def held_out(self, segment: str) -> Series:
        """Held-out nll of a segment at each moment that was evaluated."""
        at = {"start": (0, 0)} | {f"after {name}": end for name, end in self.ends.items()}
        points = [
            (*at[e["moment"]], e["segments"][segment]["nll"])
            for e in self.ledger["evaluations"]
            if e["moment"] in at and segment in e["segments"]
        ]
        return Series([p[0] for p in points], [p[1] for p in points], [p[2] for p in points])

    @property
    def ends(self) -> dict[str, tuple[int, int]]:
        """Of each stage that has lines: updates and tokens at its last one."""
        return {line["stage"]: (line["update"], line["all_tokens"]) for line in self.lines}


def read_run(path: Path) -> RunRecord:
    """Raises ConfigError where the folder holds no run, or files that can't be read."""
    try:
        ledger = json.loads((path / "ledger.json").read_text(encoding="utf-8"))
        config = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{error.filename}: no such file; is {path} the run_dir of a run that has begun?") from None
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: a file of the run can't be read: {error}") from None
    metrics = path / "metrics.jsonl"
    lines = _lines(metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else [])
    name = path.resolve().name
    return RunRecord(path, name, ledger, _counted(lines, [s["name"] for s in ledger["stages"]]), config)


def read_runs(paths: Sequence[Path]) -> list[RunRecord]:
    """Several, with names that differ."""
    runs = [read_run(path) for path in paths]
    names = [run.name for run in runs]
    return [
        run
        if names.count(run.name) == 1
        else RunRecord(run.path, f"{run.path.resolve().parent.name}/{run.name}", run.ledger, run.lines, run.config)
        for run in runs
    ]


def differences(runs: Sequence[RunRecord]) -> list[tuple[str, list[Any]]]:
    """The settings in which runs differ, each with its value in every run."""
    flat = [flatten(run.config) for run in runs]
    keys = list(dict.fromkeys(key for tree in flat for key in tree))
    return [
        (key, [tree.get(key) for tree in flat])
        for key in keys
        if key != "run_dir" and any(tree.get(key) != flat[0].get(key) for tree in flat)
    ]


def _lines(texts: Sequence[str]) -> list[dict[str, Any]]:
    lines = []
    for text in texts:
        with contextlib.suppress(json.JSONDecodeError):  # the last line of a run that is writing it
            lines.append(json.loads(text))
    return lines


def _counted(lines: list[dict[str, Any]], stages: Sequence[str]) -> list[dict[str, Any]]:
    counted: list[dict[str, Any]] = []
    updates = tokens = 0
    for stage in stages:
        mine = [line for line in lines if line["stage"] == stage]
        for line in mine:
            tokens += line["tokens"]
            counted.append({**line, "update": updates + line["step"], "all_tokens": tokens})
        updates += mine[-1]["step"] if mine else 0
    return counted
