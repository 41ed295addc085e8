"""Finding the chain of thought that a reply carries inside its text, between tags."""

from __future__ import annotations

from delib_fast.data.rows import DataError

TAGS: tuple[tuple[str, str], ...] = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<reasoning>", "</reasoning>"),
    ("<SCRATCHPAD_REASONING>", "</SCRATCHPAD_REASONING>"),
)
"""Tried in this order. The model always sees its own template's tags, whichever the row used."""


def split_cot(text: str, tags: tuple[tuple[str, str], ...] = TAGS) -> tuple[str | None, str]:
    """Part a reply into (chain of thought or None, response).

    A reply has a chain of thought if it begins with an opening tag, or holds a closing tag and no opening one
    (a template had supplied that). White space around the tags goes. Of several closing tags, the one that
    stands alone on its line counts: a chain of thought may well mention the tag. Without such a one it is
    anyone's guess where the thought ends, and the row is refused.

    Raises:
        DataError: reason "cot_tags"; text before the opening tag, no closing tag, or several.
    """
    for opening, closing in tags:
        stripped = text.lstrip()
        if stripped.startswith(opening):
            body = stripped[len(opening) :]
            if closing not in body:
                raise DataError(f"{opening} is never closed by {closing}", reason="cot_tags")
        elif closing not in text:
            continue
        elif opening in text:
            raise DataError(f"text stands before {opening}: a chain of thought begins the reply", reason="cot_tags")
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
        times = f"{body.count(closing)} times {closing}, {len(alone)} of them alone on a line"
        raise DataError(
            f"{times}: where the chain of thought ends can't be told; give it as a field of its "
            'own ({"prompt", "cot", "response"})',
            reason="cot_tags",
        )
    return alone[0]
