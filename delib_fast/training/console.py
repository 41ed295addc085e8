"""Console output of a run: a progress bar in a terminal, plain lines elsewhere, and tables at the end."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress
from rich.table import Table

from delib_fast.redaction import redact_text
from delib_fast.terminal import console, text_column

_PLAIN_EVERY_S = 5.0  # without a terminal, at most one line in this many seconds


class ConsoleLogger:
    """Prints the progress of a run.

    Args:
        enabled: whether this rank prints; only rank 0 does.
    """

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._console = console()
        self._live: Progress | None = None
        self._task: Any = None
        self._started = self._last_line = 0.0
        self._first_step = 0

    def print(self, text: str) -> None:
        """Print a line of plain text, above the progress bar if there is one."""
        if self._enabled:
            self._console.print(redact_text(text))

    def begin_stage(self, name: str, first_step: int, num_steps: int) -> None:
        """Show the progress of a stage.

        Args:
            first_step: steps of the stage that are already done.
        """
        self._name, self._num_steps, self._first_step = name, num_steps, first_step
        self._started, self._last_line = time.perf_counter(), 0.0
        if self._enabled and self._console.is_terminal:
            self._live = Progress(
                text_column("{task.description}"),
                BarColumn(bar_width=12),
                MofNCompleteColumn(),
                text_column("{task.fields[status]}"),
                console=self._console,
            )
            self._live.start()
            self._task = self._live.add_task(name, total=num_steps, completed=first_step, status="")

    def log(self, step: int, record: Mapping[str, Any]) -> None:
        """Show a metrics record. Without a terminal, at most one line is printed every 5 s."""
        if not self._enabled:
            return
        losses = " ".join(
            f"{name} {part['nll']:.3f}" + (f" (divergence {part['divergence']:.3f})" if "divergence" in part else "")
            for name, part in record["segments"].items()
        )
        done, now = step - self._first_step, time.perf_counter()
        left = (now - self._started) / max(1, done) * (self._num_steps - step)
        status = f"{losses}  {count_text(record['tokens_per_s'])} tok/s  {duration_text(left)} left"
        if self._live is not None:
            self._live.update(self._task, completed=step, status=status)
        elif now - self._last_line >= _PLAIN_EVERY_S or step == self._num_steps:
            self._last_line = now
            self._console.print(f"{self._name} step {step}/{self._num_steps}  {status}")

    def end_stage(self) -> None:
        """Stop updating the progress bar."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def print_tables(self, ledger: Mapping[str, Any], paths: Sequence[tuple[str, str]]) -> None:
        """Print the tables at the end of a run: held-out nll by segment at each moment, and the figures of each stage.

        Args:
            paths: names and paths to print below the tables.
        """
        if not self._enabled:
            return
        for table in (*heldout_tables(ledger["evaluations"]), stage_table(ledger["stages"])):
            self._console.print(table)
        for name, path in paths:
            self.print(f"{name:<14}{path}")


OPENING = "log p(opens CoT)"
"""The column of the table with log p of the opening of the think block after a prompt, in nats."""


def heldout_tables(evaluations: Sequence[Mapping[str, Any]]) -> list[Table]:
    """A table of the held-out nll at each evaluation of a ledger (rows), by segment; none without held-out rows."""
    if not any(evaluation["segments"] for evaluation in evaluations):
        return []
    table = _table("Held-out nll (nats a token)")
    table.add_column("moment", no_wrap=True)
    segments = list(dict.fromkeys(name for e in evaluations for name in e["segments"]))
    for segment in segments:
        table.add_column(segment, justify="right")
    tokens = [next(e["segments"][name]["tokens"] for e in evaluations if name in e["segments"]) for name in segments]
    counts = [f"{n:,}" for n in tokens]
    openings = [e.get("opens_cot") for e in evaluations]
    opens = next((o for o in openings if o), None)
    if opens is not None:
        table.add_column(OPENING, justify="right")
        counts.append(f"{opens['rows']:,} rows")
    table.add_row("tokens", *counts, style="dim", end_section=True)
    for evaluation, opening in zip(evaluations, openings, strict=True):
        parts = [evaluation["segments"].get(segment) for segment in segments]
        cells = [f"{p['nll']:.3f}" if p else "" for p in parts]
        if opens is not None:
            cells.append(f"{opening['log_p']:.3f}" if opening else "")
        table.add_row(str(evaluation["moment"]), *cells)
    return [table]


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)


def stage_table(stages: Sequence[Mapping[str, Any]]) -> Table:
    """Steps, tokens, throughput and time of finished stages, from their ledger entries."""
    table = _table("Stages")
    for name in ("stage", "steps", "tokens", "supervised", "tok/s", "sup. tok/s", "fill", "time"):
        table.add_column(name, justify="left" if name == "stage" else "right", overflow="fold")
    for stage in stages:
        table.add_row(
            str(stage["name"]),
            str(stage["steps"]),
            count_text(stage["tokens"]),
            count_text(sum(stage["supervised_tokens"].values())),
            count_text(stage["tokens_per_s"]),
            count_text(stage["supervised_tokens_per_s"]),
            f"{stage['fill']:.1%}",
            duration_text(stage["train_s"]),
        )
    return table


def count_text(number: float) -> str:
    """A count in at most six characters: 9999, 10.0k, 1.2M, 3.4G."""
    for smallest, scale, unit in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if number >= smallest:
            return f"{number / scale:.1f}{unit}"
    return f"{number:.0f}"


def duration_text(seconds: float) -> str:
    """A duration: 7s, 3m07s or 2h05m."""
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{secs:02d}s" if minutes else f"{secs}s"
