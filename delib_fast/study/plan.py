"""From a study to what has to be trained: arms, and a tree of stages in which each stage stands once.

A stage's key is a hash of all that its weights depend on: its own settings, the bytes of its files, the seed, what the
run shares, and its parent's key. Arms that begin alike share the beginning; a study that goes on, or that was given one
more arm, finds what is there already.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from delib_fast import __version__
from delib_fast.config import Config, ConfigError
from delib_fast.config.load import parse_config
from delib_fast.files import hash_tree
from delib_fast.study.settings import StudyConfig

# Of a run's settings, what changes where and how fast it computes and not what it learns.
_NOT_LEARNT = ("run_dir", "log", "checkpoint", "cache_dir", "overlap")


@dataclass(frozen=True)
class Arm:
    """One way of training: which MSM documents, which AFT, on how many rows."""

    msm: str | None = None
    aft: str | None = None
    """"no CoT" or "CoT" """
    cot_weight: float | None = None
    """of arms with CoT"""
    size: int | None = None
    """rows of AFT; None: all"""
    lone: bool = True
    """the study has one MSM variant, or one CoT weight: names need not tell them apart"""

    @property
    def thinks(self) -> bool:
        return self.aft == "CoT"

    @property
    def label(self) -> str:
        """As the method's papers write arms: `MSM (rules) + AFT (CoT)`."""
        msm = "" if self.msm is None else "MSM" if self.lone else f"MSM ({self.msm})"
        aft = "" if self.aft is None else f"AFT ({self.aft}{self._weight})"
        return " + ".join(part for part in (msm, aft) if part) or "base"

    @property
    def _weight(self) -> str:
        return f" × {self.cot_weight:g}" if self.cot_weight not in (None, 1.0) else ""

    @property
    def name(self) -> str:
        """The label, and the number of rows where there is one."""
        return self.label if self.size is None else f"{self.label}, {self.size:,} rows"


@dataclass(frozen=True, eq=False)
class Node:
    """One stage of one seed, trained once whatever arms pass through it."""

    key: str
    seed: int
    name: str
    config: Config
    parent: Node | None
    folder: Path
    chain: tuple[str, ...] = field(default=())

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def finished(self) -> bool:
        """Whether its run directory holds the finished stage."""
        try:
            ledger = json.loads((self.folder / "ledger.json").read_text())
        except (OSError, json.JSONDecodeError):
            return False
        done = [stage for stage in ledger["stages"] if stage["status"] == "finished"]
        return len(done) == 1 and (self.model / "config.json").exists()


@dataclass(frozen=True)
class Plan:
    """Every stage once, parents before children, and for each arm and seed the stage whose model it is."""

    nodes: tuple[Node, ...]
    ends: Mapping[tuple[Arm, int], Node | None]
    """None: the model that `run.model.path` names, untouched"""
    base_stages: int
    base_model: Path | None
    """None: random weights"""

    @property
    def arms(self) -> list[Arm]:
        return list(dict.fromkeys(arm for arm, _ in self.ends))

    def base_of(self, node: Node | None) -> Path | None:
        """The model that drift is measured from: where the arm `base` ends, or what the first stage started from."""
        while node is not None and len(node.chain) > self.base_stages:
            node = node.parent
        return node.model if node is not None else self.base_model

    @property
    def stages_without_sharing(self) -> int:
        """How many stages separate runs would train."""
        return sum(len(node.chain) for node in self.ends.values() if node is not None)


def arms_of(study: StudyConfig) -> list[Arm]:
    """The arms in the order of the table: without MSM first, then variant by variant."""
    lone = len(study.msm) == 1
    afts: dict[str, list[dict[str, Any]]] = {
        "no_cot": [{"aft": "no CoT"}],
        "cot": [{"aft": "CoT", "cot_weight": w} for w in study.cot_weights],
    }
    sizes: list[int | None] = [*study.aft_sizes] or [None]
    found: list[Arm] = []
    for msm in (None, *study.msm):
        prefix = "" if msm is None else "msm_"
        if ("base" if msm is None else "msm") in study.arms:
            found.append(Arm(msm=msm, lone=lone))
        for kind, variants in afts.items():
            if f"{prefix}aft_{kind}" in study.arms:
                found += [Arm(msm=msm, size=size, lone=lone, **variant) for variant in variants for size in sizes]
    return found


def plan_study(study: StudyConfig, prepared: Mapping[int, Path | None]) -> Plan:
    """Lay out every stage. Raises ConfigError where a composed run is not one."""
    stages = _Stages(study, prepared)
    ends: dict[tuple[Arm, int], Node | None] = {}
    for seed in study.seeds:
        for arm in arms_of(study):
            node: Node | None = None
            for stage, limit in _chain(study, arm):
                node = stages.add(stage, limit, node, seed)
            if node is None and "path" not in study.run.get("model", {}):
                raise ConfigError(
                    f"the arm {arm.label!r} trains nothing, and run.model names no model to look at; "
                    "give base: stages, or leave the arm out"
                )
            ends[arm, seed] = node
    path = study.run.get("model", {}).get("path")
    return Plan(tuple(stages.nodes.values()), ends, len(study.base), None if path is None else Path(path))


def _chain(study: StudyConfig, arm: Arm) -> list[tuple[dict[str, Any], int | None]]:
    """The stages of an arm, and how many rows the sized source gives to each."""
    chain: list[tuple[dict[str, Any], int | None]] = [(stage, None) for stage in study.base]
    if arm.msm is not None:
        chain.append(({"kind": "msm", "name": "msm", **study.msm[arm.msm]}, None))
    if arm.aft is not None:
        assert study.aft is not None, "StudyConfig checks that arms with AFT have it"
        cot = {"cot": "train", "cot_weight": arm.cot_weight} if arm.thinks else {"cot": "strip"}
        chain.append(({"kind": "aft", "name": "aft", **study.aft, **cot}, arm.size))
    return chain


class _Stages:
    """Makes nodes, each key once."""

    def __init__(self, study: StudyConfig, prepared: Mapping[int, Path | None]) -> None:
        self._study, self._prepared = study, prepared
        self._hashes: dict[str, str] = {}
        self.nodes: dict[str, Node] = {}

    def add(self, stage: dict[str, Any], limit: int | None, parent: Node | None, seed: int) -> Node:
        tree = self._tree(stage, limit, parent, seed)
        config = parse_config({**tree, "run_dir": "-"}, where=f"study, stage {stage.get('name', '?')!r}")
        key = self._key(config, parent)
        if key not in self.nodes:
            name = config.stages[0].name
            folder = Path(self._study.out) / "stages" / f"{name}-seed{seed}-{key}"
            config = config.model_copy(update={"run_dir": str(folder)})
            chain = (*(parent.chain if parent else ()), key)
            self.nodes[key] = Node(key, seed, name, config, parent, folder, chain)
        return self.nodes[key]

    def _tree(self, stage: dict[str, Any], limit: int | None, parent: Node | None, seed: int) -> dict[str, Any]:
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
            tree.pop("tokenizer", None)  # the parent's model brings it
        else:
            used |= {*((tree.get("tokenizer") or {}).get("train") or {}).get("sources", ())}
        # A stage is given only the sources that it names, so that others don't change its key. Unknown names stay out:
        # the configuration says so better.
        tree["data"] = {name: source for name, source in data.items() if name in used} or data
        return {**tree, "seed": seed, "stages": [stage]}

    def _key(self, config: Config, parent: Node | None) -> str:
        facts = config.model_dump(mode="json", exclude=set(_NOT_LEARNT))
        if parent is not None:
            facts["model"]["path"] = parent.key
        elif config.model.path is not None:
            facts["model"]["sha256"] = self._hash(config.model.path)
        if config.tokenizer.path is not None:
            facts["tokenizer"]["sha256"] = self._hash(config.tokenizer.path)
        for name, source in config.data.items():
            facts["data"][name]["path"] = self._hash(source.path)  # wherever the file lies
        text = json.dumps({"version": __version__, **facts}, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def _hash(self, path: str) -> str:
        if path not in self._hashes:
            self._hashes[path] = hash_tree(path)
        return self._hashes[path]


def fill_in(tree: Any, prepared: Path | None) -> Any:
    """The tree with {prepared} replaced by the folder of a seed's data."""
    if isinstance(tree, dict):
        return {key: fill_in(value, prepared) for key, value in tree.items()}
    if isinstance(tree, list):
        return [fill_in(value, prepared) for value in tree]
    if isinstance(tree, str) and "{prepared}" in tree:
        if prepared is None:
            raise ConfigError(f"{tree!r} is to be in the folder that `prepare` makes, and the study has no prepare:")
        return tree.replace("{prepared}", str(prepared))
    return tree
