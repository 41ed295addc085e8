"""Decontamination: evaluation rows that occur in the training data, and spec text in prompts.

Texts are compared by their word n-grams (13 words by default, as in contamination studies), with case and punctuation
ignored.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from delib_fast.data.rows import DataError, Row

NGRAM_WORDS = 13
_WORD = re.compile(r"\w+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # any large odd number: the hash depends on the order of the words


def words_of(text: str) -> list[str]:
    """Split a text into case-folded words, without punctuation, apostrophes or markup."""
    return _WORD.findall(text.casefold().replace("’", "").replace("'", ""))


def ngram_hashes(text: str, n: int = NGRAM_WORDS) -> NDArray[np.uint64]:
    """Hash every word n-gram of a text, in order.

    Returns:
        (max(words − n + 1, 1),) uint64. A text of fewer than n words has one hash, that of all its words, and a text
        without words has none. Hashes are only comparable within one process.
    """
    words = words_of(text)
    if not words:
        return np.zeros(0, np.uint64)
    word_hashes = np.array([hash(word) for word in words], np.int64).view(np.uint64)
    count = max(len(words) - n + 1, 1)
    hashes = np.zeros(count, np.uint64)
    for k in range(min(n, len(words))):
        hashes = hashes * _FACTOR + word_hashes[k : k + count]
    return hashes


def find_ngram(text: str, known: NDArray[np.uint64], n: int = NGRAM_WORDS) -> str | None:
    """Find the first word n-gram of a text that is known. Returns its words, joined by spaces, or None.

    Args:
        known: sorted `ngram_hashes` of the same n.
    """
    found = np.flatnonzero(_is_known(ngram_hashes(text, n), known))
    return " ".join(words_of(text)[found[0] : found[0] + n]) if len(found) else None


def _is_known(hashes: NDArray[np.uint64], known: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Whether each of the hashes is in `known`, which is sorted."""
    if not len(known):
        return np.zeros(len(hashes), bool)
    at = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
    return np.asarray(known[at] == hashes)


@dataclass(frozen=True, slots=True)
class Overlap:
    """An evaluation row that is (nearly) contained in the training data."""

    location: str
    """`file:line` of the evaluation row."""
    duplicate_of: str | None
    """Location of a training row with equal content; None if there is none."""
    share: float
    """Share of the row's n-grams that occur in training rows."""


def find_overlap(train: Iterable[Row], evaluation: Sequence[Row], *, share: float = 0.5) -> list[Overlap]:
    """Find the evaluation rows that equal a training row, or at least `share` of whose 13-grams occur in training rows.

    Two rows that merely quote the same clause of the spec do not overlap, because `share` of the whole row is required.
    Training rows are streamed once; memory grows only with the evaluation rows.
    """
    if not evaluation:
        return []
    ngrams = [ngram_hashes("\n".join(row.texts)) for row in evaluation]
    wanted = np.unique(np.concatenate(ngrams))
    seen = np.zeros(len(wanted), bool)  # whether a training row contains the n-gram
    digests = {row.digest for row in evaluation}
    duplicates: dict[str, str] = {}
    for row in train:
        if row.digest in digests:
            duplicates[row.digest] = row.location
        hashes = ngram_hashes("\n".join(row.texts))
        seen[np.searchsorted(wanted, hashes[_is_known(hashes, wanted)])] = True
    found = []
    for row, own in zip(evaluation, ngrams, strict=True):
        seen_share = float(seen[np.searchsorted(wanted, own)].mean()) if len(own) else 0.0
        duplicate = duplicates.get(row.digest)
        if duplicate is not None or seen_share >= share:
            found.append(Overlap(row.location, duplicate, 1.0 if duplicate is not None else seen_share))
    return found


def refuse_overlap(train: Iterable[Row], evaluation: Sequence[Row], *, share: float = 0.5) -> None:
    """Raise DataError if `find_overlap` finds an evaluation row in the training data."""
    found = find_overlap(train, evaluation, share=share)
    if found:
        worst = max(found, key=lambda overlap: (overlap.duplicate_of is not None, overlap.share))
        what = (
            f"is also a training row ({worst.duplicate_of})"
            if worst.duplicate_of
            else f"is contained in the training data ({worst.share:.0%} of its {NGRAM_WORDS}-grams occur there)"
        )
        raise DataError(
            f"this evaluation row {what}. In all, {len(found)} of {len(evaluation)} evaluation rows occur in the "
            "training data: remove them from one of the two",
            reason="overlap",
            location=worst.location,
        )


def refuse_spec_in_prompts(rows: Iterable[Row], spec_texts: Iterable[str], *, min_share: float = 0.1) -> None:
    """Raise DataError if a prompt or its tools contain text of the spec: the model must know the spec, not read it.

    A prompt is refused if at least `min_share` of its own 13-grams occur in the spec, or if it contains at least
    `min_share` of those of the spec. A sentence quoted in a long message is therefore allowed.
    """
    spec = np.unique(np.concatenate([np.zeros(0, np.uint64), *map(ngram_hashes, spec_texts)]))
    if not len(spec):
        return
    for row in rows:
        prompt = "\n".join([row.tools, *(message.content for message in row.messages if message.role != "assistant")])
        ngrams = ngram_hashes(prompt)
        if not len(ngrams):
            continue
        shared = ngrams[_is_known(ngrams, spec)]
        if len(shared) >= min_share * len(ngrams) or len(np.unique(shared)) >= min_share * len(spec):
            raise DataError(
                f"the prompt contains text of the spec ({len(shared)} of its {NGRAM_WORDS}-grams): the spec belongs in "
                "midtraining, and in the prompt only while data is generated; remove it",
                reason="spec_in_prompt",
                location=row.location,
            )
