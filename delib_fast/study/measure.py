"""Compute the metrics of one arm. Each is stored under a hash of everything that it depends on."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from delib_fast import __version__
from delib_fast.config import ConfigError
from delib_fast.digests import DamagedError, hash_tree, read_json, write_json
from delib_fast.evals.intervals import Estimate, RowEstimate
from delib_fast.evals.limits import spread
from delib_fast.evals.metrics.forced_choices import ChoiceFigures, Scores, choose, read_choices
from delib_fast.evals.paired import RowValues
from delib_fast.evals.results import SuiteResult, to_json_data
from delib_fast.evals.run import NAMED_FILES, evaluate, inputs_of
from delib_fast.evals.settings import load_eval_config
from delib_fast.evals.target import EvalTarget
from delib_fast.study.settings import ONLY_DISPLAYED, ChoicesMetric, SuiteMetric
from delib_fast.study.shown import SHOWN

FORMAT = 3
"""Increased when the meaning of a figure changes; older figures are then recomputed."""


def metric_key(model_key: str, metric: Mapping[str, Any], evaluation: Mapping[str, Any], thinks: bool) -> str:
    """A hash of everything that a figure depends on.

    Args:
        model_key: the key of the stage whose model is measured, or the hash of a model folder.
        metric: the settings of the metric.
        evaluation: the settings of the evaluation, on which only metrics of kind `suite` depend.
        thinks: whether replies follow a chain of thought.
    """
    is_suite = metric["kind"] == "suite"
    facts = {
        "format": FORMAT,
        "version": __version__,
        "model": model_key,
        "thinks": thinks,
        "metric": {key: value for key, value in metric.items() if key not in (*ONLY_DISPLAYED, "path")},
        "inputs": evaluation_facts(metric["suite"], evaluation) if is_suite else hash_tree(metric["path"]),
    }
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=8).hexdigest()


def evaluation_facts(suite: str, evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an evaluation that the figures of a suite depend on, with files replaced by their hashes.

    So a setting that only other suites read does not change the figures of this one.

    Raises ConfigError if the suite does not exist, or the settings are not valid.
    """
    settings = load_eval_config(None, **{**evaluation, "suites": (suite,)}).model_dump(mode="json")
    return {name: _with_hash(name, settings[name]) for name in inputs_of(suite)}


def _with_hash(name: str, value: Any) -> Any:
    """A setting of an evaluation, with the path of a file replaced by the hash of its content."""
    if name == "rows":
        return {source: {**settings, "path": hash_tree(settings["path"])} for source, settings in value.items()}
    if isinstance(value, dict) and "path" in value:
        return {**value, "path": hash_tree(value["path"])}
    return hash_tree(value) if name in NAMED_FILES and value is not None else value


def read_measured(file: Path, log: Callable[[str], None] = lambda _: None) -> dict[str, Any] | None:
    """The figure in a file that `measure` wrote; None if there is none, or it is damaged.

    Args:
        log: called with a message if the file is damaged.
    """
    try:
        return dict(read_json(file)["measured"])
    except FileNotFoundError:
        return None
    except (OSError, DamagedError, KeyError, TypeError, ValueError) as error:
        log(f"{file} is damaged ({error}); it is measured again")
        return None


def measure(task: Mapping[str, Any]) -> dict[str, Any]:
    """Compute the missing metrics of one arm and seed, and write each as soon as it is computed. Workers call this.

    Args:
        task: `folder` (run directory or model folder), `device`, `base` (the model that drift is measured from),
            `evaluation` (its settings), `thinks` (whether replies follow a chain of thought), `out` (folder of the
            suites' results), and `metrics`: for each name its settings and the file to write.
    """
    suites = sorted({m["metric"]["suite"] for m in task["metrics"].values() if m["metric"]["kind"] == "suite"})
    settings = {"device": task["device"], **task["evaluation"], "suites": suites or ("segments",)}
    if task["base"] is not None:
        settings.setdefault("base", task["base"])
    settings["out"] = task["out"]
    target = EvalTarget(Path(task["folder"]), load_eval_config(None, **settings))
    results = _evaluate_suites(target) if suites else {}
    found: dict[str, Any] = {}
    scores: Scores = {}
    for name, item in task["metrics"].items():
        if item["metric"]["kind"] == "choices":
            figure = _score_choices(target, ChoicesMetric.model_validate(item["metric"]), task["thinks"], scores)
        else:
            figure = _select_figure(name, SuiteMetric.model_validate(item["metric"]), results)
        write_json(Path(item["file"]), {"measured": figure})
        found[name] = figure
    return found


def _score_choices(target: EvalTarget, metric: ChoicesMetric, thinks: bool, scores: Scores) -> dict[str, Any]:
    """Score the items of a file. An item that several metrics have in common is scored once."""
    think = {"as trained": thinks, "never": False, "always": True}[metric.cot]
    items = read_choices(metric.path, metric.orders)
    figures = choose(target.scorer, items, think=think, orders=metric.orders, scores=scores)
    if getattr(figures, metric.figure) is None:
        raise ConfigError(f"{metric.path}: figure: {metric.figure} needs chains of thought; set cot: always")
    split = figures.first_cot_split if metric.figure == "first_cot" else figures.split
    return {
        "estimate": to_json_data(getattr(figures, metric.figure)),
        "margin": to_json_data(figures.margin),
        "content": None if split is None else split.content,
        "habit": None if split is None else split.habit,
        "margins": [round(m, 4) for m in figures.margins],
        **_rows_of_choices(metric, figures),
    }


def _rows_of_choices(metric: ChoicesMetric, figures: ChoiceFigures) -> dict[str, Any]:
    """The value of each item, in groups of one situation; nothing for a figure that is not a mean over items."""
    margins = np.array(figures.margins)
    by_figure = {
        "margin": margins,
        "share": (margins > 0).astype(float),
        "probability": 1 / (1 + np.exp(-np.clip(margins, -700, 700))),
    }
    if metric.figure not in by_figure:
        return {}
    situations = [item.situation for item in read_choices(metric.path, metric.orders)]
    number = {situation: str(k) for k, situation in enumerate(dict.fromkeys(situations))}
    values = tuple((value, 1.0) for value in by_figure[metric.figure].tolist())
    return {"rows": RowValues(hash_tree(metric.path), values, tuple(number[s] for s in situations)).to_json()}


def _evaluate_suites(target: EvalTarget) -> dict[str, SuiteResult]:
    return {result.suite: result for result in evaluate(target, print).results}


def _select_figure(name: str, metric: SuiteMetric, results: Mapping[str, SuiteResult]) -> dict[str, Any]:
    tables = [table for table in results[metric.suite].tables if metric.column in table.columns]
    found = [
        row[table.columns.index(metric.column)]
        for table in tables
        for row in table.rows
        if metric.row in (str(row[0]), _row_name(row))
    ]
    if len(found) != 1:
        available = "; ".join(
            f"{_row_name(row)!r} × {', '.join(table.columns[1:])}"
            for table in results[metric.suite].tables
            for row in table.rows
        )
        raise ConfigError(
            f"metric {name!r}: the suite {metric.suite!r} has {len(found) or 'no'} rows {metric.row!r} with a column "
            f"{metric.column!r}; available: {available}"
        )
    cell = found[0]
    if isinstance(cell, int | float):
        cell = Estimate(float(cell), math.nan, math.nan, 1, "exact")
    if not isinstance(cell, Estimate):
        raise ConfigError(f"metric {name!r}: {metric.row!r} × {metric.column!r} is {cell!r}, which is not a number")
    rows = RowValues(results[metric.suite].rows_key, cell.by_row) if isinstance(cell, RowEstimate) else None
    shown = spread(results[metric.suite].samples, SHOWN)
    return {
        "estimate": to_json_data(cell),
        **({} if rows is None else {"rows": rows.to_json()}),
        **({"samples": to_json_data(shown)} if shown else {}),
    }


def _row_name(row: Sequence[Any]) -> str:
    """The leading text cells of a row, e.g. "all, response"."""
    return ", ".join(takewhile(lambda cell: isinstance(cell, str), row))
