"""Measuring one arm: its metrics, each kept under a hash of what it depends on."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delib_fast import __version__
from delib_fast.config import ConfigError
from delib_fast.evals.intervals import Estimate
from delib_fast.evals.results import plain
from delib_fast.files import write_atomic
from delib_fast.study.settings import ChoicesMetric, SuiteMetric

if TYPE_CHECKING:
    from delib_fast.evals.metrics.forced_choices import ChoiceFigures
    from delib_fast.evals.results import SuiteResult
    from delib_fast.evals.target import EvalTarget

FORMAT = 1
"""Counts up when a figure changes meaning."""


def metric_key(
    model_key: str, metric: Mapping[str, Any], files: Mapping[str, str], evaluation: Mapping[str, Any], thinks: bool
) -> str:
    """Changes when the figure might: the model, the metric, the bytes of its files, the evaluation's settings."""
    shown = ("title", "better", "chance")
    facts = {
        "format": FORMAT,
        "version": __version__,
        "model": model_key,
        "files": dict(files),
        "thinks": thinks,
        "metric": {key: value for key, value in metric.items() if key not in (*shown, "path")},
        "evaluation": dict(evaluation) if metric["kind"] == "suite" else {},
    }
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=8).hexdigest()


def measure(task: Mapping[str, Any]) -> dict[str, Any]:
    """What a worker does for one arm of one seed: every metric that is missing, each written as it is done.

    The task: `folder` (run directory or model), `device`, `base` (for drift), `evaluation`, `thinks` (whether replies
    stand behind a chain of thought), and `metrics`: for each name its settings and the file it goes to.
    """
    from delib_fast.evals.settings import load_eval_config
    from delib_fast.evals.target import EvalTarget

    suites = sorted({m["metric"]["suite"] for m in task["metrics"].values() if m["metric"]["kind"] == "suite"})
    given = {"device": task["device"], **task["evaluation"], "suites": suites or ("segments",)}
    if task["base"] is not None:
        given.setdefault("base", task["base"])
    given["out"] = task["out"]
    subject = EvalTarget(Path(task["folder"]), load_eval_config(None, **given))
    results = _suites(subject) if suites else {}
    found: dict[str, Any] = {}
    chosen: dict[tuple[str, bool], ChoiceFigures] = {}
    for name, item in task["metrics"].items():
        if item["metric"]["kind"] == "choices":
            figure = _choices(subject, ChoicesMetric.model_validate(item["metric"]), task["thinks"], chosen)
        else:
            figure = _of_suite(name, SuiteMetric.model_validate(item["metric"]), results)
        write_atomic(Path(item["file"]), json.dumps(figure))
        found[name] = figure
    return found


def _choices(
    subject: EvalTarget, metric: ChoicesMetric, thinks: bool, chosen: dict[tuple[str, bool], ChoiceFigures]
) -> dict[str, Any]:
    """Items of one file are scored once, however many metrics are made of them."""
    from delib_fast.evals.metrics.forced_choices import choose, read_choices

    think = {"as trained": thinks, "never": False, "always": True}[metric.cot]
    if (metric.path, think) not in chosen:
        chosen[metric.path, think] = choose(subject.scorer, read_choices(metric.path), think=think)
    figures = chosen[metric.path, think]
    if getattr(figures, metric.figure) is None:
        raise ConfigError(f"{metric.path}: {metric.figure} is about chains of thought; set cot: always")
    return {"estimate": plain(getattr(figures, metric.figure)), "margins": [round(m, 4) for m in figures.margins]}


def _suites(subject: EvalTarget) -> dict[str, SuiteResult]:
    from delib_fast.evals.run import evaluate

    return {result.suite: result for result in evaluate(subject, print).results}


def _of_suite(name: str, metric: SuiteMetric, results: Mapping[str, SuiteResult]) -> dict[str, Any]:
    tables = [table for table in results[metric.suite].tables if metric.column in table.columns]
    found = [
        row[table.columns.index(metric.column)]
        for table in tables
        for row in table.rows
        if metric.row in (str(row[0]), _row_name(row))
    ]
    if len(found) != 1:
        there = "; ".join(
            f"{_row_name(row)!r} × {', '.join(table.columns[1:])}"
            for table in results[metric.suite].tables
            for row in table.rows
        )
        raise ConfigError(
            f"metric {name!r}: the suite {metric.suite!r} has {len(found) or 'no'} rows {metric.row!r} "
            f"with a column {metric.column!r}; it has {there}"
        )
    cell = found[0]
    if isinstance(cell, int | float):
        cell = Estimate(float(cell), math.nan, math.nan, 1, "exact")
    if not isinstance(cell, Estimate):
        raise ConfigError(f"metric {name!r}: {metric.row!r} × {metric.column!r} is {cell!r}, no figure")
    return {"estimate": plain(cell)}


def _row_name(row: Sequence[Any]) -> str:
    """Its leading cells of text: "all, response"."""
    return ", ".join(takewhile(lambda cell: isinstance(cell, str), row))
