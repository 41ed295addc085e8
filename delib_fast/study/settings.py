"""What a study is given: one run's settings, the arms that differ from each other, and what is measured of each."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt, ValidationError, field_validator, model_validator

from delib_fast.config import ConfigError, Section, nearest
from delib_fast.config.load import read_yaml

ArmName = Literal["base", "msm", "aft_no_cot", "aft_cot", "msm_aft_no_cot", "msm_aft_cot"]
ARMS: tuple[ArmName, ...] = ("base", "msm", "aft_no_cot", "aft_cot", "msm_aft_no_cot", "msm_aft_cot")
_RUN_KEYS = {"run_dir": "out", "seed": "seeds", "stages": "base, msm and aft"}


class PrepareConfig(Section):
    """Data that is made for each seed before anything is trained: `python SCRIPT --seed N --out FOLDER ARGS`."""

    script: str
    args: tuple[str | int | float, ...] = ()


class ChoicesMetric(Section):
    """How a model chooses between two given replies: the log-probability of the one less that of the other."""

    kind: Literal["choices"]
    path: str
    """Items, a JSON object a line: prompt (or messages), a, b; optionally cot or cots, and situation: what items
    share."""
    figure: Literal["share", "probability", "margin", "first_cot"] = "share"
    """Share of items in which `a` is the likelier reply; mean of p(a) / (p(a) + p(b)); mean difference in nats; mean
    probability of the first of `cots` among them."""
    cot: Literal["as trained", "never", "always"] = "as trained"
    """Whether the replies stand behind the item's chain of thought: in arms trained with one, in none, or in all."""
    better: Literal["higher", "lower", "neither"] = "higher"
    title: str = ""
    chance: float | None = None
    """A line in the figures, where choosing blindly would lie."""


class SuiteMetric(Section):
    """One figure of a suite of `delib-fast eval`: found by its row (its first cell, or its leading cells of text as in
    "all, response") and column."""

    kind: Literal["suite"]
    suite: str
    row: str
    column: str
    better: Literal["higher", "lower", "neither"] = "neither"
    title: str = ""
    chance: float | None = None


Metric = Annotated[ChoicesMetric | SuiteMetric, Field(discriminator="kind")]


class Contrast(Section):
    """A difference between two arms, paired by seed."""

    title: str
    a: str
    """An arm as the table names it, e.g. `MSM (thrift) + AFT (CoT)`; of several sizes, the largest."""
    b: str
    metric: str


class StudyConfig(Section):
    """Arms × AFT sizes × seeds."""

    title: str
    out: str
    """Everything the study writes goes here: stages/, measures/, study.json, index.html, *.png."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] = Field(min_length=1)
    """Each seeds the weights, the order of the data, and `prepare`."""
    prepare: PrepareConfig | None = None
    """A script that makes data for each seed; its folder is {prepared} in the paths under run.data and metrics."""
    run: dict[str, Any]
    """What all runs share: model, tokenizer, data, engine … as in a run's configuration."""
    base: tuple[dict[str, Any], ...] = ()
    """Stages that every arm goes through first, and that are the arm `base` when nothing follows."""
    msm: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """MSM stages by name: variants of the spec (rules, values …). Each makes its own MSM arms."""
    aft: dict[str, Any] | None = None
    """The AFT stage; arms set its `cot` and `cot_weight`."""
    arms: tuple[ArmName, ...] = ARMS
    """By default all that `msm` and `aft` make possible."""
    aft_sizes: tuple[PositiveInt, ...] = ()
    """Rows of `sized` that AFT sees, a size an arm; by default all of them."""
    sized: str | None = None
    """The source that `aft_sizes` cut short: by default the first of aft.train. Others stay whole."""
    cot_weights: tuple[NonNegativeFloat, ...] = (1.0,)
    """Weight of a CoT token in the arms with CoT, each weight an arm; 0 leaves the CoT in context, untrained."""
    metrics: dict[str, Metric] = Field(default_factory=dict)
    alignment: str | None = None
    """The metric that curves, bars and the frontier are about; by default the first one."""
    monitorability: str | None = None
    """The metric that the frontier sets against it."""
    contrasts: tuple[Contrast, ...] = ()
    evaluation: dict[str, Any] = Field(default_factory=dict)
    """Keys of an evaluation (rows, questions, limit …) for the metrics of kind `suite`."""
    published: bool = False
    """Show published figures beside the study's own, each with its source."""
    workers: Literal["auto"] | PositiveInt = "auto"
    """How many arms are trained at once: by default one a GPU, or one a CPU core."""

    @field_validator("run")
    @classmethod
    def _no_keys_of_ours(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key, ours in _RUN_KEYS.items():
            if key in value:
                raise ValueError(f"{key} is the study's to set (see {ours}); leave it out")
        return value

    @field_validator("seeds", "aft_sizes", "cot_weights", "arms")
    @classmethod
    def _once(cls, value: Sequence[Any]) -> Sequence[Any]:
        twice = [item for item in value if value.count(item) > 1]
        if twice:
            raise ValueError(f"{twice[0]!r} is there twice")
        return value

    @model_validator(mode="after")
    def _parts_are_there(self) -> StudyConfig:
        if self.arms == ARMS:
            self.arms = tuple(arm for arm in ARMS if (self.msm or "msm" not in arm) and (self.aft or "aft" not in arm))
        for arm in self.arms:
            for part, there in (("msm", self.msm), ("aft", self.aft)):
                if part in arm and not there:
                    raise ValueError(f"the arm {arm} needs {part}:, which is missing")
        if not self.base and "base" in self.arms and "path" not in self.run.get("model", {}):
            self.arms = tuple(arm for arm in self.arms if arm != "base")  # a model of random weights is no arm
        if self.aft is not None and self.aft_sizes:
            train = self.aft.get("train") or ["?"]
            self.sized = self.sized or train[0]
            if self.sized not in train:
                raise ValueError(f"sized names {self.sized!r}, which aft.train does not{nearest(self.sized, train)}")
        for key in ("alignment", "monitorability"):
            name = getattr(self, key)
            if name is not None and name not in self.metrics:
                raise ValueError(f"{key} names {name!r}, which is not under metrics:{nearest(name, self.metrics)}")
        for contrast in self.contrasts:
            if contrast.metric not in self.metrics:
                raise ValueError(
                    f"the contrast {contrast.title!r} names the metric {contrast.metric!r}, which is not "
                    f"under metrics:{nearest(contrast.metric, self.metrics)}"
                )
        if self.alignment is None and self.metrics:
            self.alignment = next(iter(self.metrics))
        for name, metric in self.metrics.items():
            without = [arm for arm in self.arms if "aft" not in arm]
            if metric.kind == "suite" and metric.suite == "dose" and without:
                raise ValueError(
                    f"metrics.{name} is of the suite dose, which is about an arm's AFT stage, and the arm "
                    f"{without[0]} has none: list under arms: those with AFT, or leave the metric out"
                )
        return self


def load_study(path: str | os.PathLike[str], **overrides: Any) -> StudyConfig:
    """Read a study's YAML; overrides that are not None go over it.

    Paths under run.data, run.model, run.tokenizer, prepare, metrics and evaluation are taken from its folder, except
    those with {prepared}; `out` from the working directory.
    Raises ConfigError with every fault by its place.
    """
    path = Path(path)
    try:
        tree = read_yaml(path.read_text(encoding="utf-8"), where=str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a study is a mapping of keys; this is {type(tree).__name__}")
    _resolve(tree, path.parent)
    tree |= {key: value for key, value in overrides.items() if value is not None}
    try:
        return StudyConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {line}" for line in map(_told, error.errors()))) from None


def _told(fault: Any) -> str:
    location = ".".join(map(str, fault["loc"])) or "the study"
    if fault["type"] == "extra_forbidden":
        return f"{location}: unknown key{nearest(location, StudyConfig.model_fields) if len(fault['loc']) == 1 else ''}"
    return f"{location}: {fault['msg'].removeprefix('Value error, ')}"


def _resolve(tree: dict[str, Any], folder: Path) -> None:
    """Paths in a study's file become paths from the working directory."""

    def at(holder: Any, key: str, *, may_be_name: bool = False) -> None:
        if (
            isinstance(holder, dict)
            and isinstance(value := holder.get(key), str)
            and "{prepared}" not in value
            and not value.startswith("hub:")
        ):
            candidate = folder / Path(value).expanduser()
            if candidate.exists() or not may_be_name:
                holder[key] = os.path.normpath(candidate)

    def each(holder: Any, *keys: str) -> list[Any]:
        for key in keys:
            holder = holder.get(key) if isinstance(holder, dict) else None
        return list(holder.items()) if isinstance(holder, dict) else []

    for location in (("run", "data"), ("evaluation", "rows")):
        for name, source in each(tree, *location):
            if isinstance(source, str):
                holder = tree[location[0]][location[1]]
                at(holder, name)
            else:
                at(source, "path")
    run = tree.get("run")
    for section in ("model", "tokenizer"):
        at(run.get(section) if isinstance(run, dict) else None, "path", may_be_name=True)
    at(tree.get("prepare"), "script")
    for _, metric in each(tree, "metrics"):
        at(metric, "path")
    for key in ("questions", "solutions", "refusal_prompts", "refusal_labelled", "base"):
        at(tree.get("evaluation"), key, may_be_name=key == "base")
