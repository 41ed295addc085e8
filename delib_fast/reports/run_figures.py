"""The pictures of `delib-fast report`, as PNG: one metric per picture, one colour per run, readable on a phone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from delib_fast.reports.html import Picture
from delib_fast.reports.plots import COLOURS, NEUTRAL, SMALL_FONT, pyplot, save
from delib_fast.reports.run_record import MetricsRecord, RunRecord, Series

_SIZE = (4.6, 3.0)  # inches
_SMOOTH_FROM = 60  # a series of this many points or more is drawn as its moving average over a pale line of its points
_MARK_UP_TO = 12  # a series of fewer points marks each of them
_LEGEND_COLUMNS = 2


@dataclass(frozen=True)
class _Chart:
    name: str
    section: str
    caption: str
    y_label: str
    value: Callable[[MetricsRecord], float | None]
    over_tokens: bool = False
    held_out: str | None = None
    """Mark the held-out nll of this segment."""
    log: bool = False
    from_zero: bool = False


def draw_pictures(runs: Sequence[RunRecord], out: Path) -> list[Picture]:
    """Draw every picture that the runs have metrics for, into the folder `out`.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    plt = pyplot("delib-fast report draws its pictures", "report")
    drawn = []
    for chart in _charts(runs):
        figure = _draw(plt, chart, runs)
        if figure is not None:
            path = out / f"{chart.name}.png"
            save(figure, path)
            drawn.append(Picture(path, chart.caption, chart.section))
    return drawn


def _charts(runs: Sequence[RunRecord]) -> Iterator[_Chart]:
    segments = list(dict.fromkeys(name for run in runs for name in run.segments))
    for segment in segments:
        for over_tokens in (False, True):
            over = "tokens" if over_tokens else "steps"
            yield _Chart(
                f"nll-{segment}-over-{over}",
                "Loss by segment",
                f"nll of the {segment} segment over {over}; rings: held-out nll",
                "nll (nats per token)",
                _of_segment(segment, "nll"),
                over_tokens,
                held_out=segment,
            )
    for segment in segments:
        yield _Chart(
            f"accuracy-{segment}",
            "Token accuracy by segment",
            f"share of the tokens of the {segment} segment that the model ranks first",
            "token accuracy",
            _of_segment(segment, "accuracy"),
        )
    for segment in segments:
        yield _Chart(
            f"divergence-{segment}",
            "Divergence from the teacher by segment",
            f"divergence from the teacher, which reads the spec, in the {segment} segment",
            "divergence (nats per token)",
            _of_segment(segment, "divergence"),
        )
    for name, y_label, caption, zero in (
        ("tokens_per_s", "tokens/s", "tokens per second, prompts included", True),
        ("supervised_tokens_per_s", "supervised tokens/s", "supervised tokens per second", True),
        ("mfu", "MFU", "model FLOP/s as a share of the device's peak (peak_source in the ledger)", True),
        ("data_wait_s", "seconds", "time that the device waited for data between two log records", True),
        ("fill", "fill", "share of the capacity of the packs that holds tokens", False),
    ):
        yield _Chart(name, "Throughput", caption, y_label, _of_record(name), from_zero=zero)
    yield _Chart("memory_peak_mib", "Memory", "peak memory of a rank so far", "memory (GiB)", _peak_gib, from_zero=True)
    yield _Chart(
        "gradient_norm",
        "Optimizer",
        "norm of the gradient before clipping",
        "gradient norm",
        _of_record("gradient_norm"),
        log=True,
    )
    yield _Chart("lr", "Optimizer", "learning rate", "learning rate", _of_record("lr"), from_zero=True)


def _of_segment(segment: str, name: str) -> Callable[[MetricsRecord], float | None]:
    return lambda record: record["segments"].get(segment, {}).get(name)


def _of_record(name: str) -> Callable[[MetricsRecord], float | None]:
    return lambda record: record.get(name)


def _peak_gib(record: MetricsRecord) -> float | None:
    mib = record.get("memory_peak_mib")
    return None if mib is None else mib / 1024


def _draw(plt: Any, chart: _Chart, runs: Sequence[RunRecord]) -> Any:
    """The figure, or None if no run has this metric."""
    lines = [(k, run, series) for k, run in enumerate(runs) if (series := run.series(chart.value)).values]
    if not lines:
        return None
    figure, axis = plt.subplots(figsize=_SIZE, layout="constrained")
    for k, run, series in lines:
        colour, style = COLOURS[k % len(COLOURS)], "-" if k < len(COLOURS) else "--"
        _draw_line(axis, series, chart.over_tokens, colour, style, run.name)
        if chart.held_out is not None:
            held_out = run.held_out(chart.held_out)
            x = held_out.tokens if chart.over_tokens else held_out.steps
            axis.plot(x, held_out.values, "o", ms=6, mfc="white", mew=1.6, color=colour, zorder=4)
    _mark_stage_ends(axis, runs, chart.over_tokens)
    if chart.log and all(value > 0 for *_, series in lines for value in series.values):
        axis.set_yscale("log")
    elif chart.from_zero:
        axis.set_ylim(bottom=0)
    axis.set_xlabel("tokens" if chart.over_tokens else "steps")
    axis.set_ylabel(chart.y_label)
    if chart.over_tokens:
        axis.xaxis.set_major_formatter(plt.matplotlib.ticker.EngFormatter(sep=""))
    if len(runs) > 1:  # above the axes, where it hides no line
        figure.legend(loc="outside upper left", ncols=min(len(lines), _LEGEND_COLUMNS))
    return figure


def _draw_line(axis: Any, series: Series, over_tokens: bool, colour: str, style: str, name: str) -> None:
    x = series.tokens if over_tokens else series.steps
    if len(x) < _SMOOTH_FROM:
        marker = "." if len(x) < _MARK_UP_TO else None
        axis.plot(x, series.values, style, lw=1.5, color=colour, label=name, marker=marker)
        return
    axis.plot(x, series.values, style, lw=0.7, color=colour, alpha=0.3)
    axis.plot(x, smooth(series.values), style, lw=1.7, color=colour, label=name)


def smooth(values: Sequence[float]) -> list[float]:
    """The moving average over a centred window of a thirtieth of the points, which is cut off at both ends."""
    half = max(1, len(values) // 60)
    return [sum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i - half) : i + half + 1])]


def _mark_stage_ends(axis: Any, runs: Sequence[RunRecord], over_tokens: bool) -> None:
    """Mark where one stage follows another, unless runs differ in it or the picture shows one stage only."""
    names = dict.fromkeys(name for run in runs for name in run.ends)
    ends = {name: {run.ends[name][over_tokens] for run in runs if name in run.ends} for name in names}
    for name, positions in list(ends.items())[:-1]:
        x = min(positions)
        if len(positions) == 1 and axis.dataLim.x0 < x < axis.dataLim.x1:
            axis.axvline(x, color=NEUTRAL, lw=1, ls=":")
            axis.annotate(
                f"{name} ends",
                (x, 1),
                xycoords=("data", "axes fraction"),
                xytext=(3, -9),
                textcoords="offset points",
                fontsize=SMALL_FONT,
                color=NEUTRAL,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
            )
