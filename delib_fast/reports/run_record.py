"""Read run directories for `delib-fast report`: the ledger, the metrics, and series over a whole run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from delib_fast.config import ConfigError
from delib_fast.config.load import flatten, named_key
from delib_fast.digests import read_json_lines
from delib_fast.training.held_out import read_rows
from delib_fast.training.run_directory import read_ledger, read_run_config

MetricsRecord = Mapping[str, Any]


@dataclass(frozen=True)
class Series:
    """One metric over a run. Steps and tokens are counted over all stages."""

    steps: list[int]
    tokens: list[int]
    values: list[float]


@dataclass(frozen=True)
class RunRecord:
    """The contents of a run directory. Its run may still be training."""

    path: Path
    name: str
    ledger: dict[str, Any]
    records: list[dict[str, Any]]
    """The records of metrics.jsonl in the order of the stages, each with `run_step` and `run_tokens`, which are counted
    over all stages."""
    config: dict[str, Any]
    damaged_lines: tuple[int, ...] = ()
    """The numbers of the lines of metrics.jsonl that do not match their digest, and are left out. A running run may be
    writing its last line."""
    held_out_rows: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By moment, what held_out.jsonl has for each row; empty for a run of an earlier version."""
    damaged_rows: tuple[int, ...] = ()
    """The numbers of the damaged lines of held_out.jsonl."""

    @property
    def stages(self) -> list[dict[str, Any]]:
        stages: list[dict[str, Any]] = self.ledger["stages"]
        return stages

    @property
    def segments(self) -> list[str]:
        return list(dict.fromkeys(name for record in self.records for name in record["segments"]))

    def series(self, value: Callable[[MetricsRecord], float | None]) -> Series:
        """One metric, over the records that have it."""
        points = [(r["run_step"], r["run_tokens"], found) for r in self.records if (found := value(r)) is not None]
        return Series([p[0] for p in points], [p[1] for p in points], [float(p[2]) for p in points])

    def held_out(self, segment: str) -> Series:
        """The held-out nll of a segment at every evaluation before, between and after the stages."""
        at = {"start": (0, 0)} | {f"after {name}": end for name, end in self.ends.items()}
        points = [
            (*at[e["moment"]], e["segments"][segment]["nll"])
            for e in self.ledger["evaluations"]
            if e["moment"] in at and segment in e["segments"]
        ]
        return Series([p[0] for p in points], [p[1] for p in points], [p[2] for p in points])

    @property
    def ends(self) -> dict[str, tuple[int, int]]:
        """The steps and tokens of the run at the last record of each stage."""
        return {record["stage"]: (record["run_step"], record["run_tokens"]) for record in self.records}


def read_run(path: Path) -> RunRecord:
    """Read a run directory. Raises ConfigError if it is not one, or if a file in it cannot be read."""
    ledger = read_ledger(path)
    config = read_run_config(path, ledger)
    try:
        records, damaged = read_json_lines(path / "metrics.jsonl")
    except FileNotFoundError:
        records, damaged = [], []
    except OSError as error:
        raise ConfigError(f"{path / 'metrics.jsonl'} cannot be read: {error.strerror}") from None
    name, stages = path.resolve().name, [stage["name"] for stage in ledger["stages"]]
    rows, damaged_rows = read_rows(path)
    return RunRecord(
        path, name, ledger, _count_over_run(records, stages), config, tuple(damaged), rows, tuple(damaged_rows)
    )


def read_runs(paths: Sequence[Path]) -> list[RunRecord]:
    """Read several run directories. Runs with the same name are prefixed with the name of their parent folder."""
    runs = [read_run(path) for path in paths]
    names = [run.name for run in runs]
    return [
        run if names.count(run.name) == 1 else replace(run, name=f"{run.path.resolve().parent.name}/{run.name}")
        for run in runs
    ]


def differences(runs: Sequence[RunRecord]) -> list[tuple[str, list[Any]]]:
    """The settings that differ between runs, each with its value in every run."""
    flat = [flatten(run.config) for run in runs]
    keys = list(dict.fromkeys(key for tree in flat for key in tree))
    return [
        (named_key(key.split("."), runs[0].config), [tree.get(key) for tree in flat])
        for key in keys
        if key != "run_dir" and any(tree.get(key) != flat[0].get(key) for tree in flat)
    ]


def _count_over_run(records: list[dict[str, Any]], stages: Sequence[str]) -> list[dict[str, Any]]:
    counted: list[dict[str, Any]] = []
    steps = tokens = 0
    for stage in stages:
        of_stage = [record for record in records if record["stage"] == stage]
        for record in of_stage:
            tokens += record["tokens"]
            counted.append({**record, "run_step": steps + record["step"], "run_tokens": tokens})
        steps += of_stage[-1]["step"] if of_stage else 0
    return counted
