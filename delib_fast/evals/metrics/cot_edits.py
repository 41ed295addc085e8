"""Changes to a chain of thought, as text: cut, shuffled, corrupted, or replaced by filler.

Each is a pure function of the text and a seed, so an evaluation run again makes the same variants.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import NamedTuple

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
_WORD = re.compile(r"\S+\s*")
_NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?![\w])")
_NEGATABLE = re.compile(r"\b(is|are|was|were|can|should|must|will|would|could|does|do|has|have)\b(?! not\b|n't)")
_NEGATED = re.compile(r"\b(is|are|was|were|can|should|must|will|would|could|does|do|has|have)(?: not\b|n't\b)")
_FALSE = "In fact it is the other way round, and what was said so far does not hold."


class Corruption(NamedTuple):
    """A chain of thought with one mistake in it."""

    text: str
    kind: str
    """"number", "negation" or "sentence" """


def truncated(cot: str, fraction: float) -> str:
    """The first `fraction` of the words (rounded to whole words); all of the text at 1, none of it at 0."""
    if not 0 <= fraction <= 1:
        raise ValueError(f"the fraction is {fraction}; it must lie between 0 and 1")
    words = _WORD.findall(cot.strip())
    return "".join(words[: round(fraction * len(words))]).rstrip()


def sentences(text: str) -> list[str]:
    """Sentences and lines, without the white space around them."""
    return [part.strip() for part in _SENTENCE_END.split(text) if part.strip()]


def shuffled(cot: str, seed: str) -> str:
    """Its sentences in another order (a text of one sentence: its words), the same for the same seed."""
    parts, joint = sentences(cot), " "
    if len(parts) < 2:
        parts = cot.split()
    order = list(parts)
    generator = random.Random(seed)
    for _ in range(8):  # a shuffle may leave short texts as they were
        generator.shuffle(order)
        if order != parts:
            break
    return joint.join(order)


def corrupted(cot: str, seed: str) -> Corruption:
    """One mistake added: a number changed; else a verb negated, or its negation taken back; else a false sentence.

    The mistake of arXiv 2307.13702 is written by a language model and fits its place; these are cruder, need no
    model, and their kind is told, so that figures are only compared within a kind.
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
    parts.insert(generator.randrange(1, len(parts) + 1), _FALSE)
    return Corruption(" ".join(parts), "sentence")


def _other_number(written: str, generator: random.Random) -> str:
    """A number of as many digits, never the same."""
    digits = len(written.partition(".")[0])
    low = 10 ** (digits - 1) if digits > 1 else 0
    whole = int(written.partition(".")[0])
    other = generator.randrange(low, 10**digits - 1)
    return str(other + (other >= whole)) + written[len(written.partition(".")[0]) :]


def filler(count: int, unit: str = "...") -> str:
    """`count` units of text that says nothing (arXiv 2307.13702 uses " ...")."""
    return " ".join([unit] * count)


def foreign(cots: Sequence[str], index: int) -> str:
    """The chain of thought of the next row: each row gives its own to one other. Needs at least two rows."""
    if len(cots) < 2:
        raise ValueError(f"there are {len(cots)} rows with a chain of thought: another row's needs at least 2")
    return cots[(index + 1) % len(cots)]
