"""Split off a chain of thought that a reply contains between tags."""

from __future__ import annotations

from delib_fast.data.rows import DataError

TAGS: tuple[tuple[str, str], ...] = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<reasoning>", "</reasoning>"),
    ("<SCRATCHPAD_REASONING>", "</SCRATCHPAD_REASONING>"),
)
"""Tried in this order. The model always sees the tags of its own template, whichever tags the row uses."""


def split_cot(text: str, tags: tuple[tuple[str, str], ...] = TAGS) -> tuple[str | None, str]:
    """Split a reply into (chain of thought or None, response).

    A reply has a chain of thought if it begins with an opening tag, or if it contains only a closing tag because the
    chat template had supplied the opening one. White space around the tags is removed. Since a chain of thought may
    mention the closing tag, the one that is alone on its line counts if there are several.

    Raises:
        DataError: reason "cot_tags". There is text before the opening tag; there is no closing tag; or there are
            several, and not exactly one of them is alone on its line.
    """
    for opening, closing in tags:
        stripped = text.lstrip()
        if stripped.startswith(opening):
            body = stripped[len(opening) :]
            if closing not in body:
                raise DataError(f"{opening} is not closed by {closing}", reason="cot_tags")
        elif closing not in text:
            continue
        elif opening in text:
            raise DataError(
                f"there is text before {opening}, but a chain of thought must begin the reply", reason="cot_tags"
            )
        else:
            body = text
        end = _closing_position(body, closing)
        return body[:end].strip() or None, body[end + len(closing) :].lstrip()
    return None, text


def _closing_position(body: str, closing: str) -> int:
    if body.count(closing) == 1:
        return body.index(closing)
    alone = []
    start = body.find(closing)
    while start >= 0:
        end = start + len(closing)
        line_start = body.rfind("\n", 0, start) + 1
        line_end = body.find("\n", end)
        if not body[line_start:start].strip() and not body[end : None if line_end < 0 else line_end].strip():
            alone.append(start)
        start = body.find(closing, end)
    if len(alone) != 1:
        raise DataError(
            f"{closing} occurs {body.count(closing)} times, {len(alone)} of them alone on a line: the end of the chain "
            'of thought is ambiguous; give it in a field of its own ({"prompt", "cot", "response"})',
            reason="cot_tags",
        )
    return alone[0]
