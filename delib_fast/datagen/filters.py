"""The format filter: what an answer must satisfy before it is judged. Dropped answers are counted by fault."""

from __future__ import annotations

import re
from collections.abc import Sequence

from delib_fast.data.decontamination import words_of
from delib_fast.data.read.cot_tags import TAGS
from delib_fast.datagen.answers import DAMAGED, Answer
from delib_fast.datagen.citations import Label, cited, mentions_spec
from delib_fast.datagen.parsing import COT_TAG, RESPONSE_TAG, Deliberation
from delib_fast.datagen.settings import DeliberateSettings

_SCAFFOLDING = re.compile(
    rf"</?(?:{COT_TAG}|{RESPONSE_TAG}|think|thinking|reasoning|answer|scratchpad|conversation|cot|response)"
    r"(?: [0-9a-f]{8})?>"
    rf"|{'|'.join(re.escape(tag) for pair in TAGS for tag in pair)}"
    r"|<\|[^|<>\n]{1,40}\|>|<[｜|][^<>\n]{1,40}[｜|]>|\[/?INST\]|</?s>|\{\{|\}\}|\{(?:model_name|provider_name)\}",
    re.IGNORECASE,
)


def leaked_scaffolding(text: str) -> bool:
    """Whether a text contains tags, control tokens, placeholders or markers of a prompt."""
    return _SCAFFOLDING.search(text) is not None


def answer_fault(answer: Answer, text: str) -> str | None:
    """Return why no text of an answer can be used: truncated, content_filter or damaged_text; None if it can.

    Args:
        text: the texts of the answer that would be used.
    """
    if answer.truncated:
        return "truncated"
    if answer.finish == "content_filter":
        return "content_filter"
    return "damaged_text" if DAMAGED in text else None


def format_fault(
    answer: Answer, parts: Deliberation, settings: DeliberateSettings, labels: Sequence[Label], conversation: str
) -> str | None:
    """Return the reason to drop a generated answer, or None.

        truncated, content_filter            the endpoint cut the answer off
        damaged_text                         it has characters that are not text, see `answers.clean_text`
        no_cot, no_response                  a part is missing
        cot_too_short, response_too_short    a part has too few words
        leaked_scaffolding                   it contains tags, control tokens or markers of our prompts
        mentions_spec (style internal)       it mentions or quotes a spec
        no_citation (style cite)             the CoT does not cite any section

    Args:
        parts: `split_answer` of the answer.
        labels: of the sections of the spec.
        conversation: the prompt; words that occur in it do not count as mentions of a spec.
    """
    if fault := answer_fault(answer, answer.text + (answer.reasoning or "")) or parts.fault:
        return fault
    for name, part, min_words in (
        ("cot", parts.cot, settings.least_cot_words),
        ("response", parts.response, settings.least_response_words),
    ):
        if not part:
            return f"no_{name}"
        if leaked_scaffolding(part):
            return "leaked_scaffolding"
        if len(words_of(part)) < min_words:
            return f"{name}_too_short"
    assert parts.cot
    assert parts.response
    if settings.style == "cite":
        return None if cited(parts.cot, labels) else "no_citation"
    both = (parts.cot, parts.response)
    return "mentions_spec" if any(mentions_spec(t, labels, prompt=conversation) for t in both) else None
