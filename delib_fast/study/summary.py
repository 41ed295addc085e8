"""Summarize the measurements of a study: means over seeds, differences paired by seed, and data efficiency."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from delib_fast.config import ConfigError, nearest
from delib_fast.datagen.refusals import MEASURED
from delib_fast.evals.extra import import_extra
from delib_fast.evals.intervals import Estimate
from delib_fast.evals.metrics.forced_choices import OrderSplit
from delib_fast.evals.metrics.refusal import classifier_figures, read_labelled
from delib_fast.study.efficiency import Multiple, multiples
from delib_fast.study.plan import Arm
from delib_fast.study.registration import UNREGISTERED, Registration, parts_of
from delib_fast.study.settings import ChoicesMetric, Metric, StudyConfig, SuiteMetric

Figures = Mapping[tuple[Arm, int], Mapping[str, Estimate]]
"""The estimate of each metric, for each (arm, seed)."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What forced choices say besides their figure."""

    margin: Estimate
    """Mean of log p(a) − log p(b), nats: how clear the choices are, next to how often they are made."""
    split: OrderSplit | None
    """None if the prompts do not name the options."""


Choices = Mapping[tuple[Arm, int], Mapping[str, Choice]]
"""The `Choice` of each metric of kind `choices`, for each (arm, seed)."""


@dataclass(frozen=True, slots=True)
class Placebo:
    """The difference between an arm and the same arm trained with another seed, paired by seed."""

    arm: str
    metric: str
    estimate: Estimate
    by_seed: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Curve:
    """MSM + AFT compared with AFT alone over the size of the AFT set."""

    title: str
    msm: str
    points: tuple[Multiple, ...]


@dataclass(frozen=True, slots=True)
class Difference:
    """The difference of two arms, paired by seed."""

    title: str
    a: str
    b: str
    metric: str
    estimate: Estimate
    by_seed: tuple[float, ...]
    seeds: tuple[int, ...]
    primary: bool
    expect: str | None
    """The expected direction, "higher" or "lower"; None if none was stated."""
    verdict: str
    """"void", "no interval", "null" (the interval contains 0), "higher" or "lower"."""
    floor: float
    """The smallest difference that the study detects; NaN if it is not known. See `detection_floor`."""
    placebo: Placebo | None
    """The placebo of `a`, else that of `b`, else the first of the study; None without placebo arms."""
    void: tuple[str, ...]
    """The arms whose forced choices are void."""
    exploratory: tuple[str, ...]
    """Why the difference is exploratory; () if it is as it was frozen."""


def over_seeds(values: Sequence[Estimate], metric: Metric | None = None) -> Estimate:
    """The mean over seeds with the interval of Student's t; with one seed, or the same value in each,
    the interval over its rows.

        mean ± t(0.975, n − 1) · s / √n

    Each seed has its own weights, order of the data and (with `prepare`) data and items, so the spread between seeds
    reflects all of these. The intervals of shares and probabilities are clipped to [0, 1].
    """
    if len({value.value for value in values}) == 1:  # one seed, or one model, such as that of an arm without stages
        return values[0]
    found = student([value.value for value in values])
    if isinstance(metric, ChoicesMetric) and metric.figure != "margin":
        return Estimate(found.value, max(0.0, found.low), min(1.0, found.high), found.n, found.method)
    return found


def student(values: Sequence[float]) -> Estimate:
    """The mean of a few numbers with the interval of Student's t; NaN for the interval of a single number."""
    n, array = len(values), np.asarray(values, np.float64)
    centre = float(array.mean())
    if n < 2:
        return Estimate(centre, math.nan, math.nan, n, "t over seeds")
    stats = import_extra("scipy.stats")
    half = float(stats.t.ppf(0.975, n - 1) * stats.sem(array))
    return Estimate(centre, centre - half, centre + half, n, "t over seeds")


def detection_floor(values: Sequence[float]) -> float:
    """The smallest true difference that is detected with 80 % power at a two-sided level of 5 %.

        floor = (t(0.975, n − 1) + t(0.8, n − 1)) · s / √n

    where s is the standard deviation of the n differences by seed. This is the minimum detectable effect of Bloom,
    "Minimum detectable effects" (Evaluation Review 19(5), 1995). s is estimated from the same few seeds, so the floor
    is uncertain too. NaN for a single number, and for equal numbers, which say nothing about their spread.
    """
    n = len(values)
    if len(set(values)) < 2:
        return math.nan
    stats = import_extra("scipy.stats")
    return float((stats.t.ppf(0.975, n - 1) + stats.t.ppf(0.8, n - 1)) * stats.sem(np.asarray(values, np.float64)))


def over_seeds_split(choices: Choices, arm: Arm, metric: str, seeds: Sequence[int]) -> OrderSplit | None:
    """Content and habit of a cell: their means over the seeds. None if the metric has no order of options."""
    found = [choices[arm, seed][metric].split for seed in seeds if metric in choices.get((arm, seed), {})]
    splits = [split for split in found if split is not None]
    if not splits:
        return None
    return OrderSplit(*(float(np.mean([getattr(s, key) for s in splits])) for key in ("content", "habit")))


def is_void(choices: Choices, arm: Arm, metric: str, seeds: Sequence[int]) -> bool:
    """Whether the forced choices of a cell depend more on the order of the options than on the options."""
    split = over_seeds_split(choices, arm, metric, seeds)
    return split is not None and split.void


def placebos(study: StudyConfig, figures: Figures, arms: Sequence[Arm]) -> list[Placebo]:
    """Each placebo arm compared with its arm, in every metric: arm − the same arm with another seed."""
    found = []
    for placebo in (arm for arm in arms if arm.placebo):
        arm = replace(placebo, placebo=False)
        for metric in study.metrics:
            values = [figures[arm, s][metric].value - figures[placebo, s][metric].value for s in study.seeds]
            found.append(Placebo(arm.name, metric, student(values), tuple(values)))
    return found


def differences(
    study: StudyConfig,
    figures: Figures,
    arms: Sequence[Arm],
    registration: Registration = UNREGISTERED,
    choices: Choices = MappingProxyType({}),
) -> list[Difference]:
    """The contrasts of the study. Raises ConfigError if one names an arm that the study does not have.

    A frozen contrast is computed over the frozen seeds. If the study has further seeds, the same contrast over all of
    them follows, as an exploratory one.
    """
    found = []
    frozen = registration.seeds if registration.file is not None else study.seeds
    of_placebo = placebos(study, figures, arms)
    for contrast in study.contrasts:
        a, b = (find_arm(label, arms) for label in (contrast.a, contrast.b))
        reasons = registration.exploratory(*parts_of(contrast, (a.name, b.name)))
        for seeds in dict.fromkeys((frozen, study.seeds)):
            if not seeds:
                continue
            values = [figures[a, s][contrast.metric].value - figures[b, s][contrast.metric].value for s in seeds]
            estimate = student(values)
            void = tuple(arm.name for arm in (a, b) if is_void(choices, arm, contrast.metric, seeds))
            found.append(
                Difference(
                    contrast.title if seeds == frozen else f"{contrast.title}, all seeds",
                    a.name,
                    b.name,
                    contrast.metric,
                    estimate,
                    tuple(values),
                    seeds,
                    contrast.title == study.primary and seeds == frozen,
                    contrast.expect,
                    _verdict(estimate, void),
                    detection_floor(values),
                    _nearest_placebo([p for p in of_placebo if p.metric == contrast.metric], a.name, b.name),
                    void,
                    tuple(reasons if seeds == frozen else [*reasons, "seeds were added after the plan was frozen"]),
                )
            )
    return found


def _verdict(estimate: Estimate, void: Sequence[str]) -> str:
    if void:
        return "void"
    if math.isnan(estimate.low):
        return "no interval"
    return "higher" if estimate.low > 0 else "lower" if estimate.high < 0 else "null"


def _nearest_placebo(found: Sequence[Placebo], *arms: str) -> Placebo | None:
    by_arm = {placebo.arm: placebo for placebo in found}
    return next((by_arm[arm] for arm in arms if arm in by_arm), next(iter(found), None))


def find_arm(label: str, arms: Sequence[Arm]) -> Arm:
    """Find an arm by its label, or by its name with the number of rows. Among several sizes, the largest is returned.

    Raises ConfigError if there is no such arm.
    """
    named = [arm for arm in arms if label in (arm.label, arm.name)]
    if not named:
        labels = list(dict.fromkeys(arm.label for arm in arms))
        raise ConfigError(
            f"a contrast names the arm {label!r}, which is not in the study{nearest(label, labels)}; "
            f"its arms are {'; '.join(labels)}"
        )
    return max(named, key=lambda arm: arm.size or 0)


def curves(
    study: StudyConfig,
    figures: Figures,
    arms: Sequence[Arm],
    metric: str,
    choices: Choices = MappingProxyType({}),
) -> list[Curve]:
    """Compare each MSM + AFT with the corresponding AFT alone, if both have the same sizes and at least two.

    A curve with a void cell is left out.
    """
    arms = [arm for arm in arms if not arm.placebo]
    higher = study.metrics[metric].better != "lower"
    found = []
    for label in dict.fromkeys(arm.label for arm in arms if arm.msm is not None and arm.size is not None):
        with_msm = sorted((a for a in arms if a.label == label), key=lambda a: a.size or 0)
        alone = sorted(
            (a for a in arms if a.msm is None and (a.aft, a.cot_weight) == (with_msm[0].aft, with_msm[0].cot_weight)),
            key=lambda a: a.size or 0,
        )
        sizes = [arm.size for arm in with_msm if arm.size is not None]
        if any(is_void(choices, arm, metric, study.seeds) for arm in (*with_msm, *alone)):
            continue
        if len(sizes) < 2 or [arm.size for arm in alone] != sizes:
            continue
        with_msm_values, alone_values = (
            np.array([[figures[arm, seed][metric].value for arm in side] for seed in study.seeds])
            for side in (with_msm, alone)
        )
        found.append(
            Curve(
                f"{label} against {alone[0].label}",
                str(with_msm[0].msm),
                tuple(multiples(sizes, with_msm_values, alone_values, higher=higher)),
            )
        )
    return found


def summarize(
    study: StudyConfig,
    figures: Figures,
    arms: Sequence[Arm],
    cost: Mapping[str, Any],
    registration: Registration = UNREGISTERED,
    choices: Choices = MappingProxyType({}),
) -> dict[str, Any]:
    """The content of study.json, from which the page and the pictures are made."""
    return {
        "format": 2,
        "title": study.title,
        "seeds": study.seeds,
        "alignment": study.alignment,
        "monitorability": study.monitorability,
        "preregistration": registration.to_data(study),
        "metrics": {
            name: {**metric.model_dump(mode="json"), "exploratory": registration.exploratory(f"metric {name}")}
            for name, metric in study.metrics.items()
        },
        "arms": [
            {
                "name": arm.name,
                "label": arm.label,
                "msm": arm.msm,
                "aft": arm.aft,
                "cot_weight": arm.cot_weight,
                "size": arm.size,
                "exploratory": registration.exploratory(f"arm {arm.name}"),
                "placebo": arm.placebo,
                "figures": {
                    name: {
                        "over seeds": asdict(over_seeds([figures[arm, s][name] for s in study.seeds], metric)),
                        "by seed": {str(s): asdict(figures[arm, s][name]) for s in study.seeds},
                        **_choice_data(study, choices, arm, name),
                    }
                    for name, metric in study.metrics.items()
                },
            }
            for arm in arms
        ],
        "contrasts": [asdict(d) for d in differences(study, figures, arms, registration, choices)],
        "placebos": [asdict(p) for p in placebos(study, figures, arms)],
        "efficiency": {
            name: [asdict(c) for c in curves(study, figures, arms, name, choices)]
            for name in study.metrics
            if len(study.aft_sizes) > 1 and study.metrics[name].better != "neither"
        },
        "notes": _error_notes(study),
        "cost": dict(cost),
    }


def _error_notes(study: StudyConfig) -> list[str]:
    """The errors of the classifiers that the figures depend on."""
    if not any(isinstance(metric, SuiteMetric) and metric.suite == "refusal" for metric in study.metrics.values()):
        return []
    labelled = study.evaluation.get("refusal_labelled")
    if study.evaluation.get("judge"):
        known = "is in the results of each arm" if labelled else "is not known: set evaluation.refusal_labelled"
        return [f"Refusals: a judge classifies the replies; its error {known}."]
    error = MEASURED if not labelled else classifier_figures(read_labelled(labelled)).measured("evaluation's labels")
    return [f"Refusals: {error.text()}"]


def _choice_data(study: StudyConfig, choices: Choices, arm: Arm, metric: str) -> dict[str, Any]:
    """For a metric of kind `choices`: the margin, content and habit of a cell, and whether it is void."""
    by_seed = {seed: choices[arm, seed][metric] for seed in study.seeds if metric in choices.get((arm, seed), {})}
    if not by_seed:
        return {}
    split = over_seeds_split(choices, arm, metric, study.seeds)
    return {
        "margin": asdict(over_seeds([choice.margin for choice in by_seed.values()])),
        "content": None if split is None else split.content,
        "habit": None if split is None else split.habit,
        "void": split is not None and split.void,
        "void_seeds": [seed for seed, choice in by_seed.items() if choice.split is not None and choice.split.void],
    }
