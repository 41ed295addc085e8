"""How a model writes a chain of thought: what opens and what closes it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ThoughtForm:
    """What the chat template writes around the chain of thought of a reply, without white space at the ends."""

    opening: str
    """What the model has to write before its chain of thought, such as "<think>"; "" if the generation prompt ends with
    it."""
    closing: str
    """What it has to write between the chain of thought and the response, such as "</think>"."""
    opening_ids: tuple[int, ...]
    """The token ids of `opening`; () if the generation prompt ends with it."""
