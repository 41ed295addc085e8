"""Which sections of a spec a text cites, and whether it speaks of a spec at all: by words, with no model.

A section is cited by its id or number (`rule-5`, "Rule 5", "V3"), by its title, or by a run of its words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from delib_fast.datagen.dedup import words_of
from delib_fast.datagen.spec import Section, Spec

_QUOTED_WORDS = 7  # so many words of a section in a row are a quotation of it
_NUMBERED_ID = re.compile(r"^(?P<word>[a-z]+)-(?P<number>\d{1,3})$")
_LETTER_TITLE = re.compile(r"^(?P<label>[A-Z]{1,3}\d{1,3}(?:\.\d{1,3})*)[.:)\s]")
_SPEC_WORDS = re.compile(
    r"\b(?:(?:the|this|my|our|its|model)\s+(?P<a>spec)\b|(?P<b>specification)s?\s+(?:says?|states?|requires?|asks?)\b"
    r"|(?:system|hidden|given|provided|the|these|those|my|our|safety|content|usage|relevant|following)\s+"
    r"(?P<c>guideline|polic|instruction)(?:s|y|ies)?\b"
    r"|(?P<d>rule|section|clause|principle|value|policy)\s+\d{1,3}\b"
    r"|according\s+to\s+(?:the\s+|my\s+)?(?P<e>rule|section|clause|principle|polic|guideline)"
    r"|(?P<f>SP)\d+\b)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Label:
    """What a category is called in a text."""

    category: str
    pattern: re.Pattern[str]
    quotations: frozenset[str] = frozenset()


def labels_of_spec(spec: Spec) -> list[Label]:
    return [Label(s.id, _pattern(_names_of(s)), frozenset(_runs(words_of(_body(s))))) for s in spec.sections]


def labels_of_names(categories: Iterable[str]) -> list[Label]:
    """Labels for categories that are known by name only, e.g. "Self-Harm" or "Violence / Physical Harm"."""
    labels = []
    for category in categories:
        parts = [part for part in re.split(r"\s*/\s*", category) if part]
        labels.append(Label(category, _pattern([category, *parts])))
    return labels


def cited(text: str, labels: Sequence[Label]) -> list[str]:
    """The categories that a text cites, in the order of the labels."""
    runs = set(_runs(words_of(text)))
    return [label.category for label in labels if label.pattern.search(text) or not runs.isdisjoint(label.quotations)]


def mentions_spec(text: str, labels: Sequence[Label], *, asked_about: str = "") -> str | None:
    """The words by which a text speaks of a spec, policy or rule number, or quotes one; None if it does not.

    A word that the person brought up (`asked_about` is the prompt: an insurance policy, the rules of chess) is theirs.
    """
    asked = asked_about.casefold()
    for match in _SPEC_WORDS.finditer(text):
        noun = next(group for group in match.groups() if group)
        if noun.casefold() not in asked:
            return match[0]
    runs = set(_runs(words_of(text)))
    for label in labels:
        if (named := _label_word(label.category).search(text)) and named[0] not in asked_about:
            return named[0]
        if quoted := sorted(runs & label.quotations):
            return quoted[0]
    return None


def _label_word(category: str) -> re.Pattern[str]:
    """The written label of a category (V3, rule-5), never its everyday title: "honesty" alone is no mention."""
    short = re.match(r"^([a-z]{1,3}\d{1,3})(?:-|$)", category)
    return re.compile(
        rf"\b{short[1].upper()}\b" if short else rf"\b{re.escape(category)}\b" if "-" in category else r"(?!)"
    )


POLICY_WORDS = re.compile(
    r"\b(?:polic(?:y|ies)|guidelines?|allowed|disallowed|rules?|spec|section|principles?)\b", re.IGNORECASE
)


def policy_sentences(text: str) -> str:
    """The sentences that speak of a policy, and the one after each (arXiv 2412.16339, §4.2 looks for such excerpts)."""
    sentences = re.split(r"(?<=[.!?])\s+|\n+", text)
    wanted = {i for i, s in enumerate(sentences) if POLICY_WORDS.search(s)}
    return "\n".join(sentences[i] for i in sorted(wanted))


def _names_of(section: Section) -> list[str]:
    names = [section.id, section.title]
    if match := _NUMBERED_ID.match(section.id):
        names.append(f"{match['word']} {match['number']}")
    if match := _LETTER_TITLE.match(section.title):
        names += [match["label"], section.title[match.end() :].strip()]
    return [name for name in names if name]


def _pattern(names: Iterable[str]) -> re.Pattern[str]:
    escaped = (r"[\s-]+".join(map(re.escape, re.split(r"[\s-]+", name.strip()))) for name in names)
    return re.compile("|".join(rf"(?<!\w){name}(?!\w)" for name in escaped), re.IGNORECASE)


def _body(section: Section) -> str:
    return "\n".join(line for line in section.text.split("\n") if not line.startswith("#"))


def _runs(words: Sequence[str]) -> Iterable[str]:
    return (" ".join(words[i : i + _QUOTED_WORDS]) for i in range(len(words) - _QUOTED_WORDS + 1))
