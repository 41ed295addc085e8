"""Prompts with the replies of one or several models, for a terminal and for HTML pages.

A chain of thought is marked by `┊`, a response by `│`, and the end of a reply by `■` or `□`, so that they can be told
apart without colours. The text of a model is untrusted: it is escaped in both forms.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from delib_fast.data import Message, Segment
from delib_fast.evals.replies import ModelFigures, Sample, SampledReply, SampleSet
from delib_fast.files import write_atomic
from delib_fast.preview.colours import COLOURS
from delib_fast.reports.html import HtmlTable, render
from delib_fast.terminal import plain, printable

WIDTH = 80
_COT, _RESPONSE, _ENDED, _CUT = "┊ ", "│ ", "■ ", "□ "
_MIN_COLUMN = 38
_PROMPT_CHARACTERS = 600
_FIGURE_COLUMNS = ("model", "log p(opens CoT)", "opened", "closed", "ended", "CoT tokens", "tokens")


# --- terminal -----------------------------------------------------------------------------------------------


def print_samples(found: SampleSet, console: Console) -> None:
    """Print every prompt with its replies, next to each other where they fit, and a table of figures."""
    for number, sample in enumerate(found.samples, 1):
        console.print()
        for part in _prompt_lines(sample, f"prompt {number} of {len(found.samples)}", console):
            console.print(part)
        for replies in _rows_of_replies(sample, [f.model for f in found.figures]):
            console.print()
            console.print(_side_by_side([_reply_lines(r) for r in replies], console))
    console.print()
    console.print(_figures_table(found.figures))
    for line in notes(found):
        console.print(plain(line, "dim"))


def _prompt_lines(sample: Sample, heading: str, console: Console) -> Iterator[Text]:
    yield plain(f"{heading}  {sample.location}{f'  ({sample.label})' if sample.label else ''}", "bold")
    for message in sample.prompt:
        text = message.content.strip()
        more = len(text) - _PROMPT_CHARACTERS
        shown = text if more <= 0 else f"{text[:_PROMPT_CHARACTERS]} … ({more:,} more characters)"
        yield from _block(f"{message.role}: ", shown, COLOURS[Segment.PROMPT], console.width, console)


def _rows_of_replies(sample: Sample, models: Sequence[str]) -> Iterator[list[SampledReply]]:
    """The first reply of each model, then the second ones, and so on."""
    by_model = [[r for r in sample.replies if r.model == model] for model in models]
    for k in range(max(map(len, by_model), default=0)):
        yield [replies[k] for replies in by_model if len(replies) > k]


def _side_by_side(replies: Sequence[list[tuple[str, str, str]]], console: Console) -> RenderableType:
    columns = len(replies) if len(replies) * (_MIN_COLUMN + 2) <= console.width + 2 else 1
    width = (console.width - 2 * (columns - 1)) // columns
    cells = [_joined([line for part in reply for line in _block(*part, width, console)]) for reply in replies]
    if columns == 1:
        return _joined([line for cell in cells for line in (cell, plain(""))][:-1])
    grid = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
    for _ in range(columns):
        grid.add_column(width=width)
    grid.add_row(*cells)
    return grid


def _joined(lines: Sequence[Text]) -> Text:
    return plain("\n").join(lines)


def _reply_lines(sampled: SampledReply) -> list[tuple[str, str, str]]:
    """The parts of a reply: (mark of each line, text, style)."""
    view, cot, response = _reply_view(sampled), COLOURS[Segment.COT], COLOURS[Segment.RESPONSE]
    parts = [("", view.heading, "bold")]
    if view.facts:
        parts.append(("", view.facts, "dim"))
    if view.cot_heading:
        parts += [(_COT, view.cot_heading, f"bold {cot}"), (_COT, view.cot, cot)]
    if view.response_shown:
        parts += [(_RESPONSE, "response", f"bold {response}"), (_RESPONSE, view.response, response)]
    return [*parts, (view.end_mark, view.end, "dim")]


def _block(mark: str, text: str, style: str, width: int, console: Console) -> list[Text]:
    """Wrap a text to a width, with a mark in front of each line."""
    lines = [
        wrapped
        for line in printable(text).split("\n")
        for wrapped in (plain(line, style).wrap(console, max(10, width - len(mark))) or [plain("")])
    ]
    first, rest = mark, mark if mark in ("", _COT, _RESPONSE) else "  "
    return [plain(first if k == 0 else rest, style) + line for k, line in enumerate(lines)]


def heading(sampled: SampledReply) -> str:
    """The model of a reply, and the verdict on it."""
    return " · ".join(part for part in (sampled.model, sampled.verdict and f"verdict: {sampled.verdict}") if part)


def reply_facts(sampled: SampledReply) -> str:
    """log p of the opening of the think block; "" if it is not known."""
    return "" if sampled.opening_log_p is None else f"log p(opens CoT) {sampled.opening_log_p:.2f}"


def cot_heading(sampled: SampledReply) -> str:
    """The length of a chain of thought, and whether its block was closed."""
    state = {"closed": "closed", "unclosed": "not closed"}.get(sampled.reply.tags, sampled.reply.tags)
    return f"CoT, {sampled.reply.cot_tokens} tokens, {state}"


def end_text(sampled: SampledReply) -> str:
    """How a reply ended."""
    stray = "; a lone think tag" if sampled.reply.tags == "stray" else ""
    how = "stopped by its end token" if sampled.reply.finished else "cut off at the length limit"
    return f"{how} after {sampled.reply.tokens} tokens{stray}"


def _figures_table(figures: Sequence[ModelFigures]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), collapse_padding=True)
    for name in _FIGURE_COLUMNS:
        shown = "\n".join(name.rsplit(" ", 1)) if name.startswith("CoT") else name.replace("(", "\n(")
        table.add_column(shown, justify="left" if name == "model" else "right", no_wrap=True)
    for row in figure_rows(figures):
        table.add_row(*map(plain, row))
    return table


def figure_rows(figures: Sequence[ModelFigures]) -> list[list[str]]:
    """One row per model: log p of the opening, counts over its replies, and mean lengths."""
    return [
        [
            f.model,
            "–" if f.opening_log_p is None else f"{f.opening_log_p:.2f}",
            *(f"{count} of {f.replies}" for count in (f.opened, f.closed, f.finished)),
            f"{f.mean_cot_tokens:.0f}" if f.opened else "–",
            f"{f.mean_tokens:.0f}",
        ]
        for f in figures
    ]


def notes(found: SampleSet) -> list[str]:
    """How the replies were drawn, and which moments are missing."""
    settings = found.settings
    how = "greedy" if not settings["temperature"] else f"temperature {settings['temperature']:g}"
    lines = [
        f"{how}, at most {settings['max_new_tokens']} tokens, seed {settings['seed']}, {settings['precision']}. "
        "log p(opens CoT): mean over prompts, in nats. Lengths are means."
    ]
    if settings["template_opens_thought"]:
        lines.append("The chat template opens the think block itself.")
    return lines + [f"{name}: missing: {reason}" for name, reason in found.missing.items()]


# --- HTML ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReplyView:
    """The parts of a reply, as a terminal and a page show them, with printable texts."""

    heading: str
    facts: str
    cot_heading: str
    cot: str
    response_shown: bool
    response: str
    end_mark: str
    end: str


@dataclass(frozen=True)
class SampleView:
    """A prompt with its replies, for a template."""

    heading: str
    prompt: tuple[Message, ...]
    replies: tuple[ReplyView, ...]


def sample_views(samples: Sequence[Sample]) -> list[SampleView]:
    """The samples that the macro `samples` of parts.jinja shows."""
    return [
        SampleView(
            " · ".join(part for part in (printable(s.location), printable(s.label)) if part),
            tuple(Message(m.role, printable(m.content.strip())) for m in s.prompt),
            tuple(map(_reply_view, s.replies)),
        )
        for s in samples
    ]


def _reply_view(sampled: SampledReply) -> ReplyView:
    reply = sampled.reply
    has_cot = reply.cot is not None or reply.opened
    return ReplyView(
        heading(sampled),
        reply_facts(sampled),
        cot_heading(sampled) if has_cot else "",
        printable(reply.cot or "(empty)"),
        reply.tags != "unclosed",
        printable(reply.response or "(empty)"),
        _ENDED if reply.finished else _CUT,
        end_text(sampled),
    )


def figures_html(figures: Sequence[ModelFigures]) -> HtmlTable:
    """The table of `print_samples`, with the weights of each model."""
    rows = [[*row, f.weights] for row, f in zip(figure_rows(figures), figures, strict=True)]
    columns = (*_FIGURE_COLUMNS, "weights")
    return HtmlTable(columns, rows, "Replies", range(1, len(_FIGURE_COLUMNS)))


def write_page(found: SampleSet, folder: Path) -> Path:
    """Write index.html to a folder."""
    page = render(
        "samples.jinja",
        title=f"Samples of {Path(found.source).name}",
        wide=True,
        source=found.source,
        figures=figures_html(found.figures),
        samples=sample_views(found.samples),
        notes=notes(found),
    )
    path = folder / "index.html"
    write_atomic(path, page)
    return path
