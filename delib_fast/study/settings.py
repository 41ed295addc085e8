"""The configuration of a study: the settings that all runs share, the arms, and the metrics."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt, PrivateAttr, field_validator, model_validator

from delib_fast.config import FilePath, Section, nearest
from delib_fast.config.load import FileKind, load
from delib_fast.evals.metrics.forced_choices import Orders
from delib_fast.evals.settings import SUITES

ArmName = Literal[
    "base",
    "msm",
    "aft_no_cot",
    "aft_cot",
    "aft_cot_only",
    "msm_aft_no_cot",
    "msm_aft_cot",
    "msm_aft_cot_only",
]
ARMS: tuple[ArmName, ...] = ("base", "msm", "aft_no_cot", "aft_cot", "msm_aft_no_cot", "msm_aft_cot")
"""The default arms. `aft_cot_only` and `msm_aft_cot_only` train on the CoT alone, with the response unsupervised."""
_KEYS_SET_BY_THE_STUDY = {"run_dir": "out", "seed": "seeds", "stages": "base, msm and aft"}
PREPARED = "{prepared}"
"""In a path: the folder that the `prepare` script filled for the seed."""
STUDY_FILE = FileKind(
    "a study",
    paths=(
        "run.data.*",
        "run.data.*.path",
        "run.model.lora.path",
        "run.tokenizer.chat_template",
        "base.*.spec",
        "msm.*.spec",
        "aft.spec",
        "aft.teacher.spec",
        "aft_variants.*.spec",
        "aft_variants.*.teacher.spec",
        "prepare.script",
        "prepare.inputs.*",
        "metrics.*.path",
        "evaluation.rows.*",
        "evaluation.rows.*.path",
        "evaluation.questions",
        "evaluation.solutions",
        "evaluation.refusal_prompts",
        "evaluation.refusal_labelled",
    ),
    names_or_paths=(
        "run.model.path",
        "run.tokenizer.path",
        "aft.teacher.model",
        "aft_variants.*.teacher.model",
        "evaluation.base",
    ),
    placeholders=(PREPARED,),
)
Better = Literal["higher", "lower", "neither"]
ONLY_DISPLAYED = ("title", "better", "chance")
"""Keys of a metric that do not change its figures."""


class PrepareConfig(Section):
    """A script that makes the data of each seed before training: `python SCRIPT --seed N --out FOLDER ARGS`."""

    script: FilePath
    """Path of the script."""
    args: tuple[str | int | float, ...] = ()
    """Further arguments of the script."""
    inputs: tuple[FilePath, ...] = ()
    """Files and folders that the script reads. If one of them changes, the script runs again."""


class ChoicesMetric(Section):
    """How a model chooses between two given replies: the log-probability of one minus that of the other."""

    kind: Literal["choices"]
    path: FilePath
    """Items, one JSON object per line, with `prompt` (or `messages`), `a` and `b`; optionally `cot` or `cots`, and
    `situation`, which groups items for the interval."""
    figure: Literal["share", "probability", "margin", "first_cot"] = "share"
    """`share`: share of items in which `a` is the more likely reply. `probability`: mean of p(a) / (p(a) + p(b)).
    `margin`: mean difference of the log-probabilities in nats. `first_cot`: mean probability of the first of `cots`
    among them."""
    cot: Literal["as trained", "never", "always"] = "as trained"
    """Whether the replies follow the item's chain of thought: in arms that were trained with one, in none, or in
    all."""
    orders: Orders = "both"
    """`both`: every item is present with the two options in both orders, so that the preference for an order can be
    separated. `none`: no prompt names its options, so that there is no order."""
    better: Better = "higher"
    """Direction in which the metric improves."""
    title: str = ""
    """Name in tables and figures. Default: the metric's key."""
    chance: float | None = None
    """Value of random choices, marked by a line in the figures."""


class SuiteMetric(Section):
    """One figure of a suite of `delib-fast eval`, selected by its row and column."""

    kind: Literal["suite"]
    suite: str
    """Name of the suite."""
    row: str
    """First cell of the row, or its leading text cells, as in "all, response"."""
    column: str
    """Name of the column."""
    better: Better = "neither"
    """Direction in which the metric improves."""
    title: str = ""
    """Name in tables and figures. Default: the metric's key."""
    chance: float | None = None
    """Value of random choices, marked by a line in the figures."""

    @field_validator("suite")
    @classmethod
    def _known_suite(cls, value: str) -> str:
        if value not in SUITES:
            raise ValueError(f"{value!r} is not a suite{nearest(value, SUITES)}")
        return value


Metric = Annotated[ChoicesMetric | SuiteMetric, Field(discriminator="kind")]


class Contrast(Section):
    """A difference between two arms, paired by seed."""

    title: str
    """Name in the table of differences."""
    a: str
    """An arm as the tables name it, e.g. `MSM (thrift) + AFT (CoT)`; of several sizes, the largest."""
    b: str
    """The arm that is subtracted from `a`."""
    metric: str
    """Key of the metric."""
    expect: Literal["higher", "lower"] | None = None
    """Expected direction: whether the metric of `a` is higher or lower than that of `b`. Default: none is stated."""


class StudyConfig(Section):
    """A study: arms × AFT sizes × seeds."""

    title: str
    """Heading of the page."""
    out: FilePath
    """Folder of everything that the study writes: stages/, measures/, study.json, index.html, *.png."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] = Field(min_length=1)
    """Every arm is trained once per seed. A seed determines the weights, the order of the data, and `prepare`."""
    prepare: PrepareConfig | None = None
    """A script that makes data for each seed; {prepared} in a path under `run.data`, `metrics` or `evaluation` is its
    folder."""
    run: dict[str, Any]
    """What all runs share: model, tokenizer, data, engine and so on, as in the configuration of a run."""
    base: tuple[dict[str, Any], ...] = ()
    """Stages that every arm runs first. The arm `base` consists of them alone."""
    msm: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """MSM stages by name, one for each variant of the spec (rules, values and so on). Each has its own MSM arms."""
    aft: dict[str, Any] | None = None
    """The AFT stage; arms set its `cot` and `cot_weight`."""
    aft_variants: dict[Annotated[str, Field(min_length=1)], dict[str, Any]] = Field(default_factory=dict)
    """Further ways to train with CoT, by name: each replaces some keys of `aft`, and is an arm next to every `aft_cot`
    and `msm_aft_cot`, e.g. `AFT (CoT, NAME)`. A key whose value is a mapping replaces the whole mapping."""
    arms: tuple[ArmName, ...] = ARMS
    """Default: all arms that `msm` and `aft` make possible, except `aft_cot_only` and `msm_aft_cot_only`, which train
    on the CoT and not on the response."""
    aft_sizes: tuple[PositiveInt, ...] = ()
    """Numbers of rows of `sized` that AFT trains on, one arm per size. Default: all rows."""
    sized: str | None = None
    """The source that `aft_sizes` limits. Default: the first of `aft.train`. Other sources are used in full."""
    placebo: tuple[str, ...] = ()
    """Arms, as the tables name them, that are trained a second time: with the same data, and another seed in every
    stage after `base`. The difference between the two is what a change without effect looks like."""
    cot_weights: tuple[NonNegativeFloat, ...] = (1.0,)
    """Weights of a CoT token in the arms with CoT, one arm per weight. With 0 the CoT is in the context and not trained
    on."""
    metrics: dict[str, Metric] = Field(default_factory=dict)
    """What is measured of every arm, by name."""
    alignment: str | None = None
    """The metric of the curves, the bars and the frontier. Default: the first one."""
    monitorability: str | None = None
    """The metric on the second axis of the frontier."""
    contrasts: tuple[Contrast, ...] = ()
    """Differences between arms to report."""
    primary: str | None = None
    """Title of the contrast that decides the question of the study. `--freeze` needs it."""
    exclusions: tuple[str, ...] = ()
    """Rules by which seeds, rows or items are left out, one sentence each. They are recorded in the frozen plan and
    shown with the results; the study does not apply them."""
    evaluation: dict[str, Any] = Field(default_factory=dict)
    """Keys of an evaluation (rows, questions, limit and so on) for the metrics of kind `suite`."""
    published: bool = False
    """Also show published figures, each with its source."""
    workers: Literal["auto"] | PositiveInt = "auto"
    """Number of arms that are trained concurrently. Default: one per GPU, or one per CPU core."""

    _file: Path | None = PrivateAttr(default=None)

    @property
    def file(self) -> Path | None:
        """The file that the study was read from; its frozen plan is next to it."""
        return self._file

    @field_validator("run")
    @classmethod
    def _no_keys_of_the_study(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key, instead in _KEYS_SET_BY_THE_STUDY.items():
            if key in value:
                raise ValueError(f"{key} is set by the study (see {instead}); remove it")
        return value

    @field_validator("aft_variants")
    @classmethod
    def _train_with_cot(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, keys in value.items():
            for key in keys:
                if key in ("kind", "name", "cot"):
                    raise ValueError(f"{name}.{key} cannot vary: every variant is an AFT stage with its CoT; remove it")
        return value

    @field_validator("seeds", "aft_sizes", "cot_weights", "arms", "placebo")
    @classmethod
    def _no_duplicates(cls, value: Sequence[Any]) -> Sequence[Any]:
        duplicates = [item for item in value if value.count(item) > 1]
        if duplicates:
            raise ValueError(f"{duplicates[0]!r} is given twice")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> StudyConfig:
        self._resolve_arms()
        if self.aft is not None and self.aft_sizes:
            train = self.aft.get("train") or ["?"]
            self.sized = self.sized or train[0]
            if self.sized not in train:
                raise ValueError(f"sized names {self.sized!r}, which is not in aft.train{nearest(self.sized, train)}")
        if self.alignment is None and self.metrics:
            self.alignment = next(iter(self.metrics))
        named = [(key, getattr(self, key)) for key in ("alignment", "monitorability")]
        named += [(f"the contrast {contrast.title!r}", contrast.metric) for contrast in self.contrasts]
        for user, name in named:
            if name is not None and name not in self.metrics:
                raise ValueError(
                    f"{user} names the metric {name!r}, which is not under metrics:{nearest(name, self.metrics)}"
                )
        titled = [contrast.title for contrast in self.contrasts]
        if self.primary is not None and titled.count(self.primary) != 1:
            raise ValueError(
                f"primary names the contrast {self.primary!r}, and {titled.count(self.primary)} of contrasts: have "
                f"this title; it must be the title of exactly one{nearest(self.primary, titled)}"
            )
        without_aft = [arm for arm in self.arms if "aft" not in arm]
        for name, metric in self.metrics.items():
            if metric.kind == "suite" and metric.suite == "dose" and without_aft:
                raise ValueError(
                    f"metrics.{name} belongs to the suite dose, which measures an arm's AFT stage, and the arm "
                    f"{without_aft[0]} has none: list only arms with AFT under arms:, or remove the metric"
                )
        return self

    def _resolve_arms(self) -> None:
        if self.arms == ARMS:
            self.arms = tuple(arm for arm in ARMS if (self.msm or "msm" not in arm) and (self.aft or "aft" not in arm))
        if self.aft_variants and not {"aft_cot", "msm_aft_cot"} & set(self.arms):
            raise ValueError("aft_variants vary aft_cot and msm_aft_cot, and arms: has neither; add one of them")
        for arm in self.arms:
            for part, given in (("msm", self.msm), ("aft", self.aft)):
                if part in arm and not given:
                    raise ValueError(f"the arm {arm} needs {part}:, which is missing")
        if not self.base and "base" in self.arms and "path" not in self.run.get("model", {}):
            self.arms = tuple(arm for arm in self.arms if arm != "base")  # a model of random weights is not an arm


def load_study(path: str | os.PathLike[str], sets: Sequence[str] = (), **overrides: Any) -> StudyConfig:
    """Read the YAML file of a study; overrides that are not None, then `sets` (`key.sub=value`), replace its keys.

    Paths under run.data, run.model, run.tokenizer, stages, prepare, metrics and evaluation are relative to the folder
    of the file, except those that contain {prepared}; `out` is relative to the working directory.

    Raises:
        ConfigError: the file cannot be read, or a value is not valid; every fault is listed with its location.
    """
    study = load(StudyConfig, path, STUDY_FILE, sets, values=overrides)
    study._file = Path(path)
    return study
