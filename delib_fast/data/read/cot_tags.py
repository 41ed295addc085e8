"""Split off a chain of thought that a reply contains between tags."""

from __future__ import annotations

import re
from typing import NoReturn

from delib_fast.data.rows import DataError

TAGS: tuple[tuple[str, str], ...] = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<SCRATCHPAD_REASONING>", "</SCRATCHPAD_REASONING>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("◁think▷", "◁/think▷"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
)
"""The model always sees the tags of its own template, whichever tags the row uses."""
_TAG = re.compile(r"<([a-z0-9_:|. -]{1,80})>", re.IGNORECASE)
_SIMILAR_NAME = re.compile(
    r"think|thought|reason|scratchpad|deliberat|reflect|analysis|monologue|\bcot\b", re.IGNORECASE
)
_MARKUP = re.compile(r"<\|(?:channel|start|START_THINKING|START_RESPONSE|START_ACTION|START_TEXT)\|?>")


def split_cot(text: str, tags: tuple[tuple[str, str], ...] = TAGS) -> tuple[str | None, str]:
    """Split a reply into (chain of thought or None, response).

    A reply has a chain of thought if it begins with an opening tag, or if it contains only a closing tag at the end of
    a line because the chat template had supplied the opening one. White space around the tags is removed. Since a chain
    of thought may mention the closing tag, the one that is alone on its line counts if there are several.

    Raises:
        DataError: reason "cot_tags". There is text before the opening tag; there is no closing tag; there are several,
            and not exactly one of them is alone on its line; a closing tag without an opening one is inside a line; or
            the reply begins with a tag that is similar to those of `TAGS`, or with the markup of another template.
    """
    stripped = text.lstrip()
    pair = _opening_pair(stripped, tags)
    if pair is not None:
        opening, closing = pair
        body = stripped[len(opening) :]
        if closing not in body:
            _fail(f"{opening} is not closed by {closing}")
        end = _closing_position(body, closing)
        return body[:end].strip() or None, body[end + len(closing) :].lstrip()
    for opening, closing in tags:
        if closing not in text:
            continue
        if opening in text:
            _fail(f"there is text before {opening}, but a chain of thought must begin the reply")
        end = _closing_position(text, closing)
        if text[end + len(closing) :].split("\n", 1)[0].strip():
            _fail(
                f"{closing} without {opening} is followed by text on its line: whether it ends a chain of thought is "
                f"ambiguous; {_OWN_FIELD}"
            )
        return text[:end].strip() or None, text[end + len(closing) :].lstrip()
    if tags is TAGS:
        _refuse_similar_tags(stripped)
    return None, text


_OWN_FIELD = 'give it in a field of its own ({"prompt", "cot", "response"})'


def starts_with_cot(text: str, tags: tuple[tuple[str, str], ...] = TAGS) -> bool:
    """Whether a reply begins with a chain of thought between tags."""
    pair = _opening_pair(text.lstrip(), tags)
    return pair is not None and pair[1] in text


def tag_around(cot: str, tags: tuple[tuple[str, str], ...] = TAGS) -> str | None:
    """The opening tag at the beginning of a chain of thought, or the closing tag at its end; None without one."""
    text = cot.strip()
    return next(
        (tag for pair in tags for tag, has in zip(pair, (text.startswith, text.endswith), strict=True) if has(tag)),
        None,
    )


def _opening_pair(stripped: str, tags: tuple[tuple[str, str], ...]) -> tuple[str, str] | None:
    return next((pair for pair in tags if stripped.startswith(pair[0])), None)


def _refuse_similar_tags(stripped: str) -> None:
    tag = _TAG.match(stripped)
    if tag and _SIMILAR_NAME.search(tag[1]) and f"</{tag[1]}>" in stripped:
        _fail(
            "the reply begins with a tag that is similar to <think> but not known; known are "
            f"{', '.join(opening for opening, _ in TAGS)}: set think_tags to the pair of tags in these "
            "rows, or to <think> and </think> if the tag belongs to the response"
        )
    if _MARKUP.match(stripped):
        _fail(
            "the reply begins with the markup of a chat template (of gpt-oss, Gemma or Cohere), but a row has plain "
            "texts: store the chain of thought and the response in fields of their own"
        )


def _fail(message: str) -> NoReturn:
    raise DataError(message, reason="cot_tags")


def _closing_position(body: str, closing: str) -> int:
    if body.count(closing) == 1:
        return body.index(closing)
    alone = []
    line_start = 0
    for line in body.split("\n"):
        before, found, after = line.partition(closing)
        if found and not before.strip() and not after.strip():
            alone.append(line_start + len(before))
        line_start += len(line) + 1
    if len(alone) != 1:
        _fail(
            f"{closing} occurs {body.count(closing)} times, {len(alone)} of them alone on a line: the end of the chain "
            f"of thought is ambiguous; {_OWN_FIELD}"
        )
    return alone[0]
