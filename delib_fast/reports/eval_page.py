"""Results for a person: tables of 80 columns in a terminal, and one page that needs nothing else."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from delib_fast.evals.intervals import Estimate
from delib_fast.evals.results import Cell, Curve, SuiteResult, Table
from delib_fast.evals.run import Evaluation
from delib_fast.files import write_atomic

WIDTH = 80


def print_tables(evaluation: Evaluation, console: Console | None = None) -> None:
    """Every table of every suite, to 80 columns."""
    console = console or Console(width=WIDTH, highlight=False)
    for result in evaluation.results:
        console.print(Text(f"\n{result.title}", style="bold"))
        console.print(Text(result.note), style="dim")
        for table in result.tables:
            console.print(_rich(table))
    for suite, reason in evaluation.skipped.items():
        console.print(Text(f"left out: {suite}: {reason}", style="dim"))
    console.print(Text(f"95 % intervals: {methods(evaluation.results)}.", style="dim"))


def _rich(table: Table) -> RichTable:
    rich = RichTable(
        title=table.title,
        title_justify="left",
        title_style="",
        pad_edge=False,
        padding=(0, 1),
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
    )
    for k, name in enumerate(table.columns):
        numeric = any(not isinstance(row[k], str) for row in table.rows)
        rich.add_column(name, justify="right" if numeric else "left", overflow="fold", no_wrap=numeric)
    for row in table.rows:
        rich.add_row(*map(cell_text, row))
    return rich


def cell_text(cell: Cell) -> str:
    """0.512 [0.430, 0.594], with as many digits as the interval deserves."""
    if isinstance(cell, Estimate):
        if math.isnan(cell.value):
            return "–"
        if math.isnan(cell.low):
            return f"{cell.value:.3g} [–]"
        digits = _digits(cell.high - cell.low, max(abs(cell.low), abs(cell.high)))
        return f"{cell.value:.{digits}f} [{cell.low:.{digits}f}, {cell.high:.{digits}f}]"
    if isinstance(cell, float):
        return "–" if math.isnan(cell) else f"{cell:.3g}"
    return "–" if cell is None else f"{cell:,}" if isinstance(cell, int) else cell


def _digits(width: float, largest: float) -> int:
    """Two digits of the interval's width are told, but never more than four digits in all."""
    most = 3 if largest < 10 else max(0, 3 - math.floor(math.log10(largest)))
    return most if width <= 0 else min(most, max(0, 1 - math.floor(math.log10(width))))


def methods(results: Sequence[SuiteResult]) -> str:
    """Which methods the intervals of these results were made by."""
    found = {
        cell.method
        for result in results
        for table in result.tables
        for row in table.rows
        for cell in row
        if isinstance(cell, Estimate)
    }
    return ", ".join(sorted(found)) or "none"


# --- page ---------------------------------------------------------------------------------------------------

PAGE_STYLE = """
:root { --ink: #1c2024; --soft: #60646c; --line: #e0e2e6; --fill: #f7f8fa; --mark: #2f6feb; --page: #fff }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --soft: #a0a6b0; --line: #33383f; --fill: #1d2126; --mark: #7aa7ff; --page: #14171a } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 60rem; padding: 2rem 1.25rem 4rem; color: var(--ink); background: var(--page);
  font: 15px/1.55 system-ui, sans-serif }
h1 { font-size: 1.5rem; margin: 0 0 .25rem } h2 { font-size: 1.15rem; margin: 2.5rem 0 .25rem }
p { color: var(--soft); margin: .25rem 0 1rem; max-width: 46rem } code { font-size: .9em }
.scroll { overflow-x: auto } table { border-collapse: collapse; margin: .25rem 0 1.25rem; font-size: .92rem }
caption { text-align: left; white-space: nowrap; font-weight: 600; padding: .25rem 0 }
th, td { padding: .3rem .9rem .3rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: middle }
th { color: var(--soft); font-weight: 500 } .n { text-align: right; font-variant-numeric: tabular-nums }
td .ci { color: var(--soft); font-size: .86em; white-space: nowrap } svg { display: block; max-width: 100% }
nav a { color: var(--mark); margin-right: .9rem; text-decoration: none } footer { margin-top: 3rem; color: var(--soft) }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif }
"""


def write_page(evaluation: Evaluation) -> Path:
    """index.html in the folder of the results: styles and pictures inside it, nothing loaded from anywhere."""
    facts = evaluation.target
    base = f" against <code>{html.escape(str(facts['base']))}</code>" if facts["base"] else ""
    links = " ".join(f'<a href="#{r.suite}">{html.escape(r.title)}</a>' for r in evaluation.results)
    left_out = "".join(
        f"<p>Left out: <b>{html.escape(suite)}</b>: {html.escape(why)}</p>"
        for suite, why in evaluation.skipped.items()
    )
    page = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Evaluation of {html.escape(Path(facts["model"]).name)}</title><style>{PAGE_STYLE}</style>
<h1>Evaluation</h1>
<p><code>{html.escape(facts["model"])}</code>{base}<br>weights {html.escape(facts["sha256"][:16])}</p>
<nav>{links}</nav>
{"".join(map(_section, evaluation.results))}
{left_out}
<footer>Intervals are at 95 %: {html.escape(methods(evaluation.results))}. They are about which rows were drawn; what
another training seed would give is not in them.</footer>
</html>
"""
    path = evaluation.folder / "index.html"
    write_atomic(path, page)
    return path


def _section(result: SuiteResult) -> str:
    parts = [f'<section id="{result.suite}"><h2>{html.escape(result.title)}</h2><p>{html.escape(result.note)}</p>']
    parts += [_svg(curve) for curve in result.curves if curve.points]
    parts += [_html_table(table) for table in result.tables]
    return "".join(parts) + "</section>"


def _html_table(table: Table) -> str:
    numeric = [any(not isinstance(row[k], str) for row in table.rows) for k in range(len(table.columns))]
    tags = ["<th class=n>" if flag else "<th>" for flag in numeric]
    head = "".join(f"{tag}{html.escape(name)}</th>" for tag, name in zip(tags, table.columns, strict=True))
    body = "".join(
        "<tr>" + "".join(_html_cell(cell, flag) for cell, flag in zip(row, numeric, strict=True)) + "</tr>"
        for row in table.rows
    )
    return (
        f'<div class="scroll"><table><caption>{html.escape(table.title)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _html_cell(cell: Cell, numeric: bool) -> str:
    if isinstance(cell, Estimate) and not math.isnan(cell.value):
        value, _, interval = cell_text(cell).partition(" ")
        title = html.escape(f"n = {cell.n}, {cell.method}")
        return f'<td class=n title="{title}">{value} <span class=ci>{interval}</span></td>'
    return f"<td{' class=n' if numeric else ''}>{html.escape(cell_text(cell))}</td>"


def _svg(curve: Curve) -> str:
    """A line with its band of intervals."""
    left, top, wide, high = 56, 12, 480, 200
    finite = [(x, e) for x, e in curve.points if not math.isnan(e.value)]
    if not finite:
        return ""
    lows, highs = min(e.low for _, e in finite), max(e.high for _, e in finite)
    margin = (highs - lows) * 0.06 or abs(highs) * 0.05 or 1.0
    lows, highs = lows - margin, highs + margin
    first, last = finite[0][0], finite[-1][0]

    def at(x: float, y: float) -> str:
        return (
            f"{left + (x - first) / ((last - first) or 1) * wide:.1f},{top + (highs - y) / (highs - lows) * high:.1f}"
        )

    band = " ".join([at(x, e.high) for x, e in finite] + [at(x, e.low) for x, e in reversed(finite)])
    line = " ".join(at(x, e.value) for x, e in finite)
    dots = "".join(
        f'<circle cx="{(p := at(x, e.value).split(","))[0]}" cy="{p[1]}" r="3" fill="var(--mark)">'
        f"<title>{x:g}: {html.escape(cell_text(e))}</title></circle>"
        for x, e in finite
    )
    ticks = "".join(
        f'<line x1="{left}" x2="{left + wide}" y1="{(y := at(first, v).split(",")[1])}" y2="{y}" '
        f'stroke="var(--line)"/><text x="{left - 8}" y="{float(y) + 4:.1f}" text-anchor="end">{v:.4g}'
        "</text>"
        for v in (lows + margin, (lows + highs) / 2, highs - margin)
    )
    labels = "".join(
        f'<text x="{at(x, lows).split(",")[0]}" y="{top + high + 18}" text-anchor="middle">{x:g}</text>'
        for x, _ in finite[:: max(1, len(finite) // 10)]
    )
    name = html.escape(f"{curve.title}: {curve.y}, by {curve.x}")
    return (
        f'<figure style="margin:0 0 1rem"><svg role="img" aria-label="{name}" viewBox="0 0 560 256" width="560">'
        f'{ticks}{labels}<polygon points="{band}" fill="var(--mark)" opacity=".16"/>'
        f'<polyline points="{line}" fill="none" stroke="var(--mark)" stroke-width="2"/>{dots}'
        f'<text x="{left}" y="{top + high + 38}">{html.escape(curve.y)}, by {html.escape(curve.x)}</text></svg>'
        "</figure>"
    )
