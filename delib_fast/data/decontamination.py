"""Checks that end a run by name instead of letting it learn the wrong thing.

Texts are compared by their runs of 13 words (case and punctuation aside), as contamination studies do. A text of
fewer words is one run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from delib_fast.data.rows import DataError, Row

RUN_WORDS = 13
_WORD = re.compile(r"\w+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # any large odd number: the hash of a run depends on the order of its words


def ngram_hashes(text: str) -> NDArray[np.uint64]:
    """A 64-bit hash of every run of 13 words; comparable within one process only."""
    words = _WORD.findall(text.lower())
    if not words:
        return np.zeros(0, np.uint64)
    ids = np.array([hash(word) for word in words], np.int64).view(np.uint64)
    runs = max(len(words) - RUN_WORDS + 1, 1)
    hashed = np.zeros(runs, np.uint64)
    for k in range(min(RUN_WORDS, len(words))):
        hashed = hashed * _FACTOR + ids[k : k + runs]
    return hashed


@dataclass(frozen=True, slots=True)
class Overlap:
    """An evaluation row that training has (nearly) seen."""

    location: str
    twin: str | None
    """place of an equal training row"""
    share: float
    """of its runs of words that occur in training rows"""


def find_overlap(train: Iterable[Row], evaluation: Sequence[Row], *, share: float = 0.5) -> list[Overlap]:
    """Evaluation rows that are equal to a training row, or of whose runs of 13 words `share` or more occur in one
    training row or another.

    A quoted clause of the spec is no overlap: most of the row has to be known. Training rows are gone through once and
    not held; memory is that of the evaluation's runs.
    """
    if not evaluation:
        return []
    runs = [ngram_hashes("\n".join(row.texts)) for row in evaluation]
    wanted = np.unique(np.concatenate(runs))
    known = np.zeros(len(wanted), bool)
    digests = {row.digest for row in evaluation}
    twins: dict[str, str] = {}
    for row in train:
        if row.digest in digests:
            twins[row.digest] = row.location
        theirs = ngram_hashes("\n".join(row.texts))
        at = np.minimum(np.searchsorted(wanted, theirs), max(len(wanted) - 1, 0))
        if len(wanted):
            known[at[wanted[at] == theirs]] = True
    found = []
    for row, own in zip(evaluation, runs, strict=True):
        seen = float(known[np.searchsorted(wanted, own)].mean()) if len(own) else 0.0
        if row.digest in twins or seen >= share:
            found.append(Overlap(row.location, twins.get(row.digest), 1.0 if row.digest in twins else seen))
    return found


def refuse_overlap(train: Iterable[Row], evaluation: Sequence[Row], *, share: float = 0.5) -> None:
    """Raise DataError if evaluation rows are among the training rows."""
    found = find_overlap(train, evaluation, share=share)
    if found:
        worst = max(found, key=lambda overlap: (overlap.twin is not None, overlap.share))
        what = (
            f"is also a training row ({worst.twin})"
            if worst.twin
            else f"is known from training: {worst.share:.0%} of its runs of {RUN_WORDS} words occur there"
        )
        raise DataError(
            f"this evaluation row {what}; {len(found)} of {len(evaluation)} evaluation rows are. Take "
            "them out of one side",
            reason="overlap",
            location=worst.location,
        )


def refuse_spec_in_prompts(rows: Iterable[Row], spec_texts: Iterable[str], *, min_share: float = 0.1) -> None:
    """Raise DataError if a prompt holds text of the spec: the model must learn the spec, not learn to read it.

    A prompt offends if `min_share` or more of its own runs of 13 words are the spec's, or `min_share` of the
    spec's are the prompt's; so a user may quote a sentence in a long message.
    """
    spec = np.unique(np.concatenate([np.zeros(0, np.uint64), *map(ngram_hashes, spec_texts)]))
    if not len(spec):
        return
    for row in rows:
        prompt = "\n".join(message.content for message in row.messages if message.role != "assistant")
        runs = ngram_hashes(prompt)
        if not len(runs):
            continue
        at = np.minimum(np.searchsorted(spec, runs), len(spec) - 1)
        hits = runs[spec[at] == runs]
        if len(hits) >= min_share * len(runs) or len(np.unique(hits)) >= min_share * len(spec):
            raise DataError(
                f"the prompt holds text of the spec ({len(hits)} runs of {RUN_WORDS} words): the spec "
                "belongs into midtraining, and into the prompt only while data is made; strip it",
                reason="spec_in_prompt",
                location=row.location,
            )
