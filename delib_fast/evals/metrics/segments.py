"""Held-out nll and accuracy, by segment, category and source."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from delib_fast.data import Row, Segment
from delib_fast.data.read.jsonl import HashingFile, read_items
from delib_fast.evals.intervals import Estimate, ratio
from delib_fast.evals.scoring import Scorer

_ORDER = {"all": 0, "source": 1, "category": 2}


@dataclass(frozen=True, slots=True)
class SegmentFigures:
    """Figures of one segment, over one group of rows."""

    by: str
    """"all", "source" or "category"."""
    group: str
    segment: str
    nll: Estimate
    """Σ nll / Σ tokens in nats per token, bootstrap by row."""
    accuracy: Estimate
    """Share of tokens that are the model's most likely one, bootstrap by row."""
    tokens: int


def segment_figures(
    scorer: Scorer, rows: Sequence[Row], categories: Mapping[str, Sequence[str]] | None = None
) -> list[SegmentFigures]:
    """Mean nll and next-token accuracy of CoT, response and document tokens of held-out rows.

        nll = Σ_rows Σ_t −log p(token_t | before) / Σ_rows tokens

    Args:
        rows: held-out rows; each is scored with its own chain of thought.
        categories: the categories of a row by its location (`categories_of`). A row counts in each of its categories.
    Limitations: a low nll means that the model writes like the held-out rows, not that it acts like them.
    """
    losses = scorer.losses(scorer.encode(rows))
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        groups["all", "all"].append(i)
        groups["source", row.source].append(i)
        for category in (categories or {}).get(row.location, ()):
            groups["category", category].append(i)
    figures = []
    for (by, group), members in sorted(groups.items(), key=lambda item: (_ORDER[item[0][0]], item[0][1])):
        for segment in (Segment.COT, Segment.RESPONSE, Segment.DOCUMENT):
            tokens = np.array([losses[i].tokens(segment) for i in members])
            if tokens.sum():
                nll = [losses[i].total(segment) for i in members]
                right = [losses[i].correct[losses[i].segments == segment].sum() for i in members]
                figures.append(
                    SegmentFigures(
                        by, group, segment.name.lower(), ratio(nll, tokens), ratio(right, tokens), int(tokens.sum())
                    )
                )
    return figures


def _fields_of(path: str | Path, field: str) -> dict[str, Any]:
    """A field of each object of a .jsonl or .json file, by the location (`file:line`) of its row."""
    path = Path(path)
    if path.suffix.lower() not in (".jsonl", ".ndjson", ".json"):
        return {}
    file = HashingFile(path)
    try:
        return {
            f"{path}:{item.line}": item.value[field]
            for item in read_items(file, path)
            if isinstance(item.value, dict) and field in item.value
        }
    finally:
        file.close()


def categories_of(path: str | Path, field: str = "category") -> dict[str, tuple[str, ...]]:
    """The categories of each row of a file, by its location. The field holds a name, or a list of names."""
    found = {}
    for location, value in _fields_of(path, field).items():
        names = value if isinstance(value, list) else [value]
        found[location] = tuple(str(name) for name in names)
    return found
