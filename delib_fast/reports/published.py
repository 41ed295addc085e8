"""Published figures to compare a study with: every cell cites its location in the paper."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from delib_fast.config.load import read_yaml

_FILE = Path(__file__).parent / "published.yaml"


@dataclass(frozen=True, slots=True)
class PublishedFigure:
    """One published number."""

    table: str
    model: str
    column: str
    value: float | None
    """None if the paper does not give it."""
    rows_are: str
    """What the rows of its table are, "model" or "evaluation"; their names are in `model`."""
    citation: str
    """For example "arXiv 2605.02087v2, Fig. 4, Qwen3-32B, MSM + AFT (CoT)"."""


@dataclass(frozen=True, slots=True)
class Published:
    """All published figures, with what they measure and how far they can be compared."""

    paper: str
    measure: str
    caution: str
    figures: tuple[PublishedFigure, ...]


def read_published() -> Published:
    """Read published.yaml."""
    tree = read_yaml(_FILE.read_text(encoding="utf-8"), where=str(_FILE))
    figures = [
        PublishedFigure(
            table["title"],
            model,
            column,
            value,
            table.get("rows_are", "model"),
            f"arXiv 2605.02087v2, {table['source']}, {model}, {column}",
        )
        for table in tree["tables"]
        for model, values in table["rows"].items()
        for column, value in zip(table["columns"], values, strict=True)
    ]
    return Published(tree["paper"], tree["measure"], tree["caution"], tuple(figures))
