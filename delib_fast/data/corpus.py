"""What is counted in documents before a stage trains on them: stated reasons, and descriptions of monitoring.

Documents that describe monitors of a model's chain of thought teach the model to write for the monitor: they raised
undetected deception from 1.7 % to 25.7 % (gpt-oss-120b, arXiv 2605.15257).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from delib_fast.data.rows import Row

CORPUS_FORMAT = 1
"""Increased when `check_corpus` counts something else: stored counts are then computed again."""
_FIRST = 5  # mentions that are recorded with their location
_MAX_EXCERPT = 160

_SENTENCE_END = re.compile(r"[.!?](?=\s)|\n")
_WATCHING = re.compile(
    r"\b(?:monitor|surveil|overs(?:ee|aw|ight)|audit|inspect|scrutin|observ|watch|detect|flag|classifier)\w*", re.I
)
_MONITORS = re.compile(r"\b(?:monitor|surveil)\w*", re.I)
_MODEL = r"(?:AIs?|LLMs?|(?:language |reasoning |AI )?models?|assistants?|agents?|chatbots?)"
_REASONING = re.compile(
    r"\bchains?[- ]of[- ]thoughts?\b|\b(?-i:CoTs?)\b|\bscratch ?-?pads?\b"
    r"|\b(?:reasoning|thinking|thought)[- ](?:traces?|process(?:es)?|steps?|tokens?|logs?|blocks?)\b"
    r"|\b(?:hidden|internal|private|inner|intermediate|visible|written|model'?s)"
    r" (?:reasoning|thoughts?|thinking|monologue)\b"
    r"|\b(?:its|their) (?:reasoning|thoughts|thinking)\b",
    re.I,
)
_WATCHED_MODEL = re.compile(
    rf"\b(?:monitor|watch|surveil|audit|inspect|oversee)(?:s|es|ed|ing|ling)?\s+(?:(?:the|an?|its|every|each|all|your|our|"
    rf"how|what|of)\s+)*{_MODEL}\b"
    rf"|\b{_MODEL}\s+(?:(?:is|are|was|were|be|been|being|gets?|will)\s+)+(?:\w+\s+)?(?:monitored|watched|surveilled|observed|audited)\b"
    r"|\b(?:CoT|reasoning|thoughts?|AI|activation|output|safety)[- ]monitor(?:s|ing)?\b|\bmonitorab(?:le|ility)\b",
    re.I,
)
_REASON = re.compile(
    r"\b(?:because|so that|in order to|due to|owing to|(?:that|which) is why|for (?:this|that) reason"
    r"|the reason (?:is|why|that)|values?|valued|cares? (?:about|for)|believes?|prefers?|prioriti[sz]es?"
    r"|is committed to|aims? to|wants? to|is (?:meant|designed|trained|built|intended) to)\b",
    re.I,
)


@dataclass(frozen=True, slots=True)
class Mention:
    """A sentence that describes monitoring of a model or of its reasoning."""

    location: str
    """`file:line` of the document."""
    sentence: str


@dataclass(slots=True)
class Guard:
    """Counts over the documents of a corpus: reasons, and mentions of monitoring."""

    documents: int = 0
    words: int = 0
    with_reason: int = 0
    """Documents that state a reason or a value, by a list of words and phrases."""
    reasons: int = 0
    with_monitoring: int = 0
    """Documents that describe monitoring of a model or of its reasoning."""
    mentions: list[Mention] = field(default_factory=list)
    """The first of them."""

    def add(self, row: Row) -> None:
        """Count a document."""
        text = row.text
        reasons = sum(1 for _ in _REASON.finditer(text))
        self.documents += 1
        self.words += len(text.split())
        self.reasons += reasons
        self.with_reason += reasons > 0
        sentence = mention_of_monitoring(text)
        if sentence is not None:
            self.with_monitoring += 1
            if len(self.mentions) < _FIRST:
                self.mentions.append(Mention(row.location, sentence))

    def to_data(self) -> dict[str, Any]:
        """As plain JSON, for the ledger and reports."""
        return {
            "documents": self.documents,
            "words": self.words,
            "documents_with_reasons": self.with_reason,
            "reasons_per_1000_words": round(1000 * self.reasons / max(1, self.words), 3),
            "documents_on_monitoring": self.with_monitoring,
            "monitoring": [{"location": m.location, "sentence": m.sentence} for m in self.mentions],
        }


def check_corpus(rows: Iterable[Row]) -> dict[str, Any]:
    """Count what `Guard` counts over the documents among some rows, in one pass."""
    guard = Guard()
    for row in rows:
        if row.kind == "document":
            guard.add(row)
    return guard.to_data()


def monitoring_warning(corpus: Mapping[str, Any]) -> str | None:
    """A warning that names documents on monitoring, with their locations; None if there are none.

    Args:
        corpus: what `check_corpus` returned.
    """
    if not corpus.get("documents_on_monitoring"):
        return None
    count, first = corpus["documents_on_monitoring"], corpus["monitoring"]
    listed = "".join(f"\n  {m['location']}: {m['sentence']}" for m in first)
    more = f"\n  and {count - len(first):,} more" if count > len(first) else ""
    return (
        f"{count:,} of {corpus['documents']:,} documents describe monitoring of a model or of its reasoning. Documents "
        "on monitors of the chain of thought raised undetected deception from 1.7 % to 25.7 % (arXiv 2605.15257); "
        f"remove them unless they are what you study:{listed}{more}"
    )


def mention_of_monitoring(text: str) -> str | None:
    """The first sentence that describes monitoring of a model or of its reasoning; None if there is none.

    A list of words decides: a sentence that names both a chain of thought and somebody who watches, or a model that is
    watched. A model that monitors something else does not count.
    """
    at = 0
    while (found := _WATCHING.search(text, at)) is not None:
        start = max(
            (m.end() for m in _SENTENCE_END.finditer(text, max(0, found.start() - 600), found.start())), default=0
        )
        start = max(start, found.start() - 600)
        end_match = _SENTENCE_END.search(text, found.end())
        end = min(end_match.end() if end_match else len(text), found.end() + 600)
        sentence = text[start:end]
        if _REASONING.search(sentence) or _WATCHED_MODEL.search(sentence):
            shown = " ".join(sentence.split())
            return shown if len(shown) <= _MAX_EXCERPT else shown[: _MAX_EXCERPT - 1] + "…"
        at = max(end, found.end())
    return None
