"""Duplicates and near-duplicates without embeddings: MinHash over word 3-shingles, then an exact comparison.

    jaccard(A, B) = |A ∩ B| / |A ∪ B|      A, B: the sets of word 3-shingles of two texts

Signatures of 128 hashes are split into 32 bands of 4. Texts that agree in a band are compared exactly, so no pair below
the threshold is reported. A pair of similarity 0.8 is missed with a probability of about (1 − 0.8⁴)³² ≈ 5e-8.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from delib_fast.config import ConfigError
from delib_fast.data.decontamination import words_of

_HASHES, _BANDS = 128, 32
_SHINGLE_WORDS = 3


def text_key(text: str) -> bytes:
    """Hash a text to 16 bytes, ignoring case, punctuation and white space."""
    return hashlib.blake2b(" ".join(words_of(text)).encode(), digest_size=16).digest()


class NearDuplicates:
    """An index of texts that finds the earlier near-duplicate of a new text.

    Args:
        threshold: the Jaccard similarity from which on two texts are near-duplicates.
    Raises:
        ConfigError: the rensa package is missing.
    """

    def __init__(self, threshold: float) -> None:
        try:
            import rensa  # an optional dependency
        except ImportError:
            raise ConfigError("the rensa package is missing: pip install 'delib-fast[generate]'") from None
        self.threshold = threshold
        self._rensa = rensa
        self._index: Any = rensa.RMinHashLSH(threshold, num_perm=_HASHES, num_bands=_BANDS)
        self._shingles: list[NDArray[np.int64]] = []
        self._names: list[str] = []

    def find_or_add(self, name: str, text: str) -> tuple[str, float] | None:
        """Return (name, similarity) of the first near-duplicate of a text. If there is none, add the text."""
        words = words_of(text)
        shingles = {" ".join(words[i : i + _SHINGLE_WORDS]) for i in range(max(1, len(words) - _SHINGLE_WORDS + 1))}
        sketch = self._rensa.RMinHash(num_perm=_HASHES, seed=0)
        sketch.update(list(shingles))
        hashes = np.unique(np.fromiter(map(hash, shingles), np.int64, len(shingles)))  # 8 bytes each, compared exactly
        for i in sorted(self._index.query(sketch)):
            similarity = _jaccard(hashes, self._shingles[i])
            if similarity >= self.threshold:
                return self._names[i], similarity
        self._index.insert(len(self._names), sketch)
        self._shingles.append(hashes)
        self._names.append(name)
        return None


def _jaccard(a: NDArray[np.int64], b: NDArray[np.int64]) -> float:
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)
