"""The contrasts of a study, paired by the rows or items that both arms were measured on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from delib_fast.evals.paired import RowValues, paired_difference
from delib_fast.study.plan import Arm
from delib_fast.study.summary import find_arm

Measured = Mapping[tuple[Arm, int], Mapping[str, Mapping[str, Any]]]
"""What `measure` wrote for each metric of each (arm, seed)."""


def paired_contrasts(
    measured: Measured, arms: Sequence[Arm], contrasts: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The contrasts of a study with intervals over rows, for the seeds of each contrast.

    Such an interval exists with one seed too. It says whether the difference is the same for other rows, and not
    whether other seeds would show it. A contrast is left out if it is void, if its metric has no number for each row
    (such as a rate of a classifier), or if its arms were measured on different rows.

    Args:
        contrasts: the contrasts of study.json.
    """
    found = []
    for contrast in contrasts:
        a, b = (find_arm(contrast[side], arms) for side in ("a", "b"))
        pairs = []
        for seed in contrast["seeds"]:
            rows = [_rows(measured[arm, seed][contrast["metric"]]) for arm in (a, b)]
            if rows[0] is not None and rows[1] is not None:
                pairs.append((rows[0], rows[1]))
        difference = paired_difference(pairs) if len(pairs) == len(contrast["seeds"]) else None
        if difference is not None and not contrast["void"]:
            names = {key: contrast[key] for key in ("title", "a", "b", "metric", "seeds", "exploratory")}
            found.append({**names, **asdict(difference)})
    return found


def _rows(measured: Mapping[str, Any]) -> RowValues | None:
    return RowValues.from_json(measured["rows"]) if "rows" in measured else None
