"""The page of a study, and its tables in Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from delib_fast.data.corpus import monitoring_warning
from delib_fast.evals.replies import sample_from_json
from delib_fast.files import write_atomic
from delib_fast.reports.corpora import corpora_table, mismatch_text, mismatches
from delib_fast.reports.html import HtmlTable, Picture, render
from delib_fast.reports.published import Published, PublishedFigure, read_published
from delib_fast.reports.samples import sample_views
from delib_fast.reports.study_figures import largest, metric_title
from delib_fast.reports.study_tables import (
    CONTRAST_COLUMNS,
    by_seed_text,
    cell,
    cell_words,
    choices_tables,
    contrast_names,
    contrasts_table,
    estimate_html,
    estimate_text,
    explanations,
    exploratory_mark,
    floor_text,
    placebos_table,
    verdict_text,
)

Tree = Mapping[str, Any]


def write_page(summary: Tree, pictures: Sequence[Picture], out: Path, *, published: bool) -> Path:
    """Write index.html to `out`.

    Args:
        summary: the content of study.json.
        published: whether to show published figures too.
    """
    found = read_published() if published else None
    page = render(
        "study.jinja",
        title=summary["title"],
        wide=True,
        overview=_overview(summary),
        registration=registration_lines(summary["preregistration"]),
        pictures=pictures,
        tables=[
            _arms_table(summary),
            *choices_tables(summary),
            *([contrasts_table(summary)] if summary["contrasts"] else []),
            *([_paired_table(summary)] if summary.get("paired") else []),
            *([placebos_table(summary)] if summary["placebos"] else []),
        ],
        explanations=explanations(summary),
        corpora=corpora_table(summary["corpora"]) if summary.get("corpora") else None,
        corpora_verdict=_corpora_verdict(summary.get("corpora") or {}),
        samples={
            metric_title(name, summary["metrics"][name]): sample_views([sample_from_json(tree) for tree in trees])
            for name, trees in (summary.get("samples") or {}).items()
        },
        efficiency=_efficiency_tables(summary),
        published=found,
        published_tables=[] if found is None else _published_tables(found),
        note=_note(summary),
    )
    path = out / "index.html"
    write_atomic(path, page)
    return path


def registration_lines(tree: Tree | None) -> list[str]:
    """What a reader must know about the preregistration of a study, one sentence each.

    Args:
        tree: the part `preregistration` of study.json.
    """
    if tree is None:
        return ["This study was not preregistered: every result is exploratory."]
    when = (
        "before the first of its stages was trained"
        if tree["before_training"]
        else f"after {len(tree['started_before'])} of its stages had been started"
        if tree["started_before"]
        else f"after its first stage had begun to train, on {tree['first_stage_at']}"
    )
    lines = [f"The plan {tree['plan'][:12]} was frozen on {tree['frozen_at']}, {when} ({tree['file']})."]
    lines += [f"Exclusions: {' '.join(tree['exclusions'])}"] if tree["exclusions"] else []
    differences = [f"{word}: {'; '.join(tree[word])}" for word in ("added", "changed", "removed") if tree[word]]
    lines.append(
        f"Since then, {'. '.join(differences)}. Results that depend on this are marked as exploratory."
        if differences
        else "Nothing was changed since then."
    )
    if any(part.startswith("seed ") for part in tree["added"]):
        lines.append(
            "The figures of the arms are over all seeds; differences are over the frozen ones, except as noted."
        )
    return lines


_METRICS_PER_TABLE = 6


def markdown(summary: Tree) -> str:
    """The arms at their largest size and the differences, as Markdown tables for a page of documentation."""
    metrics = summary["metrics"]
    names, tables = list(metrics), []
    for shown in (names[i : i + _METRICS_PER_TABLE] for i in range(0, max(1, len(names)), _METRICS_PER_TABLE)):
        columns = ["arm", *(metric_title(name, metrics[name]) for name in shown)]
        rows = [[arm["label"], *(cell_words(arm["figures"][n]) for n in shown)] for arm in largest(summary["arms"])]
        tables.append(_markdown_table(columns, rows))
    text = "\n".join(tables)
    if summary["contrasts"]:
        contrast_rows = [
            [
                *contrast_names(c, metrics),
                "void" if c["void"] else estimate_text(c["estimate"]),
                by_seed_text(c, " "),
                verdict_text(c),
                floor_text(c),
                "–" if c["placebo"] is None else estimate_text(c["placebo"]["estimate"]),
            ]
            for c in summary["contrasts"]
        ]
        text += "\n" + _markdown_table(CONTRAST_COLUMNS, contrast_rows)
    if summary.get("paired"):
        paired = [[*row[:4], estimate_text(row[4]), row[5]] for row in _paired_rows(summary)]
        text += "\n" + _markdown_table(_PAIRED_COLUMNS, paired)
    text += "\n" + " ".join(registration_lines(summary["preregistration"])) + "\n"
    cost = summary["cost"]
    return (
        f"{text}\n{_count(len(summary['seeds']), 'seed')}. {_count(cost['stages'], 'stage')} "
        f"({cost['stages_without_sharing']} without sharing), {_duration(cost['cpu_s'])} of processor time, "
        f"{_duration(cost['wall_s'])} with {_count(cost['workers'], 'worker')} on "
        f"{_count(cost['cores'], 'core')}.\n" + "".join(f"\n{note}\n" for note in summary.get("notes", ()))
    )


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _overview(summary: Tree) -> str:
    cost = summary["cost"]
    return (
        f"{_count(len(summary['arms']), 'arm')}, {_count(len(summary['seeds']), 'seed')} "
        f"({', '.join(map(str, summary['seeds']))}). {_count(cost['stages'], 'stage')} trained; separate runs would "
        f"train {cost['stages_without_sharing']}. {_duration(cost['cpu_s'])} of processor time, "
        f"{_duration(cost['wall_s'])} in {_count(cost['sittings'], 'session')} with "
        f"{_count(cost['workers'], 'worker')} on {_count(cost['cores'], 'core')}."
    )


def _arms_table(summary: Tree) -> HtmlTable:
    metrics = summary["metrics"]
    sized = any(arm["size"] for arm in summary["arms"])
    titles = (metric_title(name, metric) + exploratory_mark(summary, metric) for name, metric in metrics.items())
    columns = ["arm", *(["AFT rows"] if sized else []), *titles]
    rows = []
    for arm in summary["arms"]:
        size = [] if not sized else ["" if arm["size"] is None else f"{arm['size']:,}"]
        rows.append(
            [
                arm["label"] + exploratory_mark(summary, arm),
                *size,
                *(cell(arm["figures"][name]) for name in metrics),
            ]
        )
    return HtmlTable(columns, rows, "Arms", range(1, len(columns)))


_PAIRED_COLUMNS = ["difference, paired by row", "a", "b", "metric", "a − b", "rows with this sign"]


def _paired_rows(summary: Tree) -> list[list[Any]]:
    return [
        [
            p["title"] + exploratory_mark(summary, p),
            *contrast_names(p, summary["metrics"])[1:],
            p["estimate"],
            f"{p['agreeing']} of {p['rows']}",
        ]
        for p in summary.get("paired") or ()
    ]


def _paired_table(summary: Tree) -> HtmlTable:
    rows = [[*row[:4], estimate_html(row[4]), row[5]] for row in _paired_rows(summary)]
    title = "Differences, paired by row: intervals over rows, for the seeds that were trained"
    return HtmlTable(["difference", *_PAIRED_COLUMNS[1:]], rows, title, numeric={4, 5})


def _corpora_verdict(corpora: Tree) -> str:
    """Whether the documents of the MSM variants have the same amount of text, and whether any are on monitoring."""
    sizes = mismatch_text(mismatches(corpora)) if len(corpora) > 1 else ""
    warnings = [f"{name}: {text}" for name, corpus in corpora.items() if (text := monitoring_warning(corpus))]
    return " ".join([sizes, *warnings]).strip()


def _efficiency_tables(summary: Tree) -> list[HtmlTable]:
    columns = ["AFT rows after MSM", "level", "AFT alone needs", "95 % of draws of seeds", "reached in"]
    return [
        HtmlTable(
            columns,
            [
                [f"{p['rows']:,}", f"{p['level']:.3f}", multiple_text(p), _interval_text(p), _reached_text(p)]
                for p in curve["points"]
            ],
            f"{metric_title(name, summary['metrics'][name])}: {curve['title']}",
            numeric={0, 1},
        )
        for name, curves in summary["efficiency"].items()
        for curve in curves
    ]


def multiple_text(point: Tree) -> str:
    """Format the multiple of a point, e.g. "40×", "at most 2×" or "not reached (more than 8×)"."""
    times = f"{point['multiple']:.3g}×"
    return {"": times, "at most": f"at most {times}", "more than": f"not reached (more than {times})"}[point["bound"]]


def _one_seed(point: Tree) -> bool:
    return point["reached"] is None or math.isnan(point["reached"])


def _interval_text(point: Tree) -> str:
    if _one_seed(point):
        return "–"
    low, high = (
        "not reached" if end is None or math.isinf(end) else f"{end:.3g}×" for end in (point["low"], point["high"])
    )
    return low if low == high else f"{low} to {high}"


def _reached_text(point: Tree) -> str:
    return "–" if _one_seed(point) else f"{point['reached']:.0%}"


def _published_tables(published: Published) -> list[HtmlTable]:
    tables = []
    for title in dict.fromkeys(figure.table for figure in published.figures):
        figures = [figure for figure in published.figures if figure.table == title]
        columns = list(dict.fromkeys(figure.column for figure in figures))
        rows = [
            [model, *(_cited(figure) for figure in figures if figure.model == model)]
            for model in dict.fromkeys(figure.model for figure in figures)
        ]
        source = figures[0].citation.split(", ")[1]
        tables.append(
            HtmlTable([figures[0].rows_are, *columns], rows, f"{title} ({source})", range(1, len(columns) + 1))
        )
    return tables


def _cited(figure: PublishedFigure) -> Markup:
    value = "–" if figure.value is None else f"{figure.value:g}"
    return Markup('<span title="{}">{}</span>').format(figure.citation, value)


def _note(summary: Tree) -> str:
    return " ".join((_seeds_note(summary), *summary.get("notes", ())))


def _seeds_note(summary: Tree) -> str:
    if len(summary["seeds"]) == 1:
        return "There is one seed: the intervals reflect which items were drawn, and not what another seed would give."
    return (
        f"Intervals are at 95 %: Student's t over {len(summary['seeds'])} seeds. Each seed has its own weights, order "
        "of the data and, if the study makes its data, items. Shares are clipped to 0 and 1."
    )


def _count(number: int, unit: str) -> str:
    return f"{number} {unit}{'' if number == 1 else 's'}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
