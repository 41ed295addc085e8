"""The progress of a run: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID

from delib_fast.datagen.answers import Answer
from delib_fast.datagen.request_log import RequestLog
from delib_fast.redaction import redact_text
from delib_fast.terminal import console as plain_console
from delib_fast.terminal import text_column

_PLAIN_EVERY_S = 5.0  # interval of plain lines
MADE = "samples or documents"
_GOOD_ENOUGH = frozenset({"not_best"})  # usable, but others are better


@dataclass
class Share:
    """How many of what was paid for are usable."""

    total: int = 0
    usable: int = 0


class Meter:
    """Counts the answers and rows of a run, and shows its progress.

    Args:
        log: the request log, whose cost is shown.
        console: where to print; stderr by default.
    """

    def __init__(self, log: RequestLog | None = None, *, console: Console | None = None) -> None:
        self.log = log
        self.reused = 0
        self.answers = 0
        self.completion_tokens = 0
        self.retries: Counter[str] = Counter()
        self.kept = 0
        self.kept_tokens = 0
        self.dropped: Counter[str] = Counter()
        self.first_drop = ""
        """The reason and the message of the first drop."""
        self.shares: dict[str, Share] = {}
        """How many of what was paid for are usable: samples or documents (`MADE`), and the lists and judgements of each
        purpose."""
        self._console = console or plain_console(err=True)
        self._live: Progress | None = None
        self._task = TaskID(0)
        self._what, self._unit = "", ""
        self._done = self._total = 0.0
        self._start = self._phase_start = time.monotonic()
        self._last_line = 0.0

    # --- counting -------------------------------------------------------------------------------------------

    def received(self, answer: Answer) -> None:
        """Count an answer of an endpoint."""
        self.answers += 1
        self.completion_tokens += answer.completion_tokens or 0
        self._show()

    def retried(self, reason: str) -> None:
        """Count a failed attempt that is retried."""
        self.retries[reason] += 1
        self._show()

    def keep(self, tokens: int = 0) -> None:
        """Count a row or document that is kept, with its number of tokens."""
        self.kept += 1
        self.kept_tokens += tokens
        self.share(MADE, True)

    def drop(self, reason: str, detail: str = "") -> None:
        """Count something that is dropped. `detail`: the message, by default the reason."""
        self.dropped[reason] += 1
        self.first_drop = self.first_drop or (f"{reason}: {detail}" if detail not in ("", reason) else reason)

    def drop_made(self, reason: str, detail: str = "") -> None:
        """Count a sample or document that is dropped after it was paid for."""
        self.drop(reason, detail)
        self.share(MADE, reason in _GOOD_ENOUGH)

    def share(self, what: str, usable: bool) -> None:
        """Count something that was paid for, and whether it is usable."""
        share = self.shares.setdefault(what, Share())
        share.total += 1
        share.usable += usable

    def drop_kept(self, reason: str, tokens: int = 0) -> None:
        """Count a row as dropped that was counted as kept before. It was usable."""
        self.kept -= 1
        self.kept_tokens -= tokens
        self.dropped[reason] += 1

    def drop_reasons(self) -> str:
        """The four most frequent reasons of drops, with their counts."""
        return ", ".join(f"{reason} {n}" for reason, n in self.dropped.most_common(4))

    # --- showing --------------------------------------------------------------------------------------------

    def print(self, text: str) -> None:
        """Print a line above the progress."""
        self._console.print(redact_text(text))

    def start(self, what: str, total: float, unit: str = "") -> None:
        """Start a phase of the run.

        Args:
            what: the name of the phase.
            total: its size.
            unit: the unit of the size; by default the items of `what`.
        """
        self.stop()
        self._what, self._unit, self._done, self._total = what, unit, 0.0, total
        self._phase_start, self._last_line = time.monotonic(), 0.0
        if self._console.is_terminal:
            count = MofNCompleteColumn() if not unit else text_column("{task.fields[count]}")
            self._live = Progress(
                text_column("{task.description}"),
                BarColumn(bar_width=12),
                count,
                text_column("{task.fields[status]}"),
                console=self._console,
            )
            self._live.start()
            self._task = self._live.add_task(what, total=total, status="", count="")

    def advance(self, by: float = 1.0) -> None:
        """Add to the part of the phase that is done."""
        self._done += by
        self._show(last=self._done >= self._total)

    def stop(self) -> None:
        """End the phase."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        self._what = ""

    def status(self) -> str:
        """Summarize the run in one line.

        kept 12 · dropped 3 (truncated 2, low_compliance 1) · 61 answers · 340 tok/s · cost 0.12 · 3m00s left
        """
        parts = []
        if self.kept or self.dropped:
            parts.append(f"kept {self.kept}")
        if self.dropped:
            parts.append(f"dropped {self.dropped.total()} ({self.drop_reasons()})")
        elapsed = max(1e-3, time.monotonic() - self._start)
        if self.answers:
            parts.append(f"{self.answers} answers")
            parts.append(f"{self.completion_tokens / elapsed:.0f} tok/s")
        if self.reused:
            parts.append(f"{self.reused} reused")
        if self.retries:
            parts.append(f"{self.retries.total()} retries")
        cost = self.log.totals.cost if self.log is not None else None
        if cost is not None:
            parts.append(f"cost {money(cost)}")
        if 0 < self._done < self._total:
            spent = time.monotonic() - self._phase_start
            parts.append(f"{_duration(spent / self._done * (self._total - self._done))} left")
        return " · ".join(parts)

    def _show(self, *, last: bool = False) -> None:
        now = time.monotonic()
        if not self._what:
            return
        if self._live is not None:
            count = f"{self._done:,.0f}/{self._total:,.0f} {self._unit}"
            self._live.update(self._task, completed=self._done, status=self.status(), count=count)
        elif last or now - self._last_line >= _PLAIN_EVERY_S:
            self._last_line = now
            unit = f" {self._unit}" if self._unit else ""
            self._console.print(f"{self._what} {self._done:,.0f}/{self._total:,.0f}{unit}  {self.status()}")


def money(amount: float) -> str:
    """Format a cost, in the currency of the configured prices."""
    return f"{amount:,.2f}" if amount >= 1 else f"{amount:.4f}"


def _duration(seconds: float) -> str:
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{secs:02d}s" if minutes else f"{secs}s"
