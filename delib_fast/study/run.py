"""Run a study: make its data, train the missing stages, compute the missing metrics, and write the results."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from delib_fast.config import ConfigError
from delib_fast.digests import (
    DamagedError,
    hash_file_once,
    hash_tree,
    read_json,
    write_json,
)
from delib_fast.evals.intervals import Estimate
from delib_fast.evals.metrics.forced_choices import OrderSplit, read_choices
from delib_fast.evals.results import to_json_data
from delib_fast.files import write_atomic
from delib_fast.reports.eval_page import cell_text
from delib_fast.reports.study_figures import draw_pictures
from delib_fast.reports.study_page import write_page
from delib_fast.study.costs import Costs
from delib_fast.study.measure import metric_key, read_measured
from delib_fast.study.paired import paired_contrasts
from delib_fast.study.plan import Arm, Node, Plan, fill_in, plan_study
from delib_fast.study.pool import StudyError, Task, run_tasks, worker_environments
from delib_fast.study.registration import compare, freeze
from delib_fast.study.settings import ChoicesMetric, StudyConfig
from delib_fast.study.shown import shown_samples
from delib_fast.study.summary import Choice, find_arm, summarize
from delib_fast.training.run_directory import read_ledger

Log = Callable[[str], None]
_PREPARED = ".prepared.json"
"""Written last to the folder of a seed's data: the hash of each of its files."""


@dataclass(frozen=True)
class StudyResult:
    """The results of a study: the content of study.json, and the files."""

    summary: dict[str, Any]
    json: Path
    page: Path
    pictures: tuple[Path, ...]


def run_study(study: StudyConfig, log: Log = lambda _: None) -> StudyResult:
    """Train and measure everything that is missing, and write the results.

    Args:
        log: called with one line of progress at a time.
    Raises:
        ConfigError: the study is not valid; raised before anything is trained.
        StudyError: tasks have failed; everything that does not depend on them is done.
    """
    out = Path(study.out)
    (out / "measures").mkdir(parents=True, exist_ok=True)
    environments = worker_environments(study.workers, str(study.run.get("engine", {}).get("device", "auto")))
    prepared = prepare_data(study, len(environments), log)
    plan = _checked_plan(study, prepared)
    costs = Costs(out / "cost.jsonl")
    compare(study, plan, prepared, None)  # a damaged plan is refused before anything is trained
    tasks, measures = plan_tasks(study, plan, prepared, log)
    log(
        f"{len(plan.arms)} arms × {len(study.seeds)} seeds: {len(plan.nodes)} stages ({plan.stages_without_sharing} "
        f"without sharing), {sum(n.finished() for n in plan.nodes)} of them already trained; {len(tasks)} tasks for "
        f"{len(environments)} workers"
    )
    start = time.perf_counter()
    done = 0

    def on_done(task: Task, answer: dict[str, Any]) -> None:
        nonlocal done
        done += 1
        costs.add(task.name, answer)
        measured = "".join(f", {name} {cell_text(_estimate(tree))}" for name, tree in (answer["result"] or {}).items())
        log(f"{done}/{len(tasks)} {task.name}: {answer['wall_s']:.0f} s{measured}")

    if tasks:
        run_tasks(tasks, environments, on_done)
    costs.add_wall(time.perf_counter() - start, len(environments))
    measured = {key: {name: _measured(file) for name, file in files.items()} for key, files in measures.items()}
    figures = {key: {name: _estimate(tree) for name, tree in trees.items()} for key, trees in measured.items()}
    choices = {
        key: {name: _choice(tree) for name, tree in trees.items() if "margin" in tree}
        for key, trees in measured.items()
    }
    registration = compare(study, plan, prepared, costs.first_stage_at(plan))
    result = summarize(study, figures, plan.arms, costs.total(plan, log), registration, choices)
    result["corpora"] = corpora_of(plan)
    result["paired"] = paired_contrasts(measured, plan.arms, result["contrasts"])
    result["samples"] = shown_samples(study, measured, plan.arms)
    write_atomic(out / "study.json", json.dumps(to_json_data(result), indent=1, ensure_ascii=False) + "\n")
    pictures = draw_pictures(result, out)
    page = write_page(result, pictures, out, published=study.published)
    return StudyResult(result, out / "study.json", page, tuple(picture.path for picture in pictures))


def corpora_of(plan: Plan) -> dict[str, dict[str, Any]]:
    """The documents of each MSM variant, from the ledger of its first seed: what `check_corpus` counts, and tokens."""
    found: dict[str, dict[str, Any]] = {}
    for (arm, _), end in plan.ends.items():
        node = end
        while node is not None and len(node.chain) > plan.base_stages + 1:
            node = node.parent  # the stage after those that every arm runs first
        if arm.msm is None or arm.msm in found or node is None or not node.finished():
            continue
        (entry,) = read_ledger(node.folder)["stages"]
        if "corpus" in entry:
            found[arm.msm] = {**entry["corpus"], "tokens": round(entry["tokens"] / entry["epochs"])}
    return found


def _measured(file: Path) -> dict[str, Any]:
    found = read_measured(file)
    if found is None:
        raise StudyError(f"{file} was damaged or removed while the study ran; start it again, and it is measured again")
    return found


def _checked_plan(study: StudyConfig, prepared: Mapping[int, Path | None]) -> Plan:
    """The plan, after every check that is possible before anything is trained."""
    plan = plan_study(study, prepared)
    for contrast in study.contrasts:
        find_arm(contrast.a, plan.arms)
        find_arm(contrast.b, plan.arms)
    for seed in study.seeds:
        for metric in study.metrics.values():
            if isinstance(metric, ChoicesMetric):
                read_choices(fill_in(metric.path, prepared[seed]), metric.orders)
    return plan


def freeze_study(study: StudyConfig) -> str:
    """Write the plan of a study next to its file, and say what was done; see `registration`. Trains nothing."""
    prepared = prepare_data(study, 1, lambda _: None)
    return freeze(study, _checked_plan(study, prepared), prepared)[1]


def describe_plan(study: StudyConfig) -> str:
    """List the arms and the stages of a study, and the stages that are already trained. Runs the `prepare` script."""
    plan = _checked_plan(study, prepare_data(study, 1, lambda _: None))
    lines = [f"{len(plan.arms)} arms × {len(study.seeds)} seeds"]
    lines += [f"  {arm.name}" for arm in plan.arms]
    lines += [f"{len(plan.nodes)} stages; separate runs would train {plan.stages_without_sharing}"]
    lines += [
        f"  {node.folder.name}  after {node.parent.folder.name if node.parent else 'the start'}"
        f"{'  (already trained)' if node.finished() else ''}"
        for node in plan.nodes
    ]
    return "\n".join(lines)


# --- the prepare script -------------------------------------------------------------------------------------


def prepare_data(study: StudyConfig, workers: int, log: Log) -> dict[int, Path | None]:
    """Run the `prepare` script for each seed whose data is missing.

    Returns the folder of each seed's data; None without a script. Its name depends on the script, its arguments and
    its inputs.
    Raises ConfigError if the script or an input does not exist, or if the script fails.
    """
    if study.prepare is None:
        return dict.fromkeys(study.seeds)
    script = Path(study.prepare.script)
    if not script.is_file():
        raise ConfigError(f"prepare.script: {script}: no such file")
    arguments = [str(arg) for arg in study.prepare.args]
    inputs = "".join(_hash_input(Path(path)) for path in study.prepare.inputs)
    facts = script.read_bytes() + "\0".join(arguments).encode() + inputs.encode()
    key = hashlib.blake2b(facts, digest_size=6).hexdigest()
    folders = {seed: Path(study.out) / "prepared" / f"seed{seed}-{key}" for seed in study.seeds}
    missing = [seed for seed in study.seeds if not _is_prepared(folders[seed])]
    if missing:
        log(f"{script.name}: making the data of {len(missing)} seeds")
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(lambda seed: _run_script(script, arguments, seed, folders[seed]), missing))
    return dict(folders)


def _hash_input(path: Path) -> str:
    """The hash of a file, or the names and hashes of all files of a folder."""
    if path.is_dir():
        return json.dumps(_hash_all(path), sort_keys=True)
    if not path.is_file():
        raise ConfigError(f"prepare.inputs: {path}: no such file or folder")
    return hash_file_once(path)


def _is_prepared(folder: Path) -> bool:
    """Whether the script has made the data of a seed. Raises ConfigError if the files were changed since."""
    marker = folder / _PREPARED
    if not marker.exists():
        return False
    try:
        recorded = read_json(marker)["files"]
    except (OSError, DamagedError, KeyError) as error:
        recorded, why = {}, f"{marker} is damaged ({error})"
    else:
        found = _hash_all(folder)
        changed = sorted(name for name in recorded.keys() | found.keys() if recorded.get(name) != found.get(name))
        if not changed:
            return True
        why = f"{folder / changed[0]} was changed after the script made it"
    raise ConfigError(f"prepare.script: {why}. Delete {folder}, and the script makes it again")


def _hash_all(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _PREPARED)
    return {str(path.relative_to(folder)): hash_file_once(path) for path in files}


def _run_script(script: Path, arguments: list[str], seed: int, folder: Path) -> None:
    command = [sys.executable, str(script), "--seed", str(seed), "--out", str(folder), *arguments]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        last_line = (process.stderr.strip().splitlines() or ["it printed no error"])[-1]
        raise ConfigError(f"prepare.script: {' '.join(command[1:])} exited with code {process.returncode}: {last_line}")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / _PREPARED, {"files": _hash_all(folder)})


# --- tasks --------------------------------------------------------------------------------------------------


def plan_tasks(
    study: StudyConfig, plan: Plan, prepared: Mapping[int, Path | None], log: Log = lambda _: None
) -> tuple[list[Task], dict[tuple[Arm, int], dict[str, Path]]]:
    """Return the tasks of the study, and the files of the metrics of each arm and seed.

    Tasks train the stages and compute the metrics that are missing. The task that measures a model directly follows the
    one that trains it, so that it takes precedence over further training.
    """
    logs = Path(study.out) / "logs"
    measures = {}
    measuring: dict[Node | None, dict[frozenset[str], Task]] = defaultdict(dict)
    for (arm, seed), end in plan.ends.items():
        task, measures[arm, seed] = _measuring_task(study, plan, arm, seed, end, prepared[seed], log)
        if task is not None:
            # Every seed of an arm without stages has the same model, and usually the same files.
            measuring[end].setdefault(frozenset(m["file"] for m in task.work["metrics"].values()), task)
    tasks = [*measuring[None].values()]
    for node in plan.nodes:
        if not node.finished():
            tasks.append(
                Task(
                    _training_name(node),
                    {
                        "do": "train",
                        "config": node.config.model_dump(mode="json"),
                        "log": str(logs / f"{node.folder.name}.log"),
                    },
                    _training_before(node.parent),
                )
            )
        tasks += measuring[node].values()
    return tasks, measures


def _training_name(node: Node) -> str:
    return f"train {node.folder.name}"


def _training_before(node: Node | None) -> tuple[str, ...]:
    """The name of the task that trains the model of the node; () if the model exists."""
    return () if node is None or node.finished() else (_training_name(node),)


def _measuring_task(
    study: StudyConfig, plan: Plan, arm: Arm, seed: int, node: Node | None, prepared: Path | None, log: Log
) -> tuple[Task | None, dict[str, Path]]:
    """The task that computes the missing metrics of an arm (None if there are none), and the file of each metric."""
    model_path = str(study.run["model"].get("path"))
    key = node.key if node is not None else hash_tree(model_path)
    name = node.folder.name if node is not None else f"base-seed{seed}-{key[:16]}"
    evaluation = fill_in(study.evaluation, prepared)
    files, missing = {}, {}
    for metric_name, metric in study.metrics.items():
        tree = fill_in(metric.model_dump(mode="json"), prepared)
        digest = metric_key(key, tree, evaluation, arm.thinks)
        file = Path(study.out) / "measures" / f"{metric_name}-{digest}.json"
        files[metric_name] = file
        if read_measured(file, log) is None:
            missing[metric_name] = {"metric": tree, "file": str(file)}
    if not missing:
        return None, files
    base = plan.base_of(node)
    work = {
        "do": "measure",
        "folder": str(node.folder) if node is not None else model_path,
        "thinks": arm.thinks,
        "device": str(study.run.get("engine", {}).get("device", "auto")),
        "evaluation": evaluation,
        "base": None if base is None else str(base),
        "metrics": missing,
        "out": str(Path(study.out) / "evals" / name),
        "log": str(Path(study.out) / "logs" / f"{name}.log"),
    }
    return Task(f"measure {name}", work, _training_before(node)), files


def _estimate(measured: Mapping[str, Any], key: str = "estimate") -> Estimate:
    tree = measured[key]
    numbers = [float("nan") if tree[name] is None else float(tree[name]) for name in ("value", "low", "high")]
    return Estimate(numbers[0], numbers[1], numbers[2], tree["n"], tree["method"])


def _choice(measured: Mapping[str, Any]) -> Choice:
    known = measured["content"] is not None
    split = OrderSplit(measured["content"], measured["habit"]) if known else None
    return Choice(_estimate(measured, "margin"), split)
