"""Results of suites: tables and curves of estimates, kept by content so that an evaluation goes on where it stopped."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from delib_fast.evals.intervals import Estimate
from delib_fast.files import write_atomic

FORMAT = 1
"""Counts up when a suite's figures change meaning: older results are then made again."""
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
    """what the figures mean, in a sentence or two"""
    tables: tuple[Table, ...]
    curves: tuple[Curve, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    """the suite's own figures as plain JSON"""


def plain(value: Any) -> Any:
    """Dataclasses, tuples and numbers as JSON; NaN and infinities as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def result_from_json(tree: Mapping[str, Any]) -> SuiteResult:
    """What `plain` wrote, back."""
    tables = tuple(
        Table(t["title"], tuple(t["columns"]), tuple(tuple(map(_cell, row)) for row in t["rows"]), t["note"])
        for t in tree["tables"]
    )
    curves = tuple(
        Curve(c["title"], c["x"], c["y"], tuple((x, _estimate(e)) for x, e in c["points"])) for c in tree["curves"]
    )
    return SuiteResult(tree["suite"], tree["title"], tree["note"], tables, curves, tree["details"])


def _cell(value: Any) -> Cell:
    return _estimate(value) if isinstance(value, dict) else value


def _estimate(tree: Mapping[str, Any]) -> Estimate:
    numbers = [math.nan if tree[key] is None else float(tree[key]) for key in ("value", "low", "high")]
    return Estimate(numbers[0], numbers[1], numbers[2], tree["n"], tree["method"])


class ResultStore:
    """A folder of results, each under a hash of all that it depends on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def key(self, suite: str, depends_on: Mapping[str, Any]) -> str:
        text = json.dumps({"format": FORMAT, "suite": suite, **depends_on}, sort_keys=True, default=str)
        return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()

    def load(self, suite: str, key: str) -> SuiteResult | None:
        """The result of this very evaluation, if it is there and whole."""
        try:
            tree = json.loads(self._path(suite, key).read_text(encoding="utf-8"))
            return result_from_json(tree["result"]) if tree["key"] == key else None
        except (FileNotFoundError, json.JSONDecodeError, KeyError, TypeError):
            return None

    def save(self, result: SuiteResult, key: str, depends_on: Mapping[str, Any], seconds: float) -> None:
        write_atomic(
            self._path(result.suite, key),
            json.dumps(
                {
                    "key": key,
                    "depends_on": plain(dict(depends_on)),
                    "seconds": round(seconds, 3),
                    "result": plain(result),
                },
                indent=1,
                ensure_ascii=False,
                default=str,
            ),
        )

    def replies(self, sha256: str) -> Path:
        """Where sampled replies of these weights are kept."""
        return self.folder / f"replies-{sha256[:12]}.jsonl"

    def _path(self, suite: str, key: str) -> Path:
        return self.folder / f"{suite}-{key}.json"


def report_json(subject: Mapping[str, Any], results: Sequence[SuiteResult]) -> str:
    return json.dumps(
        {"format": FORMAT, "subject": plain(dict(subject)), "suites": [plain(r) for r in results]},
        indent=1,
        ensure_ascii=False,
    )
