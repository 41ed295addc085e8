"""A spec, split into sections, of which a prompt contains only the relevant ones in full.

spec = Spec.read("spec.md", model_name="Quill", provider_name="Fern")
spec.sections[3].id                           # "v3-care-for-those-who-are-not-in-the-room"
spec.for_categories(["rule-5"], summaries)    # summaries of all sections, and the full text of rule 5
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from delib_fast.config import ConfigError
from delib_fast.files import read_text

_HEADING = re.compile(r"(#{1,6})[ \t]+([^ \t].*)", re.DOTALL)
_UNDERLINE = re.compile(r"^(=+|-{3,})[ \t]*$")
_FENCE = re.compile(r"^[ \t]*(```|~~~)")
_NUMBERED = re.compile(r"^(\d{1,3})[.)][ \t]+(.*)$")
_ANCHOR = re.compile(r"\{#([\w.-]+)[^}]*\}")
_MAX_SLUGGED = 200  # characters of a title that can be in its id, which has at most 60
_PLACEHOLDER = re.compile(r"\{(model_name|provider_name)\}")


@dataclass(frozen=True)
class Section:
    """The part of a spec under one heading, or one numbered item of such a part."""

    id: str
    """A short, stable name, which is also the category of a row."""
    title: str
    path: tuple[str, ...]
    """The enclosing headings, outermost first."""
    text: str
    """The text as in the spec, with the heading."""
    line: int
    """The line of the spec where the section begins, from 1."""


@dataclass(frozen=True)
class Spec:
    """A spec, whole and in sections."""

    text: str
    """The whole spec, with its placeholders filled in."""
    sha256: str
    """Hash of the filled-in text."""
    sections: tuple[Section, ...]

    @staticmethod
    def read(
        path: str | os.PathLike[str], *, model_name: str, provider_name: str, cut_numbered_items: bool = True
    ) -> Spec:
        """Read a spec from a Markdown or text file. Raises ConfigError if it cannot be read or is empty."""
        try:
            text = read_text(path)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: the spec cannot be read: {error}") from None
        return Spec.of(
            text,
            model_name=model_name,
            provider_name=provider_name,
            cut_numbered_items=cut_numbered_items,
            where=str(path),
        )

    @staticmethod
    def of(
        text: str,
        *,
        model_name: str = "the assistant",
        provider_name: str = "its developer",
        cut_numbered_items: bool = True,
        where: str = "spec",
    ) -> Spec:
        """Fill in the placeholders, and split the text at its headings. Raises ConfigError if the text is empty.

        Args:
            cut_numbered_items: also split lists of rules into their items.
            where: the file, for errors; its stem names a section before the first heading.
        """
        names = {"model_name": model_name, "provider_name": provider_name}
        text = _PLACEHOLDER.sub(lambda m: names[m[1]], text.replace("\r\n", "\n").lstrip("\ufeff"))
        if not text.strip():
            raise ConfigError(f"{where}: the spec is empty")
        parts = _by_headings(text.split("\n"), fallback=Path(where).stem)
        if cut_numbered_items:
            parts = [piece for part in parts for piece in _by_items(part)]
        return Spec(text, hashlib.sha256(text.encode()).hexdigest(), tuple(_named(parts)))

    def section(self, name: str) -> Section | None:
        """Return the section with this id or title, ignoring case and punctuation; None if there is none."""
        return self._by_name.get(name) or self._by_name.get(_slug(name))

    @cached_property
    def _by_name(self) -> dict[str, Section]:
        """The sections by id, and by the slug of their title where that is not the id of another section."""
        by_title = {_slug(s.title): s for s in reversed(self.sections)}
        return {**by_title, **{s.id: s for s in self.sections}}

    def for_categories(self, categories: Iterable[str], summaries: Mapping[str, str]) -> str:
        """Return the spec for a prompt: a summary of every section, then the full text of the relevant ones.

        The text of a section does not include its subsections, which are sections of their own.

        Args:
            categories: ids of the relevant sections.
            summaries: the summary of each section, by id.
        """
        wanted = set(categories)
        lines = [f"- {s.id} ({' › '.join((*s.path, s.title))}): {summaries[s.id]}" for s in self.sections]
        relevant = [f"[{s.id}]\n{s.text.strip()}" for s in self.sections if s.id in wanted]
        return (
            "Summary of every section:\n"
            + "\n".join(lines)
            + "\n\nFull text of the relevant sections:\n\n"
            + "\n\n".join(relevant)
        )


def first_sentence(section: Section, limit: int = 240) -> str:
    """Return the first sentence of a section, without its heading, cut to about `limit` characters."""
    body = " ".join(line for line in section.text.split("\n") if _heading(line) is None)
    body = re.sub(r"[*`]+", "", re.sub(r"\s+", " ", body)).strip() or section.title
    body = _NUMBERED.sub(r"\2", body)
    end = re.search(r"(?<=[.!?])\s", body)
    sentence = body[: end.start()] if end else body
    return sentence if len(sentence) <= limit else sentence[:limit].rsplit(" ", 1)[0] + " …"


# --- splitting ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    path: tuple[str, ...]
    title: str
    lines: tuple[str, ...]
    line: int
    number: str | None = None
    anchor: str | None = None


def _by_headings(lines: Sequence[str], fallback: str) -> list[_Part]:
    parts: list[_Part] = []
    above: list[tuple[int, str]] = []
    start, title = 0, fallback
    path: tuple[str, ...] = ()
    anchor: str | None = None
    fenced = False

    def close(end: int) -> None:
        body = lines[start:end]
        has_own_text = any(
            line.strip() and _heading(line) is None and not _UNDERLINE.match(line)
            for line in body[1 if parts or above else 0 :]
        )
        if has_own_text:
            parts.append(_Part(path, title, tuple(body), start + 1, anchor=anchor))

    for i, line in enumerate(lines):
        if _FENCE.match(line):
            fenced = not fenced
        found = None if fenced else _heading_at(lines, i)
        if found is None:
            continue
        close(i)
        level, name = found
        name, anchor = _split_anchor(name)
        above = [(lv, t) for lv, t in above if lv < level]
        start, title, path = i, name, tuple(t for _, t in above)
        above.append((level, name))
    close(len(lines))
    return parts


def _heading(line: str) -> tuple[int, str] | None:
    """The level and the title of a line such as `## Title ##`; None if it is not a heading."""
    match = _HEADING.fullmatch(line)
    if match is None:
        return None
    title = match[2].rstrip(" \t").rstrip("#").rstrip(" \t") or "#"
    return len(match[1]), title.strip()


def _split_anchor(title: str) -> tuple[str, str | None]:
    """Split the title `A title {#anchor attribute}` into ("A title", "anchor")."""
    start = title.rfind("{#")
    match = _ANCHOR.fullmatch(title, start) if start >= 0 else None
    if match is None:
        return title, None
    return title[:start].rstrip(" \t") or title, match[1]


def _heading_at(lines: Sequence[str], i: int) -> tuple[int, str] | None:
    if (heading := _heading(lines[i])) is not None:
        return heading
    following = lines[i + 1] if i + 1 < len(lines) else ""
    before = lines[i - 1] if i else ""
    if lines[i].strip() and not before.strip() and _UNDERLINE.match(following):
        return (1 if following[0] == "=" else 2), lines[i].strip()
    return None


def _by_items(part: _Part) -> list[_Part]:
    """Split a part that is a list of rules into its introduction and its items. Any other part is not split.

    A part is a list of rules if it has at least three items numbered from 1, and either each item begins with bold
    words or the list is nearly the whole part. Numbered steps within an explanation are not rules.
    """
    starts = [(i, m) for i, line in enumerate(part.lines) if (m := _NUMBERED.match(line))]
    if len(starts) < 3 or [int(m[1]) for _, m in starts] != list(range(1, len(starts) + 1)):
        return [part]
    opening = part.lines[: starts[0][0]]
    opens_with_text = any(line.strip() and _heading(line) is None for line in opening)
    in_list = len("".join(part.lines[starts[0][0] :])) / max(1, len("".join(part.lines)))
    if in_list < 0.8 and not all(m[2].startswith("**") for _, m in starts):
        return [part]
    pieces = []
    if opens_with_text:
        pieces.append(_Part(part.path, part.title, opening, part.line, anchor=part.anchor))
    ends = [i for i, _ in starts[1:]] + [len(part.lines)]
    for (i, match), end in zip(starts, ends, strict=True):
        bold = re.match(r"\*\*(.+?)\*\*", match[2])
        title = (bold[1] if bold else re.split(r"(?<=[.:;])\s", match[2])[0]).strip(" .:")
        pieces.append(_Part((*part.path, part.title), title, part.lines[i:end], part.line + i, match[1]))
    return pieces


def _named(parts: Iterable[_Part]) -> list[Section]:
    """Assign ids: `rule-5` for item 5 of "Rules", otherwise the words of the heading. Repeated ids get a number."""
    sections: list[Section] = []
    taken: set[str] = set()
    copies: defaultdict[str, int] = defaultdict(lambda: 1)  # the highest number that was given to each id
    for part in parts:
        if part.number is not None:
            base = f"{_singular(_slug(part.path[-1]))}-{part.number}"
        else:
            base = part.anchor or _slug(part.title)
        name = base
        while name in taken:
            copies[base] += 1
            name = f"{base}-{copies[base]}"
        taken.add(name)
        sections.append(Section(name, part.title, part.path, "\n".join(part.lines).strip("\n"), part.line))
    return sections


def _slug(title: str) -> str:
    words = re.sub(r"['’]", "", title[:_MAX_SLUGGED].casefold())
    return re.sub(r"[^\w]+", "-", words).strip("-_")[:60].rstrip("-") or "section"


def _singular(word: str) -> str:
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word
