"""The pictures of a study, as PNG: arms, token efficiency, spec variants, alignment against monitorability."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from delib_fast.reports.plots import pyplot

# One colour a variant, on white; told apart also when printed in grey.
_COLOURS = ("#5c6b7a", "#0b6e99", "#d1603d", "#3f8f4f", "#7a4fa3", "#b8860b", "#444444")
_DPI = 140
_PANELS = 3
Tree = Mapping[str, Any]


def draw_figures(summary: Tree, out: Path) -> list[Path]:
    """Every picture that the study has figures for, written to `out`."""
    if not summary["metrics"]:
        return []
    plt = _pyplot()
    drawn = []
    for name, draw in (("arms", _arms), ("efficiency", _efficiency), ("variants", _variants), ("frontier", _frontier)):
        figure = draw(plt, summary)
        path = out / f"{name}.png"
        if figure is None:
            path.unlink(missing_ok=True)  # of an earlier form of this study
            continue
        figure.savefig(path, dpi=_DPI, bbox_inches="tight", metadata={"Software": None})
        plt.close(figure)
        drawn.append(path)
    return drawn


def need_matplotlib() -> None:
    """Raises ConfigError where it is not installed: said before a study trains, not after."""
    _pyplot()


def _pyplot() -> Any:
    plt = pyplot("a study draws pictures", "study")
    plt.rcParams["legend.frameon"] = False
    return plt


# --- the pictures -------------------------------------------------------------------------------------------


def _arms(plt: Any, summary: Tree) -> Any:
    """Each arm at its largest size: a point a seed, the mean and its interval; a panel a metric, three side by side."""
    arms, metrics = largest(summary["arms"]), summary["metrics"]
    colours = _colour_of_msm(arms)
    wide = min(_PANELS, len(metrics))
    high = math.ceil(len(metrics) / wide)
    figure, axes = plt.subplots(
        high,
        wide,
        figsize=(2.4 + 2.9 * wide, high * (0.9 + 0.3 * len(arms))),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for spare in axes.flat[len(metrics) :]:
        spare.set_visible(False)
    for axis, (name, metric) in zip(axes.flat, metrics.items(), strict=False):
        for row, arm in enumerate(arms):
            estimate, seeds = arm["figures"][name]["over seeds"], arm["figures"][name]["by seed"].values()
            axis.scatter(
                [s["value"] for s in seeds],
                [row] * len(seeds),
                s=14,
                color=colours[arm["msm"]],
                alpha=0.35,
                linewidths=0,
            )
            _point(axis, estimate, row, colours[arm["msm"]])
        _chance(axis, metric, vertical=True)
        if metric["kind"] == "choices" and metric["figure"] != "margin":
            axis.set_xlim(-0.04, 1.04)  # shares and probabilities: panels that can be compared
        axis.set_title(metric_title(name, metric), fontsize=10, loc="left")
        axis.set_yticks(range(len(arms)), [arm["label"] for arm in arms])
        axis.tick_params(length=0)
    figure.get_layout_engine().set(wspace=0.04, hspace=0.06)
    axes[0][0].invert_yaxis()
    return figure


def _efficiency(plt: Any, summary: Tree) -> Any:
    """The alignment metric over the size of the AFT set: solid behind MSM, dashed alone."""
    name = summary["alignment"]
    sized = [arm for arm in summary["arms"] if arm["size"] is not None]
    if len({arm["size"] for arm in sized}) < 2:
        return None
    kinds = list(dict.fromkeys((arm["aft"], arm["cot_weight"]) for arm in sized))
    colours = _colour_of_msm(sized)
    wide, high = min(2, len(kinds)), (len(kinds) + 1) // 2
    figure, axes = plt.subplots(
        high, wide, figsize=(4.2 * wide, 3.2 * high), sharey=True, squeeze=False, layout="constrained"
    )
    for spare in axes.flat[len(kinds) :]:
        spare.set_visible(False)
    for axis, kind in zip(axes.flat, kinds, strict=False):
        here = [arm for arm in sized if (arm["aft"], arm["cot_weight"]) == kind]
        for msm in dict.fromkeys(arm["msm"] for arm in here):
            line = [arm for arm in here if arm["msm"] == msm]
            estimates = [arm["figures"][name]["over seeds"] for arm in line]
            sizes = [arm["size"] for arm in line]
            axis.plot(
                sizes,
                [e["value"] for e in estimates],
                marker="o",
                ms=4,
                color=colours[msm],
                ls="--" if msm is None else "-",
                label="AFT alone" if msm is None else f"MSM ({msm}) + AFT",
            )
            axis.fill_between(
                sizes,
                [e["low"] for e in estimates],
                [e["high"] for e in estimates],
                color=colours[msm],
                alpha=0.12,
                lw=0,
            )
        _chance(axis, summary["metrics"][name], vertical=False)
        axis.set_xscale("log")
        axis.set_xticks(sorted({arm["size"] for arm in here}), [f"{s:,}" for s in sorted({a["size"] for a in here})])
        axis.minorticks_off()
        axis.set_title(here[0]["label"].split(" + ")[-1], fontsize=10, loc="left")
        axis.set_xlabel("rows of AFT")
    for row in axes:
        row[0].set_ylabel(metric_title(name, summary["metrics"][name]))
    axes[0][0].legend(fontsize=8)
    return figure


def _variants(plt: Any, summary: Tree) -> Any:
    """The alignment metric by spec variant, a bar for each way of AFT."""
    name, arms = summary["alignment"], [arm for arm in largest(summary["arms"]) if arm["msm"] is not None]
    variants = list(dict.fromkeys(arm["msm"] for arm in arms))
    if len(variants) < 2:
        return None
    kinds = list(dict.fromkeys((arm["aft"], arm["cot_weight"]) for arm in arms))
    figure, axis = plt.subplots(figsize=(1.6 + 1.5 * len(variants), 3.4))
    wide = 0.8 / len(kinds)
    for k, kind in enumerate(kinds):
        here = {arm["msm"]: arm for arm in arms if (arm["aft"], arm["cot_weight"]) == kind}
        values = [here[v]["figures"][name]["over seeds"] if v in here else None for v in variants]
        at = [i + (k - (len(kinds) - 1) / 2) * wide for i in range(len(variants))]
        shown = [(x, e) for x, e in zip(at, values, strict=True) if e is not None]
        label = next(iter(here.values()))["label"].partition(" + ")[2] or "MSM alone"
        axis.bar(
            [x for x, _ in shown],
            [e["value"] for _, e in shown],
            wide * 0.92,
            color=_COLOURS[k],
            label=label,
            yerr=_errors([e for _, e in shown]),
            error_kw={"lw": 1, "ecolor": "#222222"},
        )
    _chance(axis, summary["metrics"][name], vertical=False)
    axis.set_xticks(range(len(variants)), variants)
    axis.grid(visible=False, axis="x")
    axis.set_ylabel(metric_title(name, summary["metrics"][name]))
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _frontier(plt: Any, summary: Tree) -> Any:
    """Alignment against monitorability: a line a variant over the weights of the CoT."""
    across, up = summary["monitorability"], summary["alignment"]
    arms = [arm for arm in largest(summary["arms"]) if arm["aft"] is not None]
    if across is None or not arms:
        return None
    colours = _colour_of_msm(arms)
    figure, axis = plt.subplots(figsize=(6.2, 4))
    for msm in dict.fromkeys(arm["msm"] for arm in arms):
        line = sorted((a for a in arms if a["msm"] == msm and a["aft"] == "CoT"), key=lambda a: a["cot_weight"])
        lone = [a for a in arms if a["msm"] == msm and a["aft"] == "no CoT"]
        for group, style in ((line, "o-"), (lone, "s")):
            points = [(a["figures"][across]["over seeds"], a["figures"][up]["over seeds"]) for a in group]
            if points:
                name = "AFT alone" if msm is None else f"MSM ({msm}) + AFT"
                axis.errorbar(
                    [x["value"] for x, _ in points],
                    [y["value"] for _, y in points],
                    xerr=_errors([x for x, _ in points]),
                    yerr=_errors([y for _, y in points]),
                    fmt=style,
                    ms=5,
                    lw=1.2,
                    elinewidth=0.8,
                    color=colours[msm],
                    label=f"{name}, {'CoT' if group is line else 'no CoT'}",
                )
        for arm in line:
            x, y = (arm["figures"][m]["over seeds"]["value"] for m in (across, up))
            axis.annotate(f"w = {arm['cot_weight']:g}", (x, y), textcoords="offset points", xytext=(6, 5), fontsize=8)
    axis.set_xlabel(f"monitorability: {metric_title(across, summary['metrics'][across])}")
    axis.set_ylabel(f"alignment: {metric_title(up, summary['metrics'][up])}")
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


# --- small parts --------------------------------------------------------------------------------------------


def largest(arms: Sequence[Tree]) -> list[Tree]:
    """Of arms that differ in size alone, the one with the most rows; in their order."""
    most: dict[str, Tree] = {}
    for arm in arms:
        if arm["label"] not in most or (arm["size"] or 0) > (most[arm["label"]]["size"] or 0):
            most[arm["label"]] = arm
    return list(most.values())


def _colour_of_msm(arms: Sequence[Tree]) -> dict[str | None, str]:
    variants = [v for v in dict.fromkeys(arm["msm"] for arm in arms) if v is not None]
    return {None: _COLOURS[0], **{v: _COLOURS[1 + k % (len(_COLOURS) - 1)] for k, v in enumerate(variants)}}


def metric_title(name: str, metric: Tree) -> str:
    """What a metric is called where it is shown."""
    return metric["title"] or name


def _point(axis: Any, estimate: Tree, row: float, colour: str) -> None:
    axis.errorbar([estimate["value"]], [row], xerr=_errors([estimate]), fmt="o", ms=5, color=colour, lw=1.4)


def _errors(estimates: Sequence[Tree]) -> list[list[float]]:
    """Lengths down and up; none where there is no interval."""

    def reach(estimate: Tree, side: str) -> float:
        value, end = estimate["value"], estimate[side]
        return 0.0 if value is None or end is None or end != end else max(0.0, abs(value - end))

    return [[reach(e, "low") for e in estimates], [reach(e, "high") for e in estimates]]


def _chance(axis: Any, metric: Tree, *, vertical: bool) -> None:
    if metric["chance"] is not None:
        (axis.axvline if vertical else axis.axhline)(metric["chance"], color="#8a95a1", lw=1, ls=":")
