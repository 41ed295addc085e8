"""Duplicates and near-duplicates, without embeddings: a hash, and MinHash over word shingles.

jaccard(A, B) = |A ∩ B| / |A ∪ B|, A and B the sets of word 3-shingles of two texts
a signature of 128 minima of random permutations, cut into 32 bands of 4; texts that agree in a band are
compared exactly. At a similarity of 0.8 a pair is missed with probability (1 − 0.8⁴)³² ≈ 5e-8.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict

import numpy as np

_PERMUTATIONS, _BANDS = 128, 32
_SHINGLE = 3
_Key = tuple[int, bytes]  # a band, and what the signature has there
_WORDS = re.compile(r"\w+")


def words_of(text: str) -> list[str]:
    """The words of a text for comparing: case folded, punctuation and markup aside."""
    return _WORDS.findall(text.casefold().replace("’", "").replace("'", ""))


def text_key(text: str) -> bytes:
    """Equal for texts that differ in case, punctuation and white space only."""
    return hashlib.blake2b(" ".join(words_of(text)).encode(), digest_size=16).digest()


class NearDuplicates:
    """Texts seen so far; `find` says which earlier one a new text repeats. Deterministic."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._exact: dict[bytes, str] = {}
        self._bands: dict[_Key, list[int]] = defaultdict(list)
        self._sets: list[np.ndarray] = []
        self._names: list[str] = []
        self._word_hash: dict[str, int] = {}
        random = np.random.default_rng(0x5EED)
        self._a = random.integers(1, 1 << 32, _PERMUTATIONS, dtype=np.uint64) | np.uint64(1)
        self._b = random.integers(0, 1 << 32, _PERMUTATIONS, dtype=np.uint64)

    def find(self, text: str) -> tuple[str, float] | None:
        """(name, similarity) of an earlier text that this one repeats, or None."""
        return self._same(text) or self._near(*self._signed(text))

    def add(self, name: str, text: str) -> None:
        self._add(name, text, *self._signed(text))

    def find_or_add(self, name: str, text: str) -> tuple[str, float] | None:
        if (found := self._same(text)) is None:
            signed = self._signed(text)  # once: it is nearly all of the work
            if (found := self._near(*signed)) is None:
                self._add(name, text, *signed)
        return found

    def _same(self, text: str) -> tuple[str, float] | None:
        name = self._exact.get(text_key(text))
        return None if name is None else (name, 1.0)

    def _near(self, shingles: np.ndarray, keys: list[_Key]) -> tuple[str, float] | None:
        for i in sorted({i for key in keys for i in self._bands.get(key, ())}):
            similarity = _jaccard(shingles, self._sets[i])
            if similarity >= self.threshold:
                return self._names[i], similarity
        return None

    def _add(self, name: str, text: str, shingles: np.ndarray, keys: list[_Key]) -> None:
        self._exact.setdefault(text_key(text), name)
        for key in keys:
            self._bands[key].append(len(self._sets))
        self._sets.append(shingles)
        self._names.append(name)

    def _signed(self, text: str) -> tuple[np.ndarray, list[_Key]]:
        shingles = self._shingles(text)
        return shingles, self._keys(shingles)

    def _shingles(self, text: str) -> np.ndarray:
        words = words_of(text)
        ids = np.fromiter((self._hash(word) for word in words), np.uint64, len(words))
        if len(ids) < _SHINGLE:
            ids = np.concatenate([ids, np.zeros(_SHINGLE - len(ids), np.uint64)])
        n = len(ids) - _SHINGLE + 1
        mixed = np.zeros(n, np.uint64)
        for i in range(_SHINGLE):  # wraps modulo 2^64, as meant
            mixed = (mixed ^ ids[i : i + n]) * np.uint64(0x9E3779B97F4A7C15)
            mixed ^= mixed >> np.uint64(29)
        return np.unique(mixed)

    def _hash(self, word: str) -> int:
        value = self._word_hash.get(word)
        if value is None:
            value = int.from_bytes(hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest(), "little")
            self._word_hash[word] = value
        return value

    def _keys(self, shingles: np.ndarray) -> list[_Key]:
        hashed = shingles[None, :] * self._a[:, None] + (self._b[:, None] << np.uint64(16))
        hashed ^= hashed >> np.uint64(32)
        hashed *= np.uint64(0xD6E8FEB86659FD93)
        hashed ^= hashed >> np.uint64(32)
        signature = hashed.min(axis=1).reshape(_BANDS, -1)
        return [(band, row.tobytes()) for band, row in enumerate(signature)]


def _jaccard(a: np.ndarray, b: np.ndarray) -> float:
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / (len(a) + len(b) - both)
