"""The pictures of `delib-fast report`, as PNG: one figure a picture, one colour a run, small enough for a phone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from delib_fast.reports.plots import pyplot
from delib_fast.reports.run_record import Line, RunRecord, Series

# On white, each with a contrast of 4.5 or more; runs beyond them are dashed.
_COLOURS = ("#0b6e99", "#b8430d", "#2f7a3d", "#7a4fa3", "#8a6100", "#b0306a", "#444444")
_DPI = 160
_SIZE = (4.6, 3.0)  # inches
_SMOOTH_FROM = 60  # points of a line: from so many on its mean over a window is drawn, the points pale behind it


@dataclass(frozen=True)
class Picture:
    path: Path
    caption: str
    section: str


@dataclass(frozen=True)
class _Panel:
    name: str
    section: str
    caption: str
    y: str
    value: Callable[[Line], float | None]
    over_tokens: bool = False
    held_out: str | None = None
    """the segment whose held-out nll is marked"""
    log: bool = False
    from_zero: bool = False


def draw_pictures(runs: Sequence[RunRecord], out: Path) -> list[Picture]:
    """Every picture that the runs have figures for, written to `out`."""
    plt = pyplot("the report draws", "report")
    drawn = []
    for panel in _panels(runs):
        figure = _draw(plt, panel, runs)
        if figure is None:
            continue
        path = out / f"{panel.name}.png"
        figure.savefig(path, dpi=_DPI, metadata={"Software": None})
        plt.close(figure)
        drawn.append(Picture(path, panel.caption, panel.section))
    return drawn


def _panels(runs: Sequence[RunRecord]) -> Iterator[_Panel]:
    for segment in dict.fromkeys(name for run in runs for name in run.segments):
        for over_tokens in (False, True):
            over = "tokens" if over_tokens else "updates"
            yield _Panel(
                f"nll-{segment}-over-{over}",
                "Loss by segment",
                f"nll of the {segment} segment over {over}; a ring is the held-out nll",
                "nll (nats a token)",
                _of_segment(segment, "nll"),
                over_tokens,
                held_out=segment,
            )
    for segment in dict.fromkeys(name for run in runs for name in run.segments):
        yield _Panel(
            f"accuracy-{segment}",
            "Token accuracy by segment",
            f"share of the {segment} segment's tokens that the model puts first",
            "token accuracy",
            _of_segment(segment, "accuracy"),
        )
    for name, y, caption, zero in (
        ("tokens_per_s", "tokens / s", "tokens a second, prompts included", True),
        ("supervised_tokens_per_s", "supervised tokens / s", "supervised tokens a second", True),
        ("mfu", "MFU", "model FLOPs a second as a share of the device's peak (ledger: peak_source)", True),
        ("data_wait_s", "s an interval", "time that the device waited for data between two log lines", True),
        ("fill", "fill", "share of the packs' room that holds tokens", False),
    ):
        yield _Panel(name, "Throughput", caption, y, _of_line(name), from_zero=zero)
    yield _Panel("memory_peak_mib", "Memory", "most memory of a rank so far", "memory (GiB)", _gib, from_zero=True)
    yield _Panel(
        "gradient_norm",
        "Optimiser",
        "norm of the gradient before clipping",
        "gradient norm",
        _of_line("gradient_norm"),
        log=True,
    )
    yield _Panel("lr", "Optimiser", "learning rate", "learning rate", _of_line("lr"), from_zero=True)


def _of_segment(segment: str, name: str) -> Callable[[Line], float | None]:
    return lambda line: line["segments"].get(segment, {}).get(name)


def _of_line(name: str) -> Callable[[Line], float | None]:
    return lambda line: line.get(name)


def _gib(line: Line) -> float | None:
    mib = line.get("memory_peak_mib")
    return None if mib is None else mib / 1024


def _draw(plt: Any, panel: _Panel, runs: Sequence[RunRecord]) -> Any:
    found = [(k, run, run.series(panel.value)) for k, run in enumerate(runs)]
    found = [(k, run, series) for k, run, series in found if series.values]
    if not found:
        return None
    figure, axis = plt.subplots(figsize=_SIZE, layout="constrained")
    for k, run, series in found:
        colour, style = _COLOURS[k % len(_COLOURS)], "-" if k < len(_COLOURS) else "--"
        _line(axis, series, panel.over_tokens, colour, style, run.name)
        if panel.held_out is not None:
            held = run.held_out(panel.held_out)
            axis.plot(
                held.tokens if panel.over_tokens else held.updates,
                held.values,
                "o",
                ms=6,
                mfc="white",
                mew=1.6,
                color=colour,
                zorder=4,
            )
    _stage_borders(axis, runs, panel.over_tokens)
    if panel.log and all(value > 0 for *_, series in found for value in series.values):
        axis.set_yscale("log")
    elif panel.from_zero:
        axis.set_ylim(bottom=0)
    axis.set_xlabel("tokens" if panel.over_tokens else "updates")
    axis.set_ylabel(panel.y)
    if panel.over_tokens:
        axis.xaxis.set_major_formatter(plt.matplotlib.ticker.EngFormatter(sep=""))
    if len(runs) > 1:
        axis.legend(fontsize=8, loc="best", framealpha=0.85, frameon=True, edgecolor="none")
    return figure


def _line(axis: Any, series: Series, over_tokens: bool, colour: str, style: str, name: str) -> None:
    x = series.tokens if over_tokens else series.updates
    marker = "." if len(x) < 12 else None
    if len(x) < _SMOOTH_FROM:
        axis.plot(x, series.values, style, lw=1.5, color=colour, label=name, marker=marker)
        return
    axis.plot(x, series.values, style, lw=0.7, color=colour, alpha=0.3)
    axis.plot(x, smooth(series.values), style, lw=1.7, color=colour, label=name)


def smooth(values: Sequence[float]) -> list[float]:
    """The mean over a centred window of a thirtieth of the points; at the ends over what there is of it."""
    half = max(1, len(values) // 60)
    return [sum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i - half) : i + half + 1])]


def _stage_borders(axis: Any, runs: Sequence[RunRecord], over_tokens: bool) -> None:
    """Where one stage follows another, if every run has it at the same place."""
    names = dict.fromkeys(name for run in runs for name in run.ends)
    ends = {name: {run.ends[name][over_tokens] for run in runs if name in run.ends} for name in names}
    for name, locations in list(ends.items())[:-1]:
        if len(locations) == 1:
            x = locations.pop()
            axis.axvline(x, color="#6b7480", lw=1, ls=":")
            axis.annotate(
                f"{name} ends",
                (x, 1),
                xycoords=("data", "axes fraction"),
                xytext=(3, -9),
                textcoords="offset points",
                fontsize=8,
                color="#56606b",
            )
