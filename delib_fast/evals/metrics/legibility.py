"""Proxies for the legibility of chains of thought, computed from text alone.

Reinforcement learning and unusual data can turn chains of thought into shorthand, loops or another language (Korbak et
al., arXiv 2507.11473). These proxies detect that; they do not detect fluent nonsense.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from delib_fast.evals.intervals import Estimate, mean, wilson
from delib_fast.evals.sampling import Reply

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
NGRAM = 4
_PERCENTILES = (10, 50, 90, 100)


@dataclass(frozen=True, slots=True)
class Legibility:
    replies: int
    with_cot: Estimate
    """Share of replies with a chain of thought, Wilson."""
    broken_tags: Estimate
    """Share whose think block is not closed, or closed without being opened, Wilson."""
    unfinished: Estimate
    """Share cut off by the length limit, Wilson."""
    unknown_words: Estimate
    """Share of a CoT's words that do not occur in the reference text, mean over CoTs, bootstrap."""
    repeated_ngrams: Estimate
    """Share of a CoT's word 4-grams that repeat an earlier one, mean over CoTs, bootstrap."""
    compression: Estimate
    """Compressed (zlib) ÷ raw size: about 0.5 for a page of prose, near 0 for loops; mean over CoTs, bootstrap."""
    same_script: Estimate
    """Share of CoTs in the script of their prompt (Latin, Cyrillic, Han …), Wilson."""
    words_percentiles: dict[str, float]
    """Percentiles of the CoT length in words."""


def vocabulary(texts: Iterable[str]) -> set[str]:
    """The words of reference texts in lower case: the known words of `legibility`."""
    return {word.lower() for text in texts for word in _WORD.findall(text)}


def legibility(replies: Sequence[Reply], prompts: Sequence[str], known_words: Collection[str]) -> Legibility:
    """Compute the proxies over sampled replies.

    Args:
        prompts: the prompt of each reply, for its script.
        known_words: the result of `vocabulary` on text of the kind that the CoTs should be (the training rows). Every
            word that is not in it counts as unknown.
    """
    cots = [(reply.cot or "", prompt) for reply, prompt in zip(replies, prompts, strict=True) if reply.cot]
    n = len(replies)
    lengths = [len(_WORD.findall(cot)) for cot, _ in cots]
    same = sum(script_of(cot) in (script_of(prompt), "none") for cot, prompt in cots)
    return Legibility(
        n,
        wilson(len(cots), n),
        wilson(sum(r.tags in ("unclosed", "stray") for r in replies), n),
        wilson(sum(not r.finished for r in replies), n),
        mean([unknown_share(cot, known_words) for cot, _ in cots]),
        mean([repeated_share(cot) for cot, _ in cots]),
        mean([compression(cot) for cot, _ in cots]),
        wilson(same, len(cots)),
        {f"p{q}": float(np.percentile(lengths, q)) for q in _PERCENTILES} if lengths else {},
    )


def unknown_share(text: str, known_words: Collection[str]) -> float:
    """Share of the words that are not in `known_words`; 0 for a text without words."""
    words = [word.lower() for word in _WORD.findall(text)]
    return sum(word not in known_words for word in words) / len(words) if words else 0.0


def repeated_share(text: str, n: int = NGRAM) -> float:
    """Share of the word n-grams that repeat an earlier one; 0 for a text of fewer than n words."""
    words = text.lower().split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def compression(text: str) -> float:
    """Compressed (zlib) ÷ raw size in bytes; 1 for an empty text."""
    data = text.encode()
    return len(zlib.compress(data, 9)) / len(data) if data else 1.0


def script_of(text: str) -> str:
    """The most frequent script, named by the first word of Unicode character names; "none" without letters."""
    counts = Counter(unicodedata.name(char, "UNKNOWN").split()[0] for char in text if char.isalpha())
    return counts.most_common(1)[0][0] if counts else "none"
