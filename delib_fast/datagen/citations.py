"""Find which sections of a spec a text cites, and whether it mentions a spec or policy, by its words only.

A section is cited by its id or number (`rule-5`, "Rule 5", "V3"), by its title, or by a quotation of its words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from delib_fast.data.decontamination import words_of
from delib_fast.datagen.spec import Section, Spec

_NAME_CHARS = 200
_QUOTED_WORDS = 7  # this many consecutive words of a section are a quotation of it
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
    """The names and quotations by which a category is recognized in a text."""

    category: str
    pattern: re.Pattern[str]
    """Matches any name of the category."""
    quotations: frozenset[str] = frozenset()
    """The word 7-grams of the category's section."""

    @cached_property
    def word(self) -> re.Pattern[str]:
        """Matches the written label of the category (V3, rule-5)."""
        return _label_word(self.category)


def labels_of_spec(spec: Spec) -> list[Label]:
    """Return the label of each section of a spec."""
    return [
        Label(s.id, pattern_of_names(_names_of(s)), frozenset(_quotations(words_of(_body(s))))) for s in spec.sections
    ]


def labels_of_names(categories: Iterable[str]) -> list[Label]:
    """Return labels of categories without a spec, by name only: "Self-Harm", "Violence / Physical Harm"."""
    return [Label(category, pattern_of_names(names_of_category(category))) for category in categories]


def names_of_category(category: str) -> list[str]:
    """Return the name of a category and its parts: "Violence / Physical Harm" is also named by "Physical Harm"."""
    return [category, *(category.split("/") if len(category) <= _NAME_CHARS else ())]


def cited(text: str, labels: Sequence[Label]) -> list[str]:
    """Return the categories that a text cites, in the order of the labels."""
    quotations = set(_quotations(words_of(text)))
    return [
        label.category for label in labels if label.pattern.search(text) or not quotations.isdisjoint(label.quotations)
    ]


def mentions_spec(text: str, labels: Sequence[Label], *, prompt: str = "") -> str | None:
    """Return the words with which a text mentions or quotes a spec, policy or numbered rule, or None.

    Args:
        prompt: words that occur in the prompt (an insurance policy, the rules of chess) do not count.
    """
    prompt_words = prompt.casefold()
    in_prompt: dict[str, bool] = {}  # for each noun; there are few of them
    for match in _SPEC_WORDS.finditer(text):
        noun = next(group for group in match.groups() if group).casefold()
        if noun not in in_prompt:
            in_prompt[noun] = noun in prompt_words
        if not in_prompt[noun]:
            return match[0]
    quotations = set(_quotations(words_of(text)))
    for label in labels:
        if (named := label.word.search(text)) and named[0] not in prompt:
            return named[0]
        if quoted := sorted(quotations & label.quotations):
            return quoted[0]
    return None


def _label_word(category: str) -> re.Pattern[str]:
    """Match the written label of a category (V3, rule-5). Titles do not count: "honesty" is an ordinary word."""
    short = re.match(r"^([a-z]{1,3}\d{1,3})(?:-|$)", category)
    return re.compile(
        rf"\b{short[1].upper()}\b" if short else rf"\b{re.escape(category)}\b" if "-" in category else r"(?!)"
    )


_POLICY_WORDS = re.compile(r"\b(?:polic(?:y|ies)|guidelines?|(?:dis)?allowed)\b", re.IGNORECASE)
_RULE_WORDS = re.compile(r"\b(?:rules?|clauses?|sections?|principles?|spec|values?)\b", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")


def policy_sentences(text: str, *, spec_words: bool = False) -> str:
    """Return the sentences that mention policy, joined; "" if there are none (the excerpts of arXiv 2412.16339, §4.2).

    Args:
        spec_words: also include sentences that mention rules, clauses, sections, principles or values, for specs that
            are not called policies.
    """
    sentences = _SENTENCE_END.split(text)
    found = [s for s in sentences if _POLICY_WORDS.search(s) or (spec_words and _RULE_WORDS.search(s))]
    return " ".join(s.strip() for s in found)


def _names_of(section: Section) -> list[str]:
    names = [section.id, section.title]
    if match := _NUMBERED_ID.match(section.id):
        names.append(f"{match['word']} {match['number']}")
    if match := _LETTER_TITLE.match(section.title):
        names += [match["label"], section.title[match.end() :].strip()]
    return [name for name in names if name]


def pattern_of_names(names: Iterable[str]) -> re.Pattern[str]:
    """Match any of these names as whole words, ignoring case; white space and hyphens between words are equal.

    A name without words, or of more than 200 characters, is not searched for.
    """
    words = ([word for word in re.split(r"[\s-]+", name) if word] for name in names if len(name) <= _NAME_CHARS)
    found = [r"[\s-]+".join(map(re.escape, parts)) for parts in words if parts]
    return re.compile("|".join(rf"(?<!\w){name}(?!\w)" for name in found) or "(?!)", re.IGNORECASE)


def _body(section: Section) -> str:
    return "\n".join(line for line in section.text.split("\n") if not line.startswith("#"))


def _quotations(words: Sequence[str]) -> Iterable[str]:
    return (" ".join(words[i : i + _QUOTED_WORDS]) for i in range(len(words) - _QUOTED_WORDS + 1))
