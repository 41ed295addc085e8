"""A rendered chat template with placeholders for texts, and the boundaries of the reply in it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from delib_fast.data.encode.chat_input import THINK, Style
from delib_fast.data.encode.control_tokens import ControlTokens

_SLOT = 0xF0000  # first private-use character that is a placeholder for a text of a row
_SLOTS = re.compile(f"[{chr(_SLOT)}-{chr(_SLOT + 0xFFFD)}]")
MAX_TEXTS = 0xFFFE
"""The number of texts for which there are placeholders."""


def slot(k: int) -> str:
    """The placeholder for text `k`."""
    return chr(_SLOT + k)


def slots_in(text: str) -> list[str]:
    """All placeholders in a text, in order."""
    return _SLOTS.findall(text)


@dataclass(frozen=True, slots=True)
class Rendering:
    """A rendering with slots for texts: `pieces[0] text[slots[0]] pieces[1] …`."""

    pieces: tuple[str, ...]
    slots: tuple[int, ...]

    @classmethod
    def of(cls, text: str) -> Rendering:
        """Split a text at its placeholders."""
        return cls(tuple(_SLOTS.split(text)), tuple(ord(found) - _SLOT for found in _SLOTS.findall(text)))

    def parts(self, cores: Sequence[str]) -> list[str]:
        """The pieces and texts whose concatenation is the filled rendering. `cores` are the stripped texts."""
        parts = [self.pieces[0]]
        for k, piece in zip(self.slots, self.pieces[1:], strict=True):
            parts += (cores[k], piece)
        return parts

    def fill(self, cores: Sequence[str]) -> str:
        """Insert the stripped texts."""
        return "".join(self.parts(cores))


@dataclass(frozen=True, slots=True)
class PromptForm:
    """How the generation prompt is rendered."""

    kwargs: dict[str, bool]
    """Keyword arguments of `apply_chat_template`."""
    earlier_cots: bool = True
    """Whether the earlier messages have their chains of thought."""


@dataclass(frozen=True, slots=True)
class Skeleton:
    """The rendering of a chat, split into chain of thought and response, and how to compare it with stock."""

    rendering: Rendering
    """What is tokenized. Control tokens are written as private-use characters (control_tokens.py)."""
    boundaries: tuple[tuple[int, int], ...]
    """The beginning of the chain of thought, the beginning of the response, and the end of the response (after the end
    of its turn). Each is (number of slots before it, number of the template's characters before it)."""
    style: Style
    finished: Rendering
    """The template's own rendering of the chat with its reply, as `apply_chat_template` returns it."""
    prompt: Rendering
    """The template's own generation prompt, as `apply_chat_template(add_generation_prompt=True)` returns it."""
    prompt_form: PromptForm

    def fill(self, cores: Sequence[str]) -> tuple[str, tuple[int, ...]]:
        """Return (the whole text, the three boundaries as positions in it). `cores` are the stripped texts."""
        lengths = [0]
        for k in self.rendering.slots:
            lengths.append(lengths[-1] + len(cores[k]))
        return self.rendering.fill(cores), tuple(lengths[slots] + chars for slots, chars in self.boundaries)

    def fill_before(self, k: int, cores: Sequence[str]) -> str:
        """Return the text before slot `k`, which occurs exactly once."""
        return "".join(self.rendering.parts(cores)[: 2 * self.rendering.slots.index(k) + 1])


def skip_thought(control: ControlTokens, text: str, cot_slot: str, response_slot: str, supplied: int) -> int:
    """Return where the response of a reply begins: after the think block and the white space that follows it.

    Without a chain of thought, a template may write an empty block. With one, the block ends with the think tag or, in
    formats with other tags, with the first control token after the thought.

    Args:
        text: the rendering, with control tokens as private-use characters.
        cot_slot: the placeholder of the chain of thought, which may not occur.
        response_slot: the placeholder of the response, which may not occur.
        supplied: the number of leading characters that the generation prompt supplies.
    """
    cot_at, response_at = text.find(cot_slot), text.find(response_slot)
    opening, closing = map(control.spell, THINK)
    if cot_at < 0:
        empty = re.compile(rf"\s*(?:{re.escape(opening)}\s*)?{re.escape(closing)}\s*").match(text, supplied)
        return empty.end() if empty else supplied
    limit = response_at if response_at >= 0 else len(text)
    closed = text.find(closing, cot_at, limit)
    if closed >= 0:
        end = closed + len(closing)
    else:
        tokens = (at + 1 for at in range(cot_at + 1, limit) if control.is_control(text[at]) and text[at + 1 :].strip())
        end = next(tokens, response_at if response_at >= 0 else cot_at + 1)
    return end + len(text[end:]) - len(text[end:].lstrip())


def turn_end(control: ControlTokens, text: str, start: int) -> int:
    """Return the position after the end of the turn: the first control token after `start`, and those that follow it.

    Without control tokens, it is the end of the text, except for white space.
    """
    for at in range(start, len(text)):
        if control.is_control(text[at]):
            while at < len(text) and control.is_control(text[at]):
                at += 1
            return at
    return max(len(text.rstrip()), start)
