"""The page of a study: one HTML file, its pictures inside it."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from delib_fast.evals.intervals import Estimate
from delib_fast.files import write_atomic
from delib_fast.reports.eval_page import PAGE_STYLE, cell_text
from delib_fast.reports.study_figures import largest, metric_title
from delib_fast.study.published import Cell
from delib_fast.study.published import published as published_figures

Tree = Mapping[str, Any]
_CAPTIONS = {
    "arms": "Arms at their largest AFT set. A pale point a seed; the mean with its 95 % interval.",
    "efficiency": "Over the size of the AFT set. Dashed: AFT alone.",
    "variants": "By spec variant.",
    "frontier": "Alignment against monitorability. A line joins the weights of the CoT in the loss.",
}


def write_page(summary: Tree, pictures: Sequence[Path], out: Path, *, published: bool) -> Path:
    """index.html in `out`: styles and pictures inside it, nothing loaded from anywhere."""
    cost = summary["cost"]
    parts = [
        f"<h1>{_text(summary['title'])}</h1>",
        f"<p>{_count(len(summary['arms']), 'arm')}, {_count(len(summary['seeds']), 'seed')} "
        f"({', '.join(map(str, summary['seeds']))}); {_count(cost['stages'], 'stage')} trained, where separate runs "
        f"would train {cost['stages_without_sharing']}. {_duration(cost['cpu_s'])} of processor time, "
        f"{_duration(cost['wall_s'])} in {_count(cost['sittings'], 'sitting')} with "
        f"{_count(cost['workers'], 'worker')} on {_count(cost['cores'], 'core')}.</p>",
        *map(_picture, pictures),
        _arms_table(summary),
        *_contrasts(summary),
        *_efficiency(summary),
        *(_published() if published else []),
        f"<footer>{_footer(summary)}</footer>",
    ]
    page = (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(summary['title'])}</title><style>{PAGE_STYLE}"
        "img { max-width: 100%; background: #fff; border-radius: 6px } figcaption { color: var(--soft) }"
        f" figure {{ margin: 0 0 1.5rem }}</style>\n{chr(10).join(parts)}\n</html>\n"
    )
    path = out / "index.html"
    write_atomic(path, page)
    return path


def markdown(summary: Tree) -> str:
    """The table of arms at their largest size, and the differences, for a page of documentation."""
    metrics = summary["metrics"]
    heads = ["arm", *(metric_title(*item) for item in metrics.items())]
    rows = [
        [arm["label"], *(estimate_text(arm["figures"][name]["over seeds"]) for name in metrics)]
        for arm in largest(summary["arms"])
    ]
    text = _markdown_table(heads, rows)
    if summary["contrasts"]:
        text += "\n" + _markdown_table(
            ["difference, paired by seed", "a", "b", "metric", "a − b", "by seed"],
            [
                [
                    c["title"],
                    c["a"],
                    c["b"],
                    metric_title(c["metric"], metrics[c["metric"]]),
                    estimate_text(c["estimate"]),
                    " ".join(f"{v:+.2f}" for v in c["by_seed"]),
                ]
                for c in summary["contrasts"]
            ],
        )
    cost = summary["cost"]
    return (
        f"{text}\n{_count(len(summary['seeds']), 'seed')}. {_count(cost['stages'], 'stage')} "
        f"({cost['stages_without_sharing']} without sharing), {_duration(cost['cpu_s'])} of processor time, "
        f"{_duration(cost['wall_s'])} with {_count(cost['workers'], 'worker')} on "
        f"{_count(cost['cores'], 'core')}.\n"
    )


def _markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    caption = _CAPTIONS[path.stem]
    return (
        f'<figure><img alt="{_text(caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{_text(caption)}</figcaption></figure>"
    )


def _arms_table(summary: Tree) -> str:
    metrics = summary["metrics"]
    sized = any(arm["size"] for arm in summary["arms"])
    heads = ["arm", *(["rows of AFT"] if sized else []), *(metric_title(*item) for item in metrics.items())]
    rows = []
    for arm in summary["arms"]:
        size = [] if not sized else ["" if arm["size"] is None else f"{arm['size']:,}"]
        rows.append([_text(arm["label"]), *size, *(_estimate(arm["figures"][name]["over seeds"]) for name in metrics)])
    return _table("Arms", heads, rows)


def _contrasts(summary: Tree) -> list[str]:
    if not summary["contrasts"]:
        return []
    rows = [
        [
            _text(c["title"]),
            _text(c["a"]),
            _text(c["b"]),
            _text(metric_title(c["metric"], summary["metrics"][c["metric"]])),
            _estimate(c["estimate"]),
            ", ".join(f"{v:+.2f}" for v in c["by_seed"]),
        ]
        for c in summary["contrasts"]
    ]
    return [_table("Differences, paired by seed", ["difference", "a", "b", "metric", "a − b", "by seed"], rows)]


def _efficiency(summary: Tree) -> list[str]:
    tables = []
    for name, curves in summary["efficiency"].items():
        title = metric_title(name, summary["metrics"][name])
        for curve in curves:
            rows = [[f"{p['rows']:,}", f"{p['level']:.3f}", multiple_text(p), _spread(p)] for p in curve["points"]]
            tables.append(
                _table(
                    f"{title}: {curve['title']}",
                    ["rows behind MSM", "level", "AFT alone needs", "over draws of seeds"],
                    rows,
                )
            )
    if tables:
        tables.insert(
            0,
            "<h2>Token efficiency</h2><p>How many times the rows AFT alone needs to reach the level of "
            "MSM + AFT, interpolated linearly in the logarithm of the rows.</p>",
        )
    return tables


def multiple_text(point: Tree) -> str:
    """40×; at most 2×; not reached (more than 8×)."""
    times = f"{point['multiple']:.3g}×"
    return {"": times, "at most": f"at most {times}", "more than": f"not reached (more than {times})"}[point["bound"]]


def _spread(point: Tree) -> str:
    if point["reached"] is None or point["reached"] != point["reached"]:
        return "–"
    low, high = (
        "not reached" if end is None or math.isinf(end) else f"{end:.3g}×" for end in (point["low"], point["high"])
    )
    interval = low if low == high else f"{low} to {high}"
    return f"{interval}; reached in {point['reached']:.0%}"


def _published() -> list[str]:
    found = published_figures()
    parts = [
        f"<h2>Published figures</h2><p>{_text(found.paper)}: {_text(found.measure)}</p><p><b>Caution.</b> "
        f"{_text(found.caution)}</p>"
    ]
    for title in dict.fromkeys(cell.table for cell in found.cells):
        cells = [cell for cell in found.cells if cell.table == title]
        columns = list(dict.fromkeys(cell.column for cell in cells))
        rows = [
            [_text(model), *(_cited(c) for c in cells if c.model == model)]
            for model in dict.fromkeys(c.model for c in cells)
        ]
        source = cells[0].citation.split(", ")[1]
        parts.append(_table(f"{title} ({source})", ["model", *columns], rows))
    return parts


def _cited(cell: Cell) -> str:
    value = "–" if cell.value is None else f"{cell.value:g}"
    return f'<span title="{_text(cell.citation)}">{value}</span>'


def _footer(summary: Tree) -> str:
    if len(summary["seeds"]) == 1:
        return "One seed: intervals are about which items were drawn; what another seed would give is not in them."
    return (
        f"Intervals are at 95 %: Student's t over {len(summary['seeds'])} seeds, each with its own weights, order "
        "of data and (where the study makes its data) items; cut off at 0 and 1 for shares."
    )


def estimate_text(tree: Tree) -> str:
    """0.512 [0.430, 0.594]."""
    value, low, high = (math.nan if tree[key] is None else tree[key] for key in ("value", "low", "high"))
    return cell_text(Estimate(value, low, high, tree["n"], tree["method"]))


def _estimate(tree: Tree) -> str:
    value, _, interval = estimate_text(tree).partition(" ")
    return f'<span title="n = {tree["n"]}, {_text(tree["method"])}">{value} <span class=ci>{interval}</span></span>'


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in heads)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="scroll"><table><caption>{_text(title)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _text(value: Any) -> str:
    return html.escape(str(value))
