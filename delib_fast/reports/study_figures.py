"""The pictures of a study, as PNG: arms, data efficiency, spec variants, and alignment against monitorability."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from delib_fast.reports.html import Picture
from delib_fast.reports.plots import COLOURS, NEUTRAL, SMALL_FONT, pyplot, save

_PANELS_PER_ROW = 3
_PANEL_CHARS, _AXIS_CHARS, _TICK_CHARS = 32, 34, 16
"""Characters in a line of a panel's title, an axis' label and a tick's label."""
_LEGEND_INCHES_PER_CHAR = 0.068
Tree = Mapping[str, Any]
_ENDS = ("low", "high")  # keys of the two ends of an interval
_DIRECTIONS = {"higher": "\n(higher is better)", "lower": "\n(lower is better)", "neither": ""}


def draw_pictures(summary: Tree, out: Path) -> list[Picture]:
    """Draw every picture that the study has figures for, into the folder `out`.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    if not summary["metrics"]:
        return []
    plt = require_matplotlib()
    drawn = []
    for name, draw, caption in (
        (
            "arms",
            _arms,
            "Arms at their largest AFT set. Pale points: seeds. Points: means with 95 % intervals; hollow: void cells.",
        ),
        ("efficiency", _efficiency, "Over the size of the AFT set, with 95 % intervals. Dashed: AFT alone."),
        ("variants", _variants, "By spec variant, with 95 % intervals."),
        ("frontier", _frontier, "Alignment against monitorability. Numbers: weight of the CoT in the loss."),
    ):
        figure = draw(plt, summary)
        path = out / f"{name}.png"
        if figure is None:
            path.unlink(missing_ok=True)  # an earlier version of this study may have drawn it
            continue
        save(figure, path)
        drawn.append(Picture(path, caption))
    return drawn


def require_matplotlib() -> Any:
    """Import matplotlib. Raises ConfigError if it is not installed: a study calls this before it trains anything."""
    return pyplot("delib-fast study draws its pictures", "study")


# --- the pictures -------------------------------------------------------------------------------------------


def _arms(plt: Any, summary: Tree) -> Any:
    """One panel per metric, one row per arm: a point for each seed, and the mean with its interval."""
    arms, metrics = largest(summary["arms"]), summary["metrics"]
    colours = _variant_colours(arms)
    columns = min(_PANELS_PER_ROW, len(metrics))
    rows = math.ceil(len(metrics) / columns)
    size = (2.4 + 2.9 * columns, rows * (0.9 + 0.3 * len(arms)))
    figure, axes = _panels(plt, rows, columns, len(metrics), size)
    for axis, (name, metric) in zip(axes.flat, metrics.items(), strict=False):
        for row, arm in enumerate(arms):
            colour = colours[arm["msm"]]
            seeds = [seed["value"] for seed in arm["figures"][name]["by seed"].values()]
            axis.scatter(seeds, [row] * len(seeds), s=14, color=colour, alpha=0.35, linewidths=0)
            mean = arm["figures"][name]["over seeds"]
            face = "none" if arm["figures"][name].get("void") else colour
            axis.errorbar([mean["value"]], [row], xerr=_errors([mean]), fmt="o", ms=5, color=colour, mfc=face, lw=1.4)
        _mark_chance(axis.axvline, metric)
        if metric["kind"] == "choices" and metric["figure"] != "margin":
            axis.set_xlim(-0.04, 1.04)  # shares and probabilities have one scale in every panel
        axis.set_title(_wrapped(metric_title(name, metric), _PANEL_CHARS) + _DIRECTIONS[metric["better"]])
        axis.set_yticks(range(len(arms)), [arm["label"] for arm in arms])
        axis.tick_params(length=0)
    figure.get_layout_engine().set(wspace=0.04, hspace=0.06)
    axes[0][0].invert_yaxis()
    return figure


def _efficiency(plt: Any, summary: Tree) -> Any:
    """The alignment metric over the size of the AFT set: one panel per kind of AFT, one line per MSM variant."""
    name = summary["alignment"]
    sized = [arm for arm in _valid(summary, name) if arm["size"] is not None]
    if len({arm["size"] for arm in sized}) < 2:
        return None
    kinds = list(dict.fromkeys((arm["aft"], arm["cot_weight"]) for arm in sized))
    colours = _variant_colours(sized)
    columns, rows = min(2, len(kinds)), (len(kinds) + 1) // 2
    figure, axes = _panels(plt, rows, columns, len(kinds), (4.2 * columns, 0.5 + 3.2 * rows))
    for axis, kind in zip(axes.flat, kinds, strict=False):
        of_kind = [arm for arm in sized if (arm["aft"], arm["cot_weight"]) == kind]
        for msm in dict.fromkeys(arm["msm"] for arm in of_kind):
            line = [arm for arm in of_kind if arm["msm"] == msm]
            estimates = [arm["figures"][name]["over seeds"] for arm in line]
            sizes, lows, highs = ([arm["size"] for arm in line], *([e[end] for e in estimates] for end in _ENDS))
            axis.plot(
                sizes,
                [e["value"] for e in estimates],
                marker="o",
                ms=4,
                color=colours[msm],
                ls="--" if msm is None else "-",
                label=_variant_name(msm),
            )
            axis.fill_between(sizes, _numbers(lows), _numbers(highs), color=colours[msm], alpha=0.12, lw=0)
        _mark_chance(axis.axhline, summary["metrics"][name])
        axis.set_xscale("log")
        ticks = sorted({arm["size"] for arm in of_kind})
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axis.minorticks_off()
        axis.set_title(of_kind[0]["label"].split(" + ")[-1])
        axis.set_xlabel("AFT rows")
    for row in axes:
        row[0].set_ylabel(_axis_label(name, summary["metrics"][name]))
    _legend_above(figure, axes[0][0])
    return figure


def _variants(plt: Any, summary: Tree) -> Any:
    """The alignment metric by spec variant, one bar per kind of AFT."""
    name = summary["alignment"]
    arms = [arm for arm in largest(_valid(summary, name)) if arm["msm"] is not None]
    variants = list(dict.fromkeys(arm["msm"] for arm in arms))
    if len(variants) < 2:
        return None
    kinds = list(dict.fromkeys((arm["aft"], arm["cot_weight"]) for arm in arms))
    figure, axis = plt.subplots(figsize=(1.6 + 1.5 * len(variants), 3.8), layout="constrained")
    width = 0.8 / len(kinds)
    for k, kind in enumerate(kinds):
        of_kind = {arm["msm"]: arm for arm in arms if (arm["aft"], arm["cot_weight"]) == kind}
        offset = (k - (len(kinds) - 1) / 2) * width
        bars = [(i + offset, of_kind[v]["figures"][name]["over seeds"]) for i, v in enumerate(variants) if v in of_kind]
        axis.bar(
            [x for x, _ in bars],
            [estimate["value"] for _, estimate in bars],
            width * 0.92,
            color=COLOURS[k % len(COLOURS)],
            label=next(iter(of_kind.values()))["label"].partition(" + ")[2] or "MSM alone",
            yerr=_errors([estimate for _, estimate in bars]),
            error_kw={"lw": 1, "ecolor": "#222222"},
        )
    _mark_chance(axis.axhline, summary["metrics"][name])
    axis.set_xticks(range(len(variants)), [_wrapped(variant, _TICK_CHARS) for variant in variants])
    axis.grid(visible=False, axis="x")
    axis.set_ylabel(_axis_label(name, summary["metrics"][name]))
    _legend_above(figure, axis)
    return figure


def _frontier(plt: Any, summary: Tree) -> Any:
    """Alignment against monitorability: one line per variant over the weights of the CoT."""
    across, up = summary["monitorability"], summary["alignment"]
    arms = [arm for arm in largest(_valid(summary, up, across)) if arm["aft"] is not None]
    if across is None or not arms:
        return None
    colours = _variant_colours(arms)
    kinds = dict(zip(dict.fromkeys(arm["aft"] for arm in arms if arm["aft"] != "CoT"), cycle("s^DvPX"), strict=False))
    figure, axis = plt.subplots(figsize=(6.2, 4.8), layout="constrained")
    for msm in dict.fromkeys(arm["msm"] for arm in arms):
        with_cot = sorted((a for a in arms if a["msm"] == msm and a["aft"] == "CoT"), key=lambda a: a["cot_weight"])
        others = {k: [a for a in arms if (a["msm"], a["aft"]) == (msm, k)] for k in kinds}
        for kind, group, style in (("CoT", with_cot, "o-"), *((k, others[k], kinds[k]) for k in kinds)):
            xs, ys = ([arm["figures"][metric]["over seeds"] for arm in group] for metric in (across, up))
            if group:
                axis.errorbar(
                    [x["value"] for x in xs],
                    [y["value"] for y in ys],
                    xerr=_errors(xs),
                    yerr=_errors(ys),
                    fmt=style,
                    ms=5,
                    lw=1.2,
                    elinewidth=0.8,
                    color=colours[msm],
                    label=f"{_variant_name(msm)}, {kind}",
                )
        for arm in with_cot:
            point = tuple(arm["figures"][metric]["over seeds"]["value"] for metric in (across, up))
            axis.annotate(
                f"{arm['cot_weight']:g}", point, textcoords="offset points", xytext=(6, 5), fontsize=SMALL_FONT
            )
    axis.set_xlabel(_axis_label(across, summary["metrics"][across], "monitorability: "))
    axis.set_ylabel(_axis_label(up, summary["metrics"][up], "alignment: "))
    _legend_above(figure, axis)
    return figure


# --- helpers ------------------------------------------------------------------------------------------------


def _valid(summary: Tree, *metrics: str | None) -> list[Tree]:
    """The arms that are not placebos and have no void cell in these metrics."""
    return [
        arm
        for arm in summary["arms"]
        if not arm.get("placebo") and not any(m is not None and arm["figures"][m].get("void") for m in metrics)
    ]


def largest(arms: Sequence[Tree]) -> list[Tree]:
    """The arm with the most rows of each label, in the order of the arms."""
    most: dict[str, Tree] = {}
    for arm in arms:
        if arm["label"] not in most or (arm["size"] or 0) > (most[arm["label"]]["size"] or 0):
            most[arm["label"]] = arm
    return list(most.values())


def metric_title(name: str, metric: Tree) -> str:
    """The name of a metric in tables and pictures."""
    return str(metric["title"] or name)


def _axis_label(name: str, metric: Tree, what: str = "") -> str:
    direction = _DIRECTIONS[metric["better"]] or "\n(which direction is better is not set)"
    return _wrapped(what + metric_title(name, metric), _AXIS_CHARS) + direction


def _wrapped(text: str, width: int) -> str:
    """Break lines between words only, so that no text is cut off or overlaps another."""
    return "\n".join(textwrap.wrap(text, width, break_long_words=False)) or text


def _variant_name(msm: str | None) -> str:
    return "AFT alone" if msm is None else f"MSM ({msm}) + AFT"


def _variant_colours(arms: Sequence[Tree]) -> dict[str | None, str]:
    variants = [v for v in dict.fromkeys(arm["msm"] for arm in arms) if v is not None]
    return {None: NEUTRAL, **{v: COLOURS[k % len(COLOURS)] for k, v in enumerate(variants)}}


def _panels(plt: Any, rows: int, columns: int, used: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """A grid of axes with one y axis; those after the first `used` are hidden."""
    figure, axes = plt.subplots(rows, columns, figsize=size, sharey=True, squeeze=False, layout="constrained")
    for spare in axes.flat[used:]:
        spare.set_visible(False)
    return figure, axes


def _legend_above(figure: Any, axis: Any) -> None:
    """One legend above all axes, in as many columns as fit."""
    handles, labels = axis.get_legend_handles_labels()
    fit = max(1, int(figure.get_figwidth() / (_LEGEND_INCHES_PER_CHAR * (max(map(len, labels), default=0) + 8))))
    figure.legend(handles, labels, loc="outside upper left", ncols=min(fit, 3))


def _errors(estimates: Sequence[Tree]) -> list[list[float]]:
    """The lengths of the error bars below and above each value; 0 if there is no interval."""

    def length(estimate: Tree, end: str) -> float:
        (value,), (bound,) = _numbers([estimate["value"]]), _numbers([estimate[end]])
        return 0.0 if math.isnan(value - bound) else abs(value - bound)

    return [[length(e, end) for e in estimates] for end in _ENDS]


def _numbers(values: Sequence[float | None]) -> list[float]:
    """Convert None, which represents NaN in JSON, to NaN."""
    return [math.nan if value is None else value for value in values]


def _mark_chance(draw_line: Any, metric: Tree) -> None:
    if metric["chance"] is not None:
        draw_line(metric["chance"], color=NEUTRAL, lw=1, ls=":")
