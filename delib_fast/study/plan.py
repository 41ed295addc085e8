"""Plan what a study trains: its arms, and a tree in which each stage occurs once.

The key of a stage is a hash of everything that its weights depend on: its own settings, the bytes of its files, the
seed, the settings that all runs share, and the key of its parent. Arms with the same first stages share them. A study
that is resumed, or that gets an additional arm, reuses the stages that it has already trained.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from delib_fast import __version__
from delib_fast.config import Config, ConfigError, nearest
from delib_fast.config.load import parse_config
from delib_fast.config.teacher import OWN_WEIGHTS
from delib_fast.digests import hash_tree
from delib_fast.study.settings import PREPARED, StudyConfig
from delib_fast.training.run_directory import read_ledger

# Settings of a run that do not change its weights.
_WITHOUT_EFFECT_ON_WEIGHTS = ("run_dir", "log", "checkpoint", "export", "cache_dir", "overlap")

OTHER_SEED = ", other seed"
"""What the label of a placebo arm adds to that of its arm."""
_SEED_OFFSET, _NUM_SEEDS = 1_000_000_007, 2**31


@dataclass(frozen=True)
class Arm:
    """One way to train: which MSM documents, which kind of AFT, and on how many rows."""

    msm: str | None = None
    """Name of the MSM variant."""
    aft: str | None = None
    """None, "no CoT", "CoT", "CoT only" (trained on the CoT, with the response unsupervised) or "CoT, NAME" (NAME is a
    variant of `aft_variants`)."""
    cot_weight: float | None = None
    """Weight of a CoT token, for the arms "CoT"."""
    size: int | None = None
    """Rows of AFT; None: all."""
    only_variant: bool = True
    """Whether the study has one MSM variant, whose name the label then omits."""
    placebo: bool = False
    """Whether the stages after `base` have another seed than in the arm of which this is the placebo."""

    @property
    def thinks(self) -> bool:
        return self.aft is not None and self.aft != "no CoT"

    @property
    def label(self) -> str:
        """The notation of the method's papers, e.g. `MSM (rules) + AFT (CoT)`."""
        msm = "" if self.msm is None else "MSM" if self.only_variant else f"MSM ({self.msm})"
        aft = "" if self.aft is None else f"AFT ({self.aft}{self._weight})"
        return (" + ".join(part for part in (msm, aft) if part) or "base") + (OTHER_SEED if self.placebo else "")

    @property
    def _weight(self) -> str:
        return f" × {self.cot_weight:g}" if self.cot_weight not in (None, 1.0) else ""

    @property
    def name(self) -> str:
        """The label, with the number of rows if it is limited."""
        return self.label if self.size is None else f"{self.label}, {self.size:,} rows"


@dataclass(frozen=True, eq=False)
class Node:
    """One stage of one seed. It is trained once, however many arms contain it."""

    key: str
    seed: int
    name: str
    config: Config
    parent: Node | None
    folder: Path
    chain: tuple[str, ...] = ()
    """Keys of the stages from the first one to this one."""

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def finished(self) -> bool:
        """Whether its run directory contains the finished stage.

        False also for a damaged ledger: the training run, which then starts, refuses it with the reason.
        """
        try:
            ledger = read_ledger(self.folder)
        except ConfigError:
            return False
        finished = [stage for stage in ledger["stages"] if stage["status"] == "finished"]
        return len(finished) == 1 and (self.model / "config.json").exists()


@dataclass(frozen=True)
class Plan:
    """Every stage once, parents before children; and the last stage of each arm and seed."""

    nodes: tuple[Node, ...]
    ends: Mapping[tuple[Arm, int], Node | None]
    """The last stage, whose model is the arm's; None for the unchanged model of `run.model.path`."""
    base_stages: int
    """Number of stages that every arm runs first."""
    base_model: Path | None
    """The model of `run.model.path`; None for random weights."""

    @property
    def arms(self) -> list[Arm]:
        return list(dict.fromkeys(arm for arm, _ in self.ends))

    def base_of(self, node: Node | None) -> Path | None:
        """The model that drift is measured from: that of the arm `base`, or what the first stage started from."""
        while node is not None and len(node.chain) > self.base_stages:
            node = node.parent
        return node.model if node is not None else self.base_model

    @property
    def stages_without_sharing(self) -> int:
        """Number of stages that separate runs would train."""
        return sum(len(node.chain) for node in self.ends.values() if node is not None)


def arms_of(study: StudyConfig) -> list[Arm]:
    """The arms in the order of the tables: first those without MSM, then those of each MSM variant."""
    only_variant = len(study.msm) == 1
    afts: dict[str, list[dict[str, Any]]] = {
        "no_cot": [{"aft": "no CoT"}],
        "cot": [
            *({"aft": "CoT", "cot_weight": w} for w in study.cot_weights),
            *({"aft": f"CoT, {name}"} for name in study.aft_variants),
        ],
        "cot_only": [{"aft": "CoT only"}],
    }
    sizes: list[int | None] = [*study.aft_sizes] or [None]
    found: list[Arm] = []
    for msm in (None, *study.msm):
        prefix = "" if msm is None else "msm_"
        if ("base" if msm is None else "msm") in study.arms:
            found.append(Arm(msm=msm, only_variant=only_variant))
        for kind, variants in afts.items():
            if f"{prefix}aft_{kind}" in study.arms:
                found += [
                    Arm(msm=msm, size=size, only_variant=only_variant, **variant)
                    for variant in variants
                    for size in sizes
                ]
    return [*found, *(_placebo(label, found) for label in study.placebo)]


def _placebo(label: str, arms: Sequence[Arm]) -> Arm:
    """The placebo of the arm with a label (of several sizes, the largest) or name.

    Raises ConfigError if there is no such arm, or it has no stages after `base`.
    """
    named = [arm for arm in arms if label in (arm.label, arm.name)]
    if not named:
        labels = list(dict.fromkeys(arm.label for arm in arms))
        raise ConfigError(f"placebo names the arm {label!r}, which is not in the study{nearest(label, labels)}")
    arm = max(named, key=lambda arm: arm.size or 0)
    if arm.msm is None and arm.aft is None:
        raise ConfigError(
            f"placebo names the arm {label!r}, which has no stages whose seed could be changed; remove it"
        )
    return replace(arm, placebo=True)


def plan_study(study: StudyConfig, prepared: Mapping[int, Path | None]) -> Plan:
    """Plan every stage.

    Args:
        prepared: the folder that the `prepare` script filled for each seed; None without a script.
    Raises:
        ConfigError: the configuration of a stage is not valid, or an arm has neither stages nor a model.
    """
    stages = _StageTree(study, prepared)
    ends: dict[tuple[Arm, int], Node | None] = {}
    for seed in study.seeds:
        for arm in arms_of(study):
            node: Node | None = None
            for i, (stage, limit) in enumerate(_chain(study, arm)):
                other_seed = arm.placebo and i >= len(study.base)
                node = stages.add(stage, limit, node, seed, other_seed=other_seed)
            if node is None and "path" not in study.run.get("model", {}):
                raise ConfigError(
                    f"the arm {arm.label!r} has no stages and run.model.path is not set, so it has no model: give "
                    "base: stages, or remove the arm"
                )
            ends[arm, seed] = node
    path = study.run.get("model", {}).get("path")
    return Plan(tuple(stages.nodes.values()), ends, len(study.base), None if path is None else Path(path))


def _chain(study: StudyConfig, arm: Arm) -> list[tuple[dict[str, Any], int | None]]:
    """The stages of an arm, each with the limit on the rows of the source `sized`, if there is one."""
    chain: list[tuple[dict[str, Any], int | None]] = [(stage, None) for stage in study.base]
    if arm.msm is not None:
        chain.append(({"kind": "msm", "name": "msm", **study.msm[arm.msm]}, None))
    if arm.aft is not None:
        assert study.aft is not None, "StudyConfig checks that arms with AFT have it"
        kinds: dict[str, dict[str, Any]] = {
            "no CoT": {"cot": "strip"},
            "CoT": {"cot": "train", "cot_weight": arm.cot_weight},
            "CoT only": {"cot": "train", "response_weight": 0.0},
            **{f"CoT, {name}": {"cot": "train", **keys} for name, keys in study.aft_variants.items()},
        }
        chain.append(({"kind": "aft", "name": "aft", **study.aft, **kinds[arm.aft]}, arm.size))
    return chain


class _StageTree:
    """Creates the nodes of the tree, one for each key."""

    def __init__(self, study: StudyConfig, prepared: Mapping[int, Path | None]) -> None:
        self._study, self._prepared = study, prepared
        self._hashes: dict[str, str] = {}
        self.nodes: dict[str, Node] = {}

    def add(
        self, stage: dict[str, Any], limit: int | None, parent: Node | None, seed: int, *, other_seed: bool = False
    ) -> Node:
        """Add a stage, unless the tree has it. With `other_seed` only its data is that of `seed`."""
        tree = self._run_settings(stage, limit, parent, seed)
        if other_seed:
            tree["seed"] = (seed + _SEED_OFFSET) % _NUM_SEEDS
        config = parse_config({**tree, "run_dir": "-"}, where=f"study, stage {stage.get('name', '?')!r}")
        key = self._key(config, parent)
        if key not in self.nodes:
            name = config.stages[0].name
            folder = Path(self._study.out) / "stages" / f"{name}-seed{seed}-{key}"
            config = config.model_copy(update={"run_dir": str(folder)})
            chain = (*(parent.chain if parent else ()), key)
            self.nodes[key] = Node(key, seed, name, config, parent, folder, chain)
        return self.nodes[key]

    def _run_settings(self, stage: dict[str, Any], limit: int | None, parent: Node | None, seed: int) -> dict[str, Any]:
        tree: dict[str, Any] = fill_in(copy.deepcopy(self._study.run), self._prepared[seed])
        data: dict[str, dict[str, Any]] = {
            name: {"path": source} if isinstance(source, str) else dict(source)
            for name, source in (tree.get("data") or {}).items()
        }
        if limit is not None:
            data[str(self._study.sized)]["limit"] = limit
        used = {*stage.get("train", ()), *stage.get("eval", ())}
        if parent is not None:
            tree["model"] = {
                **{k: v for k, v in tree["model"].items() if k != "architecture"},
                "path": str(parent.model),
            }
            tree.pop("tokenizer", None)  # it is stored with the parent's model
        else:
            used |= {*((tree.get("tokenizer") or {}).get("train") or {}).get("sources", ())}
        # A stage gets only the sources that it names, so that other sources do not change its key. A name without a
        # source is an error of the configuration, which `parse_config` reports.
        tree["data"] = {name: source for name, source in data.items() if name in used} or data
        return {**tree, "seed": seed, "stages": [stage]}

    def _key(self, config: Config, parent: Node | None) -> str:
        facts = config.model_dump(mode="json", exclude=set(_WITHOUT_EFFECT_ON_WEIGHTS))
        if parent is not None:
            facts["model"]["path"] = parent.key
        elif config.model.path is not None:
            facts["model"]["path"] = self._hash(config.model.path)
        # The content of files matters, not their location.
        files = [facts["tokenizer"], *facts["data"].values(), *([facts["model"]["lora"]] if config.model.lora else [])]
        stage = facts["stages"][0]
        teacher = stage.get("teacher") or {}
        if not teacher:  # the key of a run of an earlier version, which had no teachers, stays the same
            stage.pop("teacher", None)
        keys = [*((f, "path") for f in files), (files[0], "chat_template"), (stage, "spec"), (teacher, "spec")]
        for section, key in [*keys, (teacher, "model")]:
            if section.get(key) is not None and section[key] not in OWN_WEIGHTS:
                section[key] = self._hash(section[key])
        text = json.dumps({"version": __version__, **facts}, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def _hash(self, path: str) -> str:
        if path not in self._hashes:
            self._hashes[path] = hash_tree(path)
        return self._hashes[path]


def fill_in(tree: Any, prepared: Path | None) -> Any:
    """Replace {prepared} in every string of a tree by the folder of a seed's data.

    Raises ConfigError if a string contains {prepared} and the study has no `prepare` script.
    """
    if isinstance(tree, dict):
        return {key: fill_in(value, prepared) for key, value in tree.items()}
    if isinstance(tree, list):
        return [fill_in(value, prepared) for value in tree]
    if isinstance(tree, str) and PREPARED in tree:
        if prepared is None:
            raise ConfigError(f"{tree!r} is in the folder of the `prepare` script, but the study has no prepare:")
        return tree.replace(PREPARED, str(prepared))
    return tree
