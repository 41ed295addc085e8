"""Summarize the measurements of a study: means over seeds, differences paired by seed, and data efficiency."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from delib_fast.config import ConfigError, nearest
from delib_fast.evals.extra import import_extra
from delib_fast.evals.intervals import Estimate
from delib_fast.study.efficiency import Multiple, multiples
from delib_fast.study.plan import Arm
from delib_fast.study.registration import UNREGISTERED, Registration, parts_of
from delib_fast.study.settings import ChoicesMetric, Metric, StudyConfig

Figures = Mapping[tuple[Arm, int], Mapping[str, Estimate]]
"""The estimate of each metric, for each (arm, seed)."""


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


def differences(
    study: StudyConfig, figures: Figures, arms: Sequence[Arm], registration: Registration = UNREGISTERED
) -> list[Difference]:
    """The contrasts of the study. Raises ConfigError if one names an arm that the study does not have.

    A frozen contrast is computed over the frozen seeds. If the study has further seeds, the same contrast over all of
    them follows, as an exploratory one.
    """
    found = []
    frozen = registration.seeds if registration.file is not None else study.seeds
    for contrast in study.contrasts:
        a, b = (find_arm(label, arms) for label in (contrast.a, contrast.b))
        reasons = registration.exploratory(*parts_of(contrast, (a.name, b.name)))
        for seeds in dict.fromkeys((frozen, study.seeds)):
            if not seeds:
                continue
            values = [figures[a, s][contrast.metric].value - figures[b, s][contrast.metric].value for s in seeds]
            found.append(
                Difference(
                    contrast.title if seeds == frozen else f"{contrast.title}, all seeds",
                    a.name,
                    b.name,
                    contrast.metric,
                    student(values),
                    tuple(values),
                    seeds,
                    contrast.title == study.primary and seeds == frozen,
                    contrast.expect,
                    tuple(reasons if seeds == frozen else [*reasons, "seeds were added after the plan was frozen"]),
                )
            )
    return found


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


def curves(study: StudyConfig, figures: Figures, arms: Sequence[Arm], metric: str) -> list[Curve]:
    """Compare each MSM + AFT with the corresponding AFT alone, if both have the same sizes and at least two."""
    higher = study.metrics[metric].better != "lower"
    found = []
    for label in dict.fromkeys(arm.label for arm in arms if arm.msm is not None and arm.size is not None):
        with_msm = sorted((a for a in arms if a.label == label), key=lambda a: a.size or 0)
        alone = sorted(
            (a for a in arms if a.msm is None and (a.aft, a.cot_weight) == (with_msm[0].aft, with_msm[0].cot_weight)),
            key=lambda a: a.size or 0,
        )
        sizes = [arm.size for arm in with_msm if arm.size is not None]
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
) -> dict[str, Any]:
    """The content of study.json, from which the page and the pictures are made."""
    return {
        "format": 1,
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
                "figures": {
                    name: {
                        "over seeds": asdict(over_seeds([figures[arm, s][name] for s in study.seeds], metric)),
                        "by seed": {str(s): asdict(figures[arm, s][name]) for s in study.seeds},
                    }
                    for name, metric in study.metrics.items()
                },
            }
            for arm in arms
        ],
        "contrasts": [asdict(d) for d in differences(study, figures, arms, registration)],
        "efficiency": {
            name: [asdict(c) for c in curves(study, figures, arms, name)]
            for name in study.metrics
            if len(study.aft_sizes) > 1 and study.metrics[name].better != "neither"
        },
        "cost": dict(cost),
    }
