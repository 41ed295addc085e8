"""Print to a terminal or a log. Text from outside (rows, answers, names, messages) cannot control the terminal.

Every other module prints through this one: `echo` and `report_error` for lines, `console` for tables and progress bars,
`plain` for styled text. Control characters, ESC sequences and invisible characters are shown as escapes, and Rich's
markup in a text stays text. Lines are free of secrets.
"""

from __future__ import annotations

import argparse
import logging
import sys
import threading
import traceback
from collections.abc import Iterator
from types import TracebackType
from typing import IO, Any, NoReturn

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import TextColumn
from rich.segment import Segment
from rich.text import Text

from delib_fast.redaction import redact_text


def printable(text: object) -> str:
    """Return the text with every non-printable character except line breaks as its escape: `\\x1b`, `\\u202e`.

    These are control characters (C0 and C1), line and paragraph separators, bidirectional and zero-width formatting,
    surrogates and unassigned characters. A tab becomes four spaces.
    """
    shown = str(text)
    if shown.isprintable():
        return shown
    return "".join(c if c == "\n" or c.isprintable() else _escape(c) for c in shown)


def _escape(char: str) -> str:
    if char in "\t\xa0\u202f\u3000":
        return "    " if char == "\t" else " "  # white space that is not a space
    return char.encode("unicode_escape").decode()


def echo(text: object = "", *, err: bool = False) -> None:
    """Print a line without secrets to stdout, or to stderr."""
    _write(sys.stderr if err else sys.stdout, printable(redact_text(str(text))))


def print_document(text: str) -> None:
    """Print a text that has no secrets, such as a configuration, exactly as it is except for what is not printable."""
    _write(sys.stdout, printable(text))


def report_error(error: object) -> None:
    """Print `error: …` to stderr."""
    echo(f"error: {error}", err=True)


def _write(file: IO[str], text: str) -> None:
    print(_encodable(text, getattr(file, "encoding", None) or "utf-8"), file=file, flush=True)


_MARKS, _PLAIN_MARKS = "│┊■□·–−×…┃━─█", "|:#-.--x~|--#"  # ours, and those for other encodings; each has one column


def _encodable(text: str, encoding: str) -> str:
    """The text with escapes for what an encoding does not have, and with ASCII marks for ours."""
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        text = text.translate(str.maketrans(_MARKS, _PLAIN_MARKS)).encode("ascii", "backslashreplace").decode()
    return text


def guard_process_output() -> None:
    """Print through `echo` what Python itself prints: tracebacks that nothing catches, log records without a handler.

    For the entry points of the package.
    """

    def report(kind: type[BaseException], error: BaseException | None, where: TracebackType | None) -> None:
        echo("".join(traceback.format_exception(kind, error, where)).rstrip("\n"), err=True)

    sys.excepthook = report
    threading.excepthook = lambda args: report(args.exc_type, args.exc_value, args.exc_traceback)
    logging.lastResort = _EchoHandler(logging.WARNING)


class _EchoHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        echo(self.format(record), err=True)


class ArgumentParser(argparse.ArgumentParser):
    """A parser that prints a wrong argument as text, without control characters, and exits with code 2."""

    def error(self, message: str) -> NoReturn:
        echo(self.format_usage().rstrip("\n"), err=True)
        report_error(message)
        sys.exit(2)


class PlainConsole(Console):
    """A console of Rich that prints strings as they are, without markup, and all text printable."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            if segment.control is None and not (segment.text.isascii() and segment.text.isprintable()):
                yield Segment(_encodable(printable(segment.text), self.encoding), segment.style)
            else:
                yield segment


def console(*, err: bool = False, width: int | None = None) -> PlainConsole:
    """A console on stdout or stderr. Without a terminal, lines are not wrapped unless a width is given."""
    file = sys.stderr if err else sys.stdout
    return PlainConsole(file=file, width=width, soft_wrap=width is None and not file.isatty())


def plain(text: object, style: str = "") -> Text:
    """Printable text for a console, in a style of ours."""
    return Text(printable(text), style)


def text_column(field: str) -> TextColumn:
    """A column of a progress bar that shows a field of the task, e.g. "{task.description}"."""
    return TextColumn(field, markup=False)
