"""Markdown files, split into sections."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass

_HEADING = re.compile(r"(#{1,6})(?:[ \t]|$)")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")


@dataclass(frozen=True, slots=True)
class Section:
    """A section of a Markdown file."""

    line: int
    """Line of the section's heading, from 1."""
    context: tuple[str, ...]
    """The enclosing headings, outermost first, as written in the file."""
    body: str
    """The section's heading and everything up to the next one, unchanged."""

    @property
    def text(self) -> str:
        """The enclosing headings, followed by the body."""
        return "".join(f"{heading}\n\n" for heading in self.context) + self.body


def cut_at_headings(text: str) -> Iterator[Section]:
    """Yield one section for each Markdown heading (`#` … `######`). The concatenated bodies equal the text.

    Headings inside fenced code do not count. A heading that is directly followed by a deeper one is not a separate
    section: it and its blank lines are the beginning of the next section's body.
    """
    context: list[tuple[int, str]] = []  # (level, heading) of the headings above the current section
    start, lead, headings = 1, "", 0  # first line of the current section, and the bare headings it begins with
    lines: list[str] = []
    for number, level, line in _lines(text):
        if level:
            below_bare = bool(lines) and headings > 0 and _is_bare(lines) and level > context[-1][0]
            if below_bare:
                lead += "".join(lines)
            elif lines or lead:
                yield _section(start, context, headings, lead + "".join(lines))
                lead, headings, start = "", 0, number
            else:
                start = number
            lines = []
            while context and context[-1][0] >= level:
                context.pop()
            context.append((level, line.strip()))
            headings += 1
        lines.append(line)
    if lines or lead:
        yield _section(start, context, headings, lead + "".join(lines))


def _section(start: int, context: list[tuple[int, str]], own: int, body: str) -> Section:
    return Section(start, tuple(heading for _, heading in context[: len(context) - own]), body)


def _is_bare(lines: list[str]) -> bool:
    return not any(line.strip() for line in lines[1:])


def _lines(text: str) -> Iterator[tuple[int, int, str]]:
    """Yield (number, heading level or 0, line with its line break) of every line."""
    fence = ""
    for number, line in enumerate(io.StringIO(text, newline="\n"), start=1):
        mark = _FENCE.match(line)
        if fence:
            # A line of at least as many of the same characters, and nothing else, closes the fence.
            if mark and mark[1].startswith(fence) and not line[mark.end() :].strip():
                fence = ""
            yield number, 0, line
            continue
        if mark:
            fence = mark[1]
            yield number, 0, line
            continue
        heading = _HEADING.match(line)
        yield number, len(heading[1]) if heading else 0, line
