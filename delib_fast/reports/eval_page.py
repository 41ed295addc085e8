"""The results of an evaluation, as tables of at most 80 columns for a terminal and as an HTML page."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup
from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from delib_fast import terminal
from delib_fast.evals.intervals import Estimate
from delib_fast.evals.results import Cell, Curve, SuiteResult, Table
from delib_fast.files import write_atomic
from delib_fast.reports.html import HtmlTable, render
from delib_fast.reports.samples import sample_views
from delib_fast.terminal import plain, printable

if TYPE_CHECKING:
    from delib_fast.evals.run import Evaluation

WIDTH = 80


def print_tables(evaluation: Evaluation, console: Console | None = None) -> None:
    """Print every table of every suite, 80 columns wide."""
    console = console or terminal.console(width=WIDTH)
    for result in evaluation.results:
        console.print(plain(f"\n{result.title}", "bold"))
        console.print(plain(result.note, "dim"))
        for table in result.tables:
            if table.rows:
                console.print(rich_table(table))
    for suite, reason in evaluation.skipped.items():
        console.print(plain(f"skipped {suite}: {reason}", "dim"))
    console.print(plain(f"95 % intervals: {interval_methods(evaluation.results)}.", "dim"))


def rich_table(table: Table) -> RichTable:
    """A table for a terminal. Numbers are not wrapped, and headings wrap between words.

    If it would be wider than 80 columns, the intervals are on a line of their own.
    """
    rich = RichTable(
        title=plain(table.title),
        title_justify="left",
        title_style="",
        pad_edge=False,
        padding=(0, 1),
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
    )
    numeric = _numeric_columns(table)
    texts = [[printable(cell_text(cell)) for cell in row] for row in table.rows]
    if sum(_least_widths(table, texts, numeric)) + 2 * len(table.columns) > WIDTH:
        texts = [[text.replace(" [", "\n[") for text in row] for row in texts]
    for k, (name, width) in enumerate(zip(table.columns, _least_widths(table, texts, numeric), strict=True)):
        heading = "\n".join(textwrap.wrap(printable(name), width)) if k in numeric else name
        rich.add_column(
            plain(heading),
            justify="right" if k in numeric else "left",
            overflow="fold",
            no_wrap=k in numeric,
            min_width=width,
        )
    for row in texts:
        rich.add_row(*map(plain, row))
    return rich


def _least_widths(table: Table, texts: Sequence[Sequence[str]], numeric: set[int]) -> list[int]:
    """The width that each column needs: of its widest number, and of the longest word of its heading and its texts."""
    widths = []
    for k, name in enumerate(table.columns):
        cells = [line for row in texts for line in (row[k].splitlines() if k in numeric else row[k].split())]
        widths.append(max(map(len, [*cells, *name.split()]), default=1))
    return widths


def _numeric_columns(table: Table) -> set[int]:
    return {k for k in range(len(table.columns)) if any(not isinstance(row[k], str) for row in table.rows)}


def cell_text(cell: Cell) -> str:
    """Format a cell, e.g. as "0.512 [0.430, 0.594]", with as many digits as the interval warrants."""
    if isinstance(cell, Estimate):
        if math.isnan(cell.value):
            return "–"
        if math.isnan(cell.low):
            return f"{cell.value:.3g} [–]"
        digits = _decimals(cell.high - cell.low, max(abs(cell.low), abs(cell.high)))
        return f"{cell.value:.{digits}f} [{cell.low:.{digits}f}, {cell.high:.{digits}f}]"
    if isinstance(cell, float):
        return "–" if math.isnan(cell) else f"{cell:.3g}"
    return "–" if cell is None else f"{cell:,}" if isinstance(cell, int) else cell


def cell_html(cell: Cell) -> Markup:
    """Format a cell as HTML. Hovering over an estimate shows its number of rows and its method."""
    value, _, interval = cell_text(cell).partition(" ")
    if not isinstance(cell, Estimate) or math.isnan(cell.value):
        return Markup.escape(cell_text(cell))
    title = f"n = {cell.n}, {cell.method}"
    return Markup('<span title="{}">{} <span class="interval">{}</span></span>').format(title, value, interval)


def _decimals(width: float, largest: float) -> int:
    """Decimals that show two digits of the interval's width, in numbers of at most four digits."""
    most = 3 if largest < 10 else max(0, 3 - math.floor(math.log10(largest)))
    return most if width <= 0 else min(most, max(0, 1 - math.floor(math.log10(width))))


def interval_methods(results: Sequence[SuiteResult]) -> str:
    """The methods that the intervals of these results were computed with."""
    cells = (cell for result in results for table in result.tables for row in table.rows for cell in row)
    return ", ".join(sorted({cell.method for cell in cells if isinstance(cell, Estimate)})) or "none"


# --- the page -----------------------------------------------------------------------------------------------


def write_page(evaluation: Evaluation) -> Path:
    """Write index.html to the folder of the results."""
    page = render(
        "eval.jinja",
        title=f"Evaluation of {Path(evaluation.target['model']).name}",
        target=evaluation.target,
        results=evaluation.results,
        skipped=evaluation.skipped,
        methods=interval_methods(evaluation.results),
        html_table=html_table,
        sample_views=sample_views,
        chart=chart,
        cell_text=cell_text,
    )
    path = evaluation.folder / "index.html"
    write_atomic(path, page)
    return path


def html_table(table: Table) -> HtmlTable:
    rows = [[cell_html(cell) for cell in row] for row in table.rows]
    return HtmlTable(table.columns, rows, table.title, _numeric_columns(table))


@dataclass(frozen=True)
class Chart:
    """A curve with its band of intervals, in pixels of an SVG."""

    curve: Curve
    points: list[tuple[float, float, float, Estimate]]
    """(x in pixels, y in pixels, x in data units, estimate)"""
    line: str
    band: str
    ticks: list[tuple[float, str]]
    """Heights of the horizontal grid lines, and their labels"""
    left: int = 56
    top: int = 12
    width: int = 480
    height: int = 200

    @property
    def labelled_points(self) -> list[tuple[float, float, float, Estimate]]:
        """At most about ten points that are labelled on the x axis."""
        return self.points[:: max(1, len(self.points) // 10)]


def chart(curve: Curve) -> Chart | None:
    """Lay out a curve; None if it has no finite point."""
    finite = [(x, e) for x, e in curve.points if not math.isnan(e.value)]
    if not finite:
        return None
    low = min(_finite(e.low, e.value) for _, e in finite)
    high = max(_finite(e.high, e.value) for _, e in finite)
    margin = (high - low) * 0.06 or abs(high) * 0.05 or 1.0
    bottom, top = low - margin, high + margin
    first, span = finite[0][0], (finite[-1][0] - finite[0][0]) or 1.0

    def at_x(x: float) -> float:
        return round(Chart.left + (x - first) / span * Chart.width, 1)

    def at_y(y: float) -> float:
        return round(Chart.top + (top - y) / (top - bottom) * Chart.height, 1)

    upper = [(at_x(x), at_y(_finite(e.high, e.value))) for x, e in finite]
    lower = [(at_x(x), at_y(_finite(e.low, e.value))) for x, e in finite]
    points = [(at_x(x), at_y(e.value), x, e) for x, e in finite]
    return Chart(
        curve,
        points,
        line=_path([(x, y) for x, y, *_ in points]),
        band=_path([*upper, *reversed(lower)]),
        ticks=[(at_y(value), f"{value:.3g}") for value in (low, (low + high) / 2, high)],
    )


def _finite(bound: float, value: float) -> float:
    return value if math.isnan(bound) else bound


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in points)
