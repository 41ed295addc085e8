"""The tables of a study: cells and forced choices, differences with their detection floor, and placebos."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from delib_fast.evals.intervals import Estimate
from delib_fast.reports.eval_page import cell_html, cell_text
from delib_fast.reports.html import HtmlTable
from delib_fast.reports.study_figures import metric_title

Tree = Mapping[str, Any]


def exploratory_mark(summary: Tree, part: Tree) -> str:
    """The mark of an exploratory part of a frozen study. If nothing was frozen, a sentence says so once."""
    return " (exploratory)" if part["exploratory"] and summary["preregistration"] else ""


def cell_words(figure: Tree) -> str:
    """Format a cell of the table of arms, e.g. "0.512 [0.430, 0.594]", or "void" with the reason."""
    if figure.get("void"):
        return f"void: habit {figure['habit']:.2f} > content {figure['content']:.2f}"
    return estimate_text(figure["over seeds"])


def cell(figure: Tree) -> Markup:
    if figure.get("void"):
        value = estimate_text(figure["over seeds"])
        return Markup('<span class="void" title="{}">{}</span>').format(f"not valid: {value}", cell_words(figure))
    return estimate_html(figure["over seeds"])


def choices_tables(summary: Tree) -> list[HtmlTable]:
    """For each metric of kind `choices` with both orders: the figure, the margin next to it, content and habit."""
    tables = []
    for name, metric in summary["metrics"].items():
        arms = [arm for arm in summary["arms"] if arm["figures"][name].get("content") is not None]
        if not arms:
            continue
        title = metric_title(name, metric)
        rows: list[list[str | Markup]] = [
            [
                arm["name"],
                cell(figure := arm["figures"][name]),
                estimate_html(figure["margin"]),
                f"{figure['content']:.3f}",
                f"{figure['habit']:.3f}",
                ", ".join(map(str, figure["void_seeds"])) or "none",
            ]
            for arm in arms
        ]
        columns = ["arm", title, "margin, nats", "content, nats", "habit, nats", "void seeds"]
        tables.append(HtmlTable(columns, rows, f"Forced choices: {title}", range(1, 5)))
    return tables


CONTRAST_COLUMNS = ["difference, paired by seed", "a", "b", "metric", "a − b", "by seed", "result", "floor", "placebo"]


def contrasts_table(summary: Tree) -> HtmlTable:
    rows: list[list[str | Markup]] = [
        [
            _role(summary, c),
            *contrast_names(c, summary["metrics"]),
            _void_difference(c) if c["void"] else estimate_html(c["estimate"]),
            by_seed_text(c, ", "),
            verdict_text(c),
            floor_text(c),
            _placebo_text(c),
        ]
        for c in summary["contrasts"]
    ]
    columns = ["role", "difference", *CONTRAST_COLUMNS[1:]]
    return HtmlTable(columns, rows, "Differences, paired by seed", numeric={5})


def _void_difference(contrast: Tree) -> Markup:
    return Markup('<span class="void" title="{}">void</span>').format(
        f"not valid: {estimate_text(contrast['estimate'])}; the order of the options decides more than the options in "
        f"{', '.join(contrast['void'])}"
    )


def verdict_text(contrast: Tree) -> str:
    """Say what a difference shows, e.g. "null: the interval contains 0"."""
    verdict, expected = contrast["verdict"], contrast["expect"]
    if verdict in ("higher", "lower"):
        stated = "" if expected is None else ", as expected" if verdict == expected else ", against the expectation"
        return f"a is {verdict}{stated}"
    return {
        "null": "null: the interval contains 0",
        "void": "void: the order of the options decides",
        "no interval": "one seed: no interval over seeds",
    }[verdict]


def floor_text(contrast: Tree) -> str:
    """Format the detection floor of a difference, e.g. "±0.12"; "–" if it is not known."""
    floor = contrast["floor"]
    return "–" if floor is None or math.isnan(floor) else f"±{floor:.3g}"


def _placebo_text(contrast: Tree) -> Markup:
    placebo = contrast["placebo"]
    if placebo is None:
        return Markup("–")
    return Markup('<span title="{}">{}</span>').format(
        f"{placebo['arm']}, less the same arm with another seed", estimate_text(placebo["estimate"])
    )


def placebos_table(summary: Tree) -> HtmlTable:
    metrics = summary["metrics"]
    rows: list[list[str | Markup]] = [
        [p["arm"], metric_title(p["metric"], metrics[p["metric"]]), estimate_html(p["estimate"]), by_seed_text(p, ", ")]
        for p in summary["placebos"]
    ]
    title = "Placebo: an arm less the same arm trained with another seed"
    return HtmlTable(["arm", "metric", "difference", "by seed"], rows, title, numeric={2})


def explanations(summary: Tree) -> list[str]:
    """What the columns of the tables mean, one paragraph each."""
    found = []
    if summary["contrasts"]:
        found.append(
            "Floor: the smallest true difference that this study detects with 80 % power at a two-sided level of 5 %: "
            "(t(0.975, n − 1) + t(0.8, n − 1)) · s / √n, where s is the standard deviation of the n differences by "
            "seed (Bloom 1995). A null result says that the difference is probably not much larger than the floor; it "
            "does not say that there is none. "
            + (
                "Placebo: the difference between an arm and the same arm trained with another seed."
                if summary["placebos"]
                else "No arm has a placebo, that is, the same arm trained with another seed."
            )
        )
    if any(arm["figures"][name].get("content") is not None for arm in summary["arms"] for name in summary["metrics"]):
        found.append(
            "Content and habit: each choice is scored with its two options in both orders. Content is half the sum of "
            "the two margins, and habit is half their difference; the table has the means of their absolute values. A "
            "cell is void if the habit exceeds the content: the order of the options then decides more than they do. "
            "The margin is the mean of log p(a) − log p(b), in nats."
        )
    return found


def _role(summary: Tree, contrast: Tree) -> Markup:
    """Primary, secondary or exploratory, with the reasons as a tooltip."""
    if contrast["exploratory"]:
        role = "exploratory (was primary)" if contrast["primary"] and summary["preregistration"] else "exploratory"
        return Markup('<span title="{}">{}</span>').format("; ".join(contrast["exploratory"]), role)
    return Markup("<b>primary</b>") if contrast["primary"] else Markup("secondary")


def contrast_names(contrast: Tree, metrics: Tree) -> list[str]:
    name = contrast["metric"]
    return [contrast["title"], contrast["a"], contrast["b"], metric_title(name, metrics[name])]


def by_seed_text(contrast: Tree, separator: str) -> str:
    return separator.join(f"{value:+.2f}" for value in contrast["by_seed"])


def estimate_text(tree: Tree) -> str:
    """Format an estimate of study.json, e.g. as "0.512 [0.430, 0.594]"."""
    return cell_text(_estimate(tree))


def estimate_html(tree: Tree) -> Markup:
    return cell_html(_estimate(tree))


def _estimate(tree: Tree) -> Estimate:
    value, low, high = (math.nan if tree[key] is None else tree[key] for key in ("value", "low", "high"))
    return Estimate(value, low, high, tree["n"], tree["method"])
