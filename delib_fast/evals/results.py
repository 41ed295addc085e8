"""Results of suites: tables and curves of estimates, stored by a hash of their inputs so that an evaluation resumes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from delib_fast.digests import DamagedError, read_json, write_json
from delib_fast.evals.intervals import Estimate, RowEstimate
from delib_fast.evals.replies import Sample, sample_from_json

FORMAT = 3
"""Increased when the meaning of a suite's figures changes: older results are then recomputed."""
Cell = Estimate | str | int | float | None


@dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Curve:
    title: str
    x: str
    y: str
    points: tuple[tuple[float, Estimate], ...]


@dataclass(frozen=True)
class SuiteResult:
    suite: str
    title: str
    note: str
    """What the figures mean, in a sentence or two."""
    tables: tuple[Table, ...]
    curves: tuple[Curve, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    """The suite's own figures as plain JSON."""
    rows_key: str = ""
    """Identifies the rows that the suite read, and their order; the same for every model."""
    samples: tuple[Sample, ...] = ()
    """The sampled replies with their prompts, and with what the classifier or the judge said about them."""


def to_json_data(value: Any, *, rows: bool = False) -> Any:
    """Convert dataclasses, mappings and sequences to plain JSON data. NaN and infinities become null.

    Args:
        rows: keep the numbers of each row of a `RowEstimate`.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value) if rows or f.name != "by_row"]
        return {name: to_json_data(getattr(value, name), rows=rows) for name in names}
    if isinstance(value, Mapping):
        return {str(key): to_json_data(item, rows=rows) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json_data(item, rows=rows) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def result_from_json(tree: Mapping[str, Any]) -> SuiteResult:
    """The inverse of `to_json_data` for a SuiteResult."""
    tables = tuple(
        Table(t["title"], tuple(t["columns"]), tuple(tuple(map(_cell, row)) for row in t["rows"]), t["note"])
        for t in tree["tables"]
    )
    curves = tuple(
        Curve(c["title"], c["x"], c["y"], tuple((x, _estimate(e)) for x, e in c["points"])) for c in tree["curves"]
    )
    return SuiteResult(
        tree["suite"],
        tree["title"],
        tree["note"],
        tables,
        curves,
        tree["details"],
        tree.get("rows_key", ""),  # results of earlier versions have neither this key
        tuple(map(sample_from_json, tree.get("samples", ()))),  # nor samples
    )


def _cell(value: Any) -> Cell:
    cell: Cell = _estimate(value) if isinstance(value, dict) else value
    return cell


def _estimate(tree: Mapping[str, Any]) -> Estimate:
    value, low, high = (math.nan if tree[key] is None else float(tree[key]) for key in ("value", "low", "high"))
    if "by_row" in tree:
        by_row = tuple((float(top), float(bottom)) for top, bottom in tree["by_row"])
        return RowEstimate(value, low, high, tree["n"], tree["method"], by_row)
    return Estimate(value, low, high, tree["n"], tree["method"])


class ResultStore:
    """A folder of results. The name of each contains a hash of everything that it depends on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def key(self, suite: str, depends_on: Mapping[str, Any]) -> str:
        text = json.dumps({"format": FORMAT, "suite": suite, **depends_on}, sort_keys=True, default=str)
        return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()

    def load(self, suite: str, key: str, log: Callable[[str], None] = lambda _: None) -> SuiteResult | None:
        """The stored result of exactly these inputs; None if it is missing or damaged.

        Args:
            log: called with a message if the file is damaged.
        """
        path = self._path(suite, key)
        try:
            tree = read_json(path)
            return result_from_json(tree["result"]) if tree["key"] == key else None
        except FileNotFoundError:
            return None
        except (OSError, DamagedError, KeyError, TypeError, ValueError) as error:
            log(f"{path} is damaged ({error}); its suite runs again")
            return None

    def save(self, result: SuiteResult, key: str, depends_on: Mapping[str, Any], seconds: float) -> None:
        record = {
            "key": key,
            "depends_on": to_json_data(dict(depends_on)),
            "seconds": round(seconds, 3),
            "result": to_json_data(result, rows=True),
        }
        self._write(self._path(result.suite, key), record)

    def write_report(self, target: Mapping[str, Any], results: Sequence[SuiteResult]) -> None:
        """Write report.json, the results of one evaluation.

        Args:
            target: what was evaluated: model, sha256 of its weights, base, and the skipped suites.
        """
        record = {"format": FORMAT, "subject": to_json_data(dict(target)), "suites": [to_json_data(r) for r in results]}
        self._write(self.folder / "report.json", record)

    def replies(self, sha256: str) -> Path:
        """The file of the replies sampled from these weights."""
        return self.folder / f"replies-{sha256[:12]}.jsonl"

    def _path(self, suite: str, key: str) -> Path:
        return self.folder / f"{suite}-{key}.json"

    def _write(self, path: Path, record: Mapping[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(path, json.loads(json.dumps(record, default=str)))
