"""Refuse a reply that spells out tags of the think block, if the tokenizer has no control tokens for them.

Such tags are plain text to the model. At inference, the first closing tag ends the thought, wherever it is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from delib_fast.data.encode.chat_input import THINK
from delib_fast.data.encode.control_tokens import ControlTokens
from delib_fast.data.rows import DataError

_MARKUP = re.compile(r"[^\w\s].*[^\w\s]", re.DOTALL)
"""`</think>`, as opposed to the words `Answer:`, which a response may contain."""


@dataclass(frozen=True, slots=True)
class PlainTags:
    """What a chat template writes around a chain of thought as plain text; "" for control tokens or nothing."""

    opening: str
    closing: str

    @classmethod
    def of(cls, before: str, after: str, control: ControlTokens) -> PlainTags:
        """The tags in what a template writes before and after a chain of thought, with control tokens as characters."""
        above = _between_tokens(before, control)[-1].strip().splitlines()
        below = _between_tokens(after, control)[0].strip().splitlines()
        opening, closing = above[-1] if above else "", below[0] if below else ""
        if closing == THINK[1]:
            opening = opening or THINK[0]  # the generation prompt may have written it
        return cls(opening.strip(), closing.strip())

    @classmethod
    def by_default(cls, control: ControlTokens) -> PlainTags:
        """The tags that are written into a reply if the template has none of its own."""
        opening, closing = (tag if control.spell(tag) == tag else "" for tag in THINK)
        return cls(opening, closing)

    def refuse(self, cot: str, response: str, location: str) -> None:
        """Raise DataError if the chain of thought or the response contains one of the tags."""
        tags = [tag for tag in (self.closing, self.opening) if _MARKUP.fullmatch(tag)]
        for name, text, forbidden in (("chain of thought", cot, [self.closing, *tags]), ("response", response, tags)):
            if found := next((tag for tag in forbidden if tag and tag in text), None):
                raise DataError(
                    f"the {name} contains {found}, which is plain text for this tokenizer: at inference, the thought "
                    "would begin or end there; write it differently in the row, or add the think tags to the "
                    "tokenizer as special tokens",
                    reason="cot_tags",
                    location=location,
                )


def _between_tokens(text: str, control: ControlTokens) -> list[str]:
    """The texts before, between and after the control tokens of a text."""
    return "".join("\0" if control.is_control(char) else char for char in text).split("\0")
