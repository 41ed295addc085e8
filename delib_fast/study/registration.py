"""Preregistration: the plan of a study, written to a file before it is trained, and what was changed afterwards.

    delib-fast study STUDY.yaml --freeze    # writes STUDY.frozen.json next to STUDY.yaml

The plan has the hash of everything that the weights of each arm depend on, the metrics, the contrasts with the primary
one, the seeds and the exclusions. Anyone can write such a file, with any date: it is evidence only if it is under
version control, or stored with a third party, before the results exist.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from delib_fast import __version__
from delib_fast.config import ConfigError
from delib_fast.digests import DamagedError, hash_tree, read_json, write_json
from delib_fast.study.measure import evaluation_facts
from delib_fast.study.plan import Plan, fill_in
from delib_fast.study.settings import ONLY_DISPLAYED, Contrast, StudyConfig

_PARTS = {"arms": "arm", "metrics": "metric", "contrasts": "contrast"}
Facts = dict[str, Any]


@dataclass(frozen=True)
class Registration:
    """How a study compares with its frozen plan."""

    file: str | None = None
    """Name of the file of the plan; None if the study was not frozen."""
    frozen_at: str | None = None
    """ISO 8601, UTC."""
    plan: str | None = None
    """Hash of the frozen plan."""
    first_stage_at: str | None = None
    """When the first stage of the study began to train, as far as it is recorded."""
    started_before: tuple[str, ...] = ()
    """Stages of the plan that existed when it was frozen."""
    seeds: tuple[int, ...] = ()
    """The frozen seeds that the study still has."""
    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    """`added`, `changed` and `removed` list the differences from the frozen plan, e.g. "metric reliance"."""
    reasons: Mapping[str, str] = field(default_factory=dict)
    """For each arm, metric and contrast (e.g. "metric reliance") that is not as frozen, the reason."""

    @property
    def before_training(self) -> bool:
        """Whether the plan was frozen before the first of its stages began to train."""
        if self.frozen_at is None or self.started_before:
            return False
        return self.first_stage_at is None or self.first_stage_at >= self.frozen_at

    def exploratory(self, *parts: str) -> list[str]:
        """Why a result that depends on these parts (e.g. "metric reliance") is exploratory; [] if it was registered."""
        if self.file is None:
            return ["the study was not frozen"]
        found = [] if self.before_training else ["the plan was frozen after training had begun"]
        found += [f"the {part} was {self.reasons[part]}" for part in dict.fromkeys(parts) if part in self.reasons]
        return found

    def to_data(self, study: StudyConfig) -> dict[str, Any] | None:
        """The part of study.json; None if the study was not frozen."""
        if self.file is None:
            return None
        return {
            "file": self.file,
            "frozen_at": self.frozen_at,
            "plan": self.plan,
            "before_training": self.before_training,
            "first_stage_at": self.first_stage_at,
            "started_before": list(self.started_before),
            "primary": study.primary,
            "exclusions": list(study.exclusions),
            "added": list(self.added),
            "changed": list(self.changed),
            "removed": list(self.removed),
        }


UNREGISTERED = Registration()


def plan_facts(study: StudyConfig, plan: Plan, prepared: Mapping[int, Path | None]) -> Facts:
    """What a plan registers, as JSON data. It contains no path: files count by their content.

    Args:
        prepared: the folder of each seed's data, as `prepare_data` returns it.
    """
    arms: dict[str, dict[str, str]] = {}
    for (arm, seed), node in plan.ends.items():
        key = node.key if node is not None else hash_tree(str(study.run["model"]["path"]))
        arms.setdefault(arm.name, {})[str(seed)] = key
    facts = {
        "seeds": list(study.seeds),
        "arms": arms,
        "metrics": {name: _metric_facts(study, name, prepared) for name in study.metrics},
        "contrasts": {contrast_key(contrast): contrast.model_dump(mode="json") for contrast in study.contrasts},
        "primary": study.primary,
        "exclusions": list(study.exclusions),
    }
    return dict(json.loads(json.dumps(facts)))


def contrast_key(contrast: Contrast) -> str:
    """The identity of a contrast: its title and its metric."""
    return f"{contrast.title} [{contrast.metric}]"


def _metric_facts(study: StudyConfig, name: str, prepared: Mapping[int, Path | None]) -> Facts:
    metric = study.metrics[name]
    facts: Facts = metric.model_dump(mode="json", exclude={*ONLY_DISPLAYED, "path"})
    for seed in study.seeds:
        if metric.kind == "choices":
            value: Any = hash_tree(fill_in(metric.path, prepared[seed]))
        else:
            value = evaluation_facts(metric.suite, fill_in(study.evaluation, prepared[seed]))
        facts.setdefault("by seed", {})[str(seed)] = value
    return facts


def freeze(study: StudyConfig, plan: Plan, prepared: Mapping[int, Path | None]) -> tuple[Path, str]:
    """Write the plan of a study next to its file.

    Returns:
        The file, and a sentence that says what was done. The file is not written again if it has the same plan.
    Raises:
        ConfigError: the study has no primary contrast, or a different plan is already frozen.
    """
    if study.file is None:
        raise ConfigError("a study that was not read from a file cannot be frozen; use load_study")
    if study.primary is None:
        raise ConfigError(
            f"{study.file}: a frozen plan needs a primary contrast: set primary: to the title of one of contrasts:"
        )
    file, facts = frozen_file(study.file), plan_facts(study, plan, prepared)
    if (earlier := read_frozen(file)) is not None:
        added, changed, removed, _ = _differences(earlier["plan"], facts)
        differing = [
            *(f"{x} added" for x in added),
            *(f"{x} changed" for x in changed),
            *(f"{x} removed" for x in removed),
        ]
        if differing:
            raise ConfigError(
                f"{file}: a different plan was frozen on {earlier['frozen_at']} ({'; '.join(differing)}). Without "
                "--freeze the study runs and reports these differences; to register a new plan, delete the file"
            )
        return file, f"{file} already holds this plan, frozen on {earlier['frozen_at']}"
    started = sorted(node.folder.name for node in plan.nodes if node.folder.exists())
    content = {
        "format": 1,
        "title": study.title,
        "frozen_at": _now(),
        "delib_fast": __version__,
        "plan_hash": _hash(facts),
        "started_before": started,
        "plan": facts,
    }
    write_json(file, content)
    when = f"after {len(started)} of its stages had been started" if started else "before any of its stages"
    return file, (
        f"frozen {when}: {len(facts['arms'])} arms, {len(facts['metrics'])} metrics, {len(facts['seeds'])} seeds, "
        f"primary contrast {study.primary!r}; plan {content['plan_hash']} in {file}. Commit it before you run the study"
    )


def frozen_file(study_file: Path) -> Path:
    """Where the plan of a study file is stored: STUDY.frozen.json next to STUDY.yaml."""
    return study_file.with_suffix(".frozen.json")


def read_frozen(file: Path) -> dict[str, Any] | None:
    """The content of a frozen plan; None if the file does not exist. Raises ConfigError if it was changed."""
    try:
        found = read_json(file)
        if found["format"] != 1 or found["plan_hash"] != _hash(found["plan"]):
            raise DamagedError("its plan does not match plan_hash")
    except FileNotFoundError:
        return None
    except (OSError, DamagedError, KeyError) as error:
        raise ConfigError(
            f"{file}: the frozen plan cannot be read ({error}). Restore the file from version control; without it the "
            "study is not preregistered"
        ) from None
    return found


def compare(
    study: StudyConfig, plan: Plan, prepared: Mapping[int, Path | None], first_stage_at: str | None
) -> Registration:
    """Compare a study with its frozen plan.

    Args:
        first_stage_at: when the first of its stages began to train; None if that is not recorded.
    Raises:
        ConfigError: the file of the plan is damaged.
    """
    file = None if study.file is None else frozen_file(study.file)
    frozen = None if file is None else read_frozen(file)
    if file is None or frozen is None:
        return Registration(seeds=study.seeds, first_stage_at=first_stage_at)
    added, changed, removed, reasons = _differences(frozen["plan"], plan_facts(study, plan, prepared))
    return Registration(
        file=file.name,
        frozen_at=frozen["frozen_at"],
        plan=frozen["plan_hash"],
        first_stage_at=first_stage_at,
        started_before=tuple(frozen["started_before"]),
        seeds=tuple(seed for seed in study.seeds if seed in frozen["plan"]["seeds"]),
        added=tuple(added),
        changed=tuple(changed),
        removed=tuple(removed),
        reasons=reasons,
    )


def _differences(before: Facts, now: Facts) -> tuple[list[str], list[str], list[str], dict[str, str]]:
    """What was added, changed and removed, and the reason for each part that is not as frozen."""
    added, changed, removed = [], [], []
    reasons = {}
    for part, word in _PARTS.items():
        for name in {**before[part], **now[part]}:
            if name not in before[part]:
                added.append(f"{word} {name}")
                reasons[f"{word} {name}"] = "added after the plan was frozen"
            elif name not in now[part]:
                removed.append(f"{word} {name}")
            elif _of_common_seeds(before[part][name], now) != _of_common_seeds(now[part][name], before):
                changed.append(f"{word} {name}")
                reasons[f"{word} {name}"] = "changed after the plan was frozen"
    added += [f"seed {seed}" for seed in now["seeds"] if seed not in before["seeds"]]
    missing = [seed for seed in before["seeds"] if seed not in now["seeds"]]
    removed += [f"seed {seed}" for seed in missing]
    changed += [key for key in ("primary", "exclusions") if before[key] != now[key]]
    for name in now["contrasts"]:
        whole = [f"seed {seed} is missing" for seed in missing]
        whole += ["exclusions were changed"] if "exclusions" in changed else []
        if whole and f"contrast {name}" not in reasons:
            reasons[f"contrast {name}"] = f"not computed as it was frozen: {', '.join(whole)}"
    return added, changed, removed, reasons


def _of_common_seeds(facts: Facts, other: Facts) -> Facts:
    """The facts without the seeds that the other plan does not have: an added seed does not change an arm."""
    seeds = {str(seed) for seed in other["seeds"]}

    def kept(tree: Mapping[str, Any]) -> Facts:
        return {key: value for key, value in tree.items() if not key.isdigit() or key in seeds}

    return {key: kept(value) if key == "by seed" else value for key, value in kept(facts).items()}


def parts_of(contrast: Contrast, arms: Sequence[str]) -> list[str]:
    """The parts that the result of a contrast between two arms depends on, for `Registration.exploratory`."""
    return [f"contrast {contrast_key(contrast)}", f"metric {contrast.metric}", *(f"arm {name}" for name in arms)]


def _hash(facts: Facts) -> str:
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
