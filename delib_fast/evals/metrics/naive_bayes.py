"""A classifier of short texts into named categories, small enough to be read: multinomial naive Bayes over words."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

_WORD = re.compile(r"[^\W\d_]{2,}")


class NaiveBayes:
    """Multinomial naive Bayes with add-one smoothing; a text may carry several labels and counts for each.

    Args:
        examples: (text, its labels).
    """

    def __init__(self, examples: Iterable[tuple[str, Sequence[str]]]) -> None:
        self._counts: dict[str, Counter[str]] = defaultdict(Counter)
        self._texts: Counter[str] = Counter()
        for text, labels in examples:
            words = words_of(text)
            for label in labels:
                self._counts[label].update(words)
                self._texts[label] += 1
        self._vocabulary = {word for counts in self._counts.values() for word in counts}
        if not self._texts:
            raise ValueError("a classifier needs at least one labelled text; none was given")

    @property
    def labels(self) -> list[str]:
        return sorted(self._texts)

    def log_scores(self, text: str) -> dict[str, float]:
        """log p(label) + Σ log p(word | label), words never seen left out."""
        words = [word for word in words_of(text) if word in self._vocabulary]
        whole = sum(self._texts.values())
        scores = {}
        for label, counts in self._counts.items():
            size = counts.total() + len(self._vocabulary)
            scores[label] = math.log(self._texts[label] / whole) + sum(
                math.log((counts[word] + 1) / size) for word in words
            )
        return scores

    def __call__(self, text: str) -> str:
        """The most likely label; the first in the alphabet of equals."""
        scores = self.log_scores(text)
        return max(self.labels, key=lambda label: scores[label])


def words_of(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]
