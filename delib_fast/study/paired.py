"""The contrasts of a study, paired by the rows or items that both arms were measured on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from delib_fast.evals.paired import RowValues, paired_difference
from delib_fast.study.plan import Arm
from delib_fast.study.settings import StudyConfig
from delib_fast.study.summary import find_arm

Measured = Mapping[tuple[Arm, int], Mapping[str, Mapping[str, Any]]]
"""What `measure` wrote for each metric of each (arm, seed)."""


def paired_contrasts(study: StudyConfig, measured: Measured, arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """The contrasts of the study with intervals over rows, for the seeds that were trained.

    Such an interval exists with one seed too. It says whether the difference is the same for other rows, and not
    whether other seeds would show it. A contrast is left out if its metric has no number for each row (such as a rate
    of a classifier), or if its arms were measured on different rows.

    Raises ConfigError if a contrast names an arm that the study does not have.
    """
    found = []
    for contrast in study.contrasts:
        a, b = (find_arm(label, arms) for label in (contrast.a, contrast.b))
        pairs = []
        for seed in study.seeds:
            rows = [_rows(measured[arm, seed][contrast.metric]) for arm in (a, b)]
            if rows[0] is not None and rows[1] is not None:
                pairs.append((rows[0], rows[1]))
        difference = paired_difference(pairs) if len(pairs) == len(study.seeds) else None
        if difference is not None:
            names = {"title": contrast.title, "a": a.name, "b": b.name, "metric": contrast.metric}
            found.append({**names, "seeds": list(study.seeds), **asdict(difference)})
    return found


def _rows(measured: Mapping[str, Any]) -> RowValues | None:
    return RowValues.from_json(measured["rows"]) if "rows" in measured else None
