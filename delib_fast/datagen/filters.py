"""The format filter: what an answer must be before a judge is paid to read it. Each fault has a name to count by."""

from __future__ import annotations

import re
from collections.abc import Sequence

from delib_fast.datagen.citations import Label, cited, mentions_spec
from delib_fast.datagen.dedup import words_of
from delib_fast.datagen.parsing import COT_TAG, RESPONSE_TAG, Deliberation
from delib_fast.datagen.request_log import Answer
from delib_fast.datagen.settings import DeliberateSettings

_SCAFFOLDING = re.compile(
    rf"</?(?:{COT_TAG}|{RESPONSE_TAG}|think|thinking|reasoning|answer|scratchpad|conversation|cot|response)"
    r"(?: [0-9a-f]{8})?>"
    r"|<\|[^|<>\n]{1,40}\|>|<[｜|][^<>\n]{1,40}[｜|]>|\[/?INST\]|</?s>|\{\{|\}\}|\{(?:model_name|provider_name)\}",
    re.IGNORECASE,
)
_CUT_FINISH = {"length", "max_tokens"}


def was_cut(answer: Answer) -> bool:
    """Did the endpoint stop at the limit of tokens?"""
    return answer.finish in _CUT_FINISH


def leaked_scaffolding(text: str) -> bool:
    """Are tags, control tokens, slots or marks of prompts left in a text?"""
    return _SCAFFOLDING.search(text) is not None


def format_fault(
    answer: Answer, parted: Deliberation, settings: DeliberateSettings, labels: Sequence[Label], conversation: str
) -> str | None:
    """The reason to drop a generated answer, or None.

    truncated, content_filter: the endpoint stopped it. no_cot, no_response, cot_too_short, response_too_short: a part
    is not there. leaked_scaffolding: tags, control tokens or marks of our prompts are in it. mentions_spec (style
    internal): it speaks of a spec or quotes it. no_citation (style cite): the CoT names no clause.
    """
    if was_cut(answer):
        return "truncated"
    if answer.finish == "content_filter":
        return "content_filter"
    if parted.fault:
        return parted.fault
    for name, part, least in (
        ("cot", parted.cot, settings.least_cot_words),
        ("response", parted.response, settings.least_response_words),
    ):
        if not part:
            return f"no_{name}"
        if leaked_scaffolding(part):
            return "leaked_scaffolding"
        if len(words_of(part)) < least:
            return f"{name}_too_short"
    assert parted.cot
    assert parted.response
    if settings.style == "cite":
        return None if cited(parted.cot, labels) else "no_citation"
    both = (parted.cot, parted.response)
    return "mentions_spec" if any(mentions_spec(t, labels, asked_about=conversation) for t in both) else None
