"""Edits of a chain of thought, as text: truncated, shuffled, corrupted, or replaced by filler.

Each edit is a pure function of the text and a seed, so that a repeated evaluation makes the same variants.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import NamedTuple

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
_WORD = re.compile(r"\S+\s*")
_NUMBER = re.compile(r"(?<![\w.])\d{1,18}(?:\.\d{1,18})?(?![\w])")
_NEGATABLE = re.compile(r"\b(is|are|was|were|can|should|must|will|would|could|does|do|has|have)\b(?! not\b|n't)")
_NEGATED = re.compile(r"\b(is|are|was|were|can|should|must|will|would|could|does|do|has|have)(?: not\b|n't\b)")
_FALSE = "In fact it is the other way round, and what was said so far does not hold."


class Corruption(NamedTuple):
    """A chain of thought with one mistake added."""

    text: str
    kind: str
    """"number", "negation" or "sentence"."""


def truncated(cot: str, fraction: float) -> str:
    """The first `fraction` of the words, rounded to whole words: nothing at 0, the full text at 1."""
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction is {fraction}; it must be between 0 and 1")
    words = _WORD.findall(cot.strip())
    return "".join(words[: round(fraction * len(words))]).rstrip()


def sentences(text: str) -> list[str]:
    """The sentences and lines of a text, without surrounding whitespace."""
    return [part.strip() for part in _SENTENCE_END.split(text) if part.strip()]


def shuffled(cot: str, seed: str) -> str:
    """The sentences in a random order drawn from the seed. If there is only one sentence, its words are shuffled."""
    parts = sentences(cot)
    if len(parts) < 2:
        parts = cot.split()
    order = list(parts)
    generator = random.Random(seed)
    for _ in range(8):  # a shuffle may leave a short text unchanged
        generator.shuffle(order)
        if order != parts:
            break
    return " ".join(order)


def corrupted(cot: str, seed: str) -> Corruption:
    """Add one mistake: change a number; else remove a negation or negate a verb; else insert a false sentence.

    In arXiv 2307.13702 a language model writes a mistake that fits the context. These mistakes need no model and are
    cruder. Their kind is reported, so that figures can be compared within a kind.
    """
    generator = random.Random(seed)
    if numbers := list(_NUMBER.finditer(cot)):
        spot = generator.choice(numbers)
        return Corruption(cot[: spot.start()] + _other_number(spot[0], generator) + cot[spot.end() :], "number")
    for pattern, negated in ((_NEGATED, r"\1"), (_NEGATABLE, r"\1 not")):
        if spots := list(pattern.finditer(cot)):
            spot = generator.choice(spots)
            return Corruption(cot[: spot.start()] + spot.expand(negated) + cot[spot.end() :], "negation")
    parts = sentences(cot)
    parts.insert(generator.randrange(1, len(parts) + 1) if parts else 0, _FALSE)
    return Corruption(" ".join(parts), "sentence")


def _other_number(written: str, generator: random.Random) -> str:
    """A different number with the same number of digits."""
    digits = len(written.partition(".")[0])
    low = 10 ** (digits - 1) if digits > 1 else 0
    whole = int(written.partition(".")[0])
    other = generator.randrange(low, 10**digits - 1)
    return str(other + (other >= whole)) + written[len(written.partition(".")[0]) :]


def filler(count: int, unit: str = "...") -> str:
    """`count` units of text without content (arXiv 2307.13702 uses " ...")."""
    return " ".join([unit] * count)


def foreign(cots: Sequence[str], index: int) -> str:
    """The chain of thought of the next row, so that each one is used once. Needs at least two rows."""
    if len(cots) < 2:
        raise ValueError(f"{len(cots)} row(s) with a chain of thought; using another row's needs at least 2")
    return cots[(index + 1) % len(cots)]
