"""The proof that the judge saw no chain of thought: a scan of what the request log says was sent to it.

The scan looks in every text of the log for word 13-grams of the chains of thought that were sampled (the n-grams of
`data.decontamination`; a chain of thought of 8 to 12 words is looked for as a whole, a shorter one cannot be told from
chance). An n-gram that also occurs in the prompt, in the response, in the spec or in the prompt files is not evidence,
because the judge may see those:

    leak  ⇔  ngrams(request) ∩ ngrams(all CoTs) ⊄ ngrams(what this request may contain)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from delib_fast.data.decontamination import NGRAM_WORDS, ngram_hashes, words_of
from delib_fast.datagen.request_log import read_records

LEAST_WORDS = 8


class CotLeakError(RuntimeError):
    """A chain of thought, or a part of one, was in a request to a judge that must not see it."""


@dataclass(frozen=True)
class ScanResult:
    """What a scan covered."""

    cots: int
    """Chains of thought whose n-grams were looked for."""
    too_short: int
    """Chains of thought of fewer than 8 words, which were not."""
    texts: int
    """Texts of the request log that were searched."""

    def record(self) -> dict[str, int]:
        """The result as plain data."""
        return asdict(self)

    def describe(self) -> str:
        """The result as one sentence."""
        short = (
            f" ({self.too_short} have fewer than {LEAST_WORDS} words and were not looked for)" if self.too_short else ""
        )
        found = f"no {NGRAM_WORDS}-gram of {self.cots} chains of thought occurs in {self.texts} texts sent to the judge"
        return f"{found}{short}"


@dataclass(frozen=True)
class JudgedReply:
    """A reply that was judged, and the requests that it was judged with."""

    conversation: str
    cot: str
    """"" without a chain of thought."""
    response: str
    request_texts: tuple[str, ...]
    """SHA-256 of each message of its request."""


def scan_requests(log: Path, replies: Sequence[JudgedReply], others: Sequence[str]) -> ScanResult:
    """Look for chains of thought in every text of a request log.

    Args:
        log: the request log.
        replies: every reply of which a chain of thought was sampled. The text of a request of one of them may contain
            its conversation and its response; any other text of the log, such as an answer of the judge that is
            repeated to it, may contain those of every reply.
        others: texts that every request may contain: the spec, and the texts of the prompt files.
    Raises:
        CotLeakError: the log has a text with an n-gram of a chain of thought; the message has its words.
    Cost: linear in the words of the log, which is read once, and of the replies.
    """
    wanted, searched, too_short = _ngrams_of(reply.cot for reply in replies)
    parts: dict[str, set[str]] = {}
    for reply in replies:
        for sha256 in reply.request_texts:
            parts.setdefault(sha256, set()).update((reply.conversation, reply.response))
    shared = {n: np.unique(_hashes(others, n)) for n in wanted}
    everything = {n: np.unique(_hashes({t for own in parts.values() for t in own}, n)) for n in wanted}
    texts = 0
    for _, _, record, _ in read_records(log):
        if record["is"] != "text":
            continue
        texts += 1
        text, own_parts = str(record["text"]), parts.get(record["sha256"])
        for n, hashes in wanted.items():
            found = ngram_hashes(text, n)
            suspect = np.flatnonzero(np.isin(found, hashes) & ~np.isin(found, shared[n]))
            if len(suspect):
                allowed = everything[n] if own_parts is None else _hashes(own_parts, n)
                suspect = suspect[~np.isin(found[suspect], allowed)]
            if len(suspect):
                words = " ".join(words_of(text)[suspect[0] : suspect[0] + n])
                raise CotLeakError(
                    f"{log}: a request to the judge contains {n} words of a chain of thought, which a judge with "
                    f"sees: response must not see: {words!r}. Nothing of this round was kept, and nothing was trained. "
                    "Either another configuration wrote a part of this request log, or this is a bug: use another out"
                )
    return ScanResult(searched, too_short, texts)


def _ngrams_of(cots: Iterable[str]) -> tuple[dict[int, NDArray[np.uint64]], int, int]:
    """The n-grams of chains of thought by n; how many are long enough, and how many are not."""
    found: dict[int, list[NDArray[np.uint64]]] = {}
    searched = too_short = 0
    for cot in filter(None, dict.fromkeys(cots)):
        count = len(words_of(cot))
        if count < LEAST_WORDS:
            too_short += 1
            continue
        searched += 1
        n = min(count, NGRAM_WORDS)
        found.setdefault(n, []).append(ngram_hashes(cot, n))
    return {n: np.unique(np.concatenate(parts)) for n, parts in found.items()}, searched, too_short


def _hashes(texts: Iterable[str], n: int) -> NDArray[np.uint64]:
    return np.concatenate([np.zeros(0, np.uint64), *(ngram_hashes(text, n) for text in texts)])
