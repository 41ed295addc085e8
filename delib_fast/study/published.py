"""Published figures, to stand beside a study's own: each cell with the place in the paper where it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from delib_fast.config.load import read_yaml

_FILE = Path(__file__).parent / "published.yaml"


@dataclass(frozen=True, slots=True)
class Cell:
    """One published number."""

    table: str
    model: str
    column: str
    value: float | None
    """None: the paper gives none"""
    citation: str
    """e.g. "arXiv 2605.02087v2, Fig. 4, Qwen3-32B, MSM + AFT (CoT)" """


@dataclass(frozen=True, slots=True)
class Published:
    paper: str
    measure: str
    caution: str
    cells: tuple[Cell, ...]


def published() -> Published:
    """The figures of published.yaml."""
    tree = read_yaml(_FILE.read_text(encoding="utf-8"), where=str(_FILE))
    cells = [
        Cell(table["title"], model, column, value, f"arXiv 2605.02087v2, {table['source']}, {model}, {column}")
        for table in tree["tables"]
        for model, values in table["rows"].items()
        for column, value in zip(table["columns"], values, strict=True)
    ]
    return Published(tree["paper"], tree["measure"], tree["caution"], tuple(cells))
