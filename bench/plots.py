"""The plots of bench/report.py: a roofline, and the share of the roof over the recorded runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from delib_fast.reports.plots import pyplot, save

_MARKERS = "osD^vP*X<>h8"
_WHAT = "bench/report.py draws its plots"


def roofline(cases: dict[str, dict[str, dict[str, Any]]], device: str, path: Path, names: dict[str, str]) -> None:
    """Draw FLOP/s over FLOPs per byte that must be moved, one panel per dtype.

    The slope is the bandwidth of a copy; the flat part is the highest rate that the bare GEMMs of any case reached. A
    short bar above each case marks the rate of its own GEMMs.

    Args:
        cases: {case: {contender: extra_info}}; each case has the contender "ours".
        device: the device, for the title.
        path: the SVG file to write.
        names: {contender: name in the legend}; only these and "ours" are drawn.
    """
    plt = pyplot(_WHAT, "report")
    dtypes = sorted({by["ours"]["dtype"] for by in cases.values()})
    figure, axes = plt.subplots(1, len(dtypes), figsize=(6.2 * len(dtypes), 4.6), squeeze=False, layout="constrained")
    contenders = ["ours", *(name for name in names if any(name in by for by in cases.values()))]
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        mine = [by for by in cases.values() if by["ours"]["dtype"] == dtype]
        roofs = [(_intensity(by["ours"]), by["ours"]["flops"] / by["ours"]["roof_ms"] / 1e9) for by in mine]
        top = max(rate for _, rate in roofs)
        slope = max(by["ours"]["bandwidth_gb_per_s"] for by in mine) / 1e3
        left = min(min(x for x, _ in roofs), top / slope) / 2
        right = max(x for x, _ in roofs) * 2
        axis.plot([left, top / slope, right], [left * slope, top, top], color="black", linewidth=1.2)
        axis.scatter(*zip(*roofs, strict=True), marker="_", s=160, color="black", label="its three bare GEMMs")
        for k, name in enumerate(contenders):
            points = [
                (_intensity(by[name]), by[name]["share_of_roof"] * roof)
                for by, (_, roof) in zip(mine, roofs, strict=True)
                if name in by
            ]
            if points:
                first = name == "ours"
                axis.scatter(
                    *zip(*points, strict=True),
                    marker=_MARKERS[k % len(_MARKERS)],
                    s=46 if first else 26,
                    color="tab:red" if first else plt.get_cmap("tab10")(k % 10 if k != 3 else 9),
                    label=names.get(name, name),
                    zorder=3 if first else 2,
                )
        axis.set(xscale="log", yscale="log", xlabel="FLOP per byte that must move", ylabel="TFLOP/s", title=dtype)
    axes[0][-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(f"Loss with both gradients, {device}")
    save(figure, path)


def _intensity(info: dict[str, Any]) -> float:
    return float(info["flops"] / info["least_bytes"])


def history(lines: list[dict[str, Any]], device: str, path: Path) -> None:
    """Draw the share of the roof of every case over the recorded runs, one panel per suite, labeled by commit.

    Args:
        lines: the records of history.jsonl (recording.history_lines).
        device: the device, for the title.
        path: the SVG file to write.
    """
    plt = pyplot(_WHAT, "report")
    lines = [line for line in lines if line["contender"] != "ours-reference"]
    suites = sorted({line["suite"] for line in lines})
    figure, axes = plt.subplots(len(suites), 1, figsize=(10, 4.2 * len(suites)), squeeze=False, layout="constrained")
    for axis, suite in zip(axes[:, 0], suites, strict=True):
        mine = [line for line in lines if line["suite"] == suite]
        runs = sorted({(line["time"], line["commit"]) for line in mine})
        column = {run: k for k, run in enumerate(runs)}
        for case in sorted({(line["case"], line["contender"]) for line in mine}):
            points = [
                (column[line["time"], line["commit"]], line["share_of_roof"])
                for line in mine
                if (line["case"], line["contender"]) == case
            ]
            axis.plot(*zip(*points, strict=True), marker="o", markersize=4, label=f"{case[0]} ({case[1]})")
        axis.set_xticks(range(len(runs)), [f"{time[:10]}\n{commit}" for time, commit in runs], fontsize=7)
        axis.set(ylabel="share of the roof", title=suite, ylim=(0, None))
        axis.legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(device)
    save(figure, path)
