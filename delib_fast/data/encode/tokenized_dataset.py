"""Encoded examples, wherever their tokens lie: in memory, or in memory-mapped files (cache.py).

Sizes: N examples, T tokens of a part.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from delib_fast.data.rows import Segment

NUM_SEGMENTS = len(Segment)
_HASH_TOKENS = 1 << 22


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One run of tokens that see each other and nothing else."""

    input_ids: NDArray[np.int32]
    """(n,)"""
    segments: NDArray[np.int8]
    """(n,) `Segment` of each token itself"""
    location: str
    """`file:line` of the row"""
    weight: float = 1.0
    """factor on the loss weight of each of its tokens"""

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def target_counts(self) -> NDArray[np.int64]:
        """(4,) tokens that can be predicted (all but the first), by segment."""
        return np.bincount(self.segments[1:], minlength=NUM_SEGMENTS)

    @property
    def prompt(self) -> tuple[int, int]:
        """(tokens, hash) of what other replies to the same prompt share: the prompt but for its last token, which
        predicts the first token of this reply. (0, 0) where the example begins otherwise, as a document does."""
        others = np.flatnonzero(self.segments != Segment.PROMPT)
        shared = (int(others[0]) if len(others) else len(self)) - 1
        if shared < 1:
            return 0, 0
        data = np.ascontiguousarray(self.input_ids[:shared], np.int32).data
        return shared, int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


@dataclass(slots=True)
class Counts:
    """What became of the rows."""

    rows: int = 0
    examples: int = 0
    dropped_over_long: int = 0
    split_documents: int = 0
    """documents cut into several examples"""
    tokens: int = 0
    targets: dict[str, int] = field(default_factory=lambda: {s.name.lower(): 0 for s in Segment})
    """tokens that can be predicted (all but the first of an example), by segment"""

    def add(self, example: Example) -> None:
        self.examples += 1
        self.tokens += len(example)
        for segment, count in zip(Segment, example.target_counts.tolist(), strict=True):
            self.targets[segment.name.lower()] += count

    def __add__(self, other: Counts) -> Counts:
        ours, theirs = asdict(self), asdict(other)
        targets = {name: n + theirs["targets"][name] for name, n in ours.pop("targets").items()}
        return Counts(**{name: n + theirs[name] for name, n in ours.items()}, targets=targets)


class TokenizedDataset(Sequence[Example]):
    """Examples as spans of flat arrays, and the account of how they came about.

    The arrays come in one or more parts, so that sets can be joined, and examples repeated, without a copy.
    """

    def __init__(self, examples: Sequence[Example], counts: Counts | None = None) -> None:
        self.counts = counts if counts is not None else _count(examples)
        self.lengths = np.fromiter((len(e) for e in examples), np.int64, len(examples))
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.shard_of = np.zeros(len(examples), np.int32)
        self.parts = [
            (_joined([e.input_ids for e in examples], np.int32), _joined([e.segments for e in examples], np.int8))
        ]
        self._part_digests: list[str | None] = [None]
        self.weights = np.fromiter((e.weight for e in examples), np.float32, len(examples))
        self.locations: Sequence[str] = [e.location for e in examples]
        self.target_counts = np.array([e.target_counts for e in examples], np.int64).reshape(-1, NUM_SEGMENTS)
        """(N, 4) tokens of each example that can be predicted, by segment"""
        self.prompts = np.array([e.prompt for e in examples], np.int64).reshape(-1, 2)
        """(N, 2) `Example.prompt` of each"""

    @classmethod
    def of_arrays(
        cls,
        *,
        input_ids: NDArray[np.int32],
        segments: NDArray[np.int8],
        lengths: NDArray[np.int64],
        weights: NDArray[np.float32],
        target_counts: NDArray[np.int64],
        prompts: NDArray[np.int64],
        locations: Sequence[str],
        counts: Counts,
    ) -> TokenizedDataset:
        """Examples that stand end to end in arrays, which are kept as they are (memory-mapped ones too)."""
        made = cls([], counts)
        made.lengths, made.weights, made.locations = lengths, weights, locations
        made.target_counts, made.prompts = target_counts, prompts
        made.starts = np.cumsum(lengths) - lengths
        made.shard_of = np.zeros(len(lengths), np.int32)
        made.parts, made._part_digests = [(input_ids, segments)], [None]
        return made

    @classmethod
    def join(cls, sets: Sequence[TokenizedDataset]) -> TokenizedDataset:
        """The examples of several sets, one set after another; no token is copied."""
        made = cls([], sum((s.counts for s in sets), Counts()))
        first_part = np.cumsum([0, *(len(s.parts) for s in sets)])
        made.parts = [part for s in sets for part in s.parts]
        made._part_digests = [digest for s in sets for digest in s._part_digests]
        made.shard_of = np.concatenate([s.shard_of + first for s, first in zip(sets, first_part, strict=False)])
        made.lengths = np.concatenate([s.lengths for s in sets])
        made.starts = np.concatenate([s.starts for s in sets])
        made.weights = np.concatenate([s.weights for s in sets])
        made.target_counts = np.concatenate([s.target_counts for s in sets])
        made.prompts = np.concatenate([s.prompts for s in sets])
        made.locations = JoinedPlaces([s.locations for s in sets])
        return made

    def take(self, indices: NDArray[np.int64]) -> TokenizedDataset:
        """The examples at these indices, repeats allowed; no token is copied. `counts` stays that of the whole."""
        made = TokenizedDataset([], self.counts)
        made.parts, made._part_digests = self.parts, self._part_digests
        for name in ("part_of", "lengths", "starts", "weights", "target_counts", "prompts"):
            setattr(made, name, getattr(self, name)[indices])
        made.locations = TakenPlaces(self.locations, indices)
        return made

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        i = int(index) % len(self)
        ids, segments = self.parts[self.shard_of[i]]
        span = slice(self.starts[i], self.starts[i] + self.lengths[i])
        return Example(ids[span], segments[span], self.locations[i], float(self.weights[i]))

    def tokens(self, index: int) -> NDArray[np.int32]:
        """(n,) ids of one example."""
        start = self.starts[index]
        return self.parts[self.shard_of[index]][0][start : start + self.lengths[index]]

    def gather(
        self, members: NDArray[np.int64], begins: NDArray[np.int64] | None = None, ends: NDArray[np.int64] | None = None
    ) -> tuple[NDArray[np.int32], NDArray[np.int8]]:
        """Ids and segments of some examples, end to end; of each all of it, or its tokens from begin to end."""
        at = self.starts[members]
        begins = at if begins is None else at + begins
        ends = at + (self.lengths[members] if ends is None else ends)
        spans = [
            (self.parts[part], slice(begin, end))
            for part, begin, end in zip(self.shard_of[members].tolist(), begins.tolist(), ends.tolist(), strict=True)
        ]
        return (
            np.concatenate([ids[span] for (ids, _), span in spans]),
            np.concatenate([segments[span] for (_, segments), span in spans]),
        )

    def digest(self) -> str:
        """Changes when any token, segment, weight or the order of the examples does. Tokens are read once only."""
        digest = hashlib.sha256()
        for array in (self.shard_of, self.starts, self.lengths, self.weights, self.target_counts, self.prompts):
            digest.update(np.ascontiguousarray(array).data)
        for k, part in enumerate(self.parts):
            known = self._part_digests[k] = self._part_digests[k] or _digest_of(part)
            digest.update(known.encode())
        return digest.hexdigest()


class JoinedPlaces(Sequence[str]):
    """Several sequences of places, one after another."""

    def __init__(self, parts: Sequence[Sequence[str]]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: Any) -> Any:
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self._parts[part][int(index) - int(self._ends[part]) + len(self._parts[part])]


class TakenPlaces(Sequence[str]):
    """Some of a sequence of places."""

    def __init__(self, locations: Sequence[str], indices: NDArray[np.int64]) -> None:
        self._locations, self._indices = locations, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        return self._locations[int(self._indices[index])]


def _digest_of(part: tuple[NDArray[np.int32], NDArray[np.int8]]) -> str:
    digest = hashlib.sha256()
    for array in part:
        for start in range(0, len(array), _HASH_TOKENS):  # a piece at a time: the array may be a file's
            digest.update(np.ascontiguousarray(array[start : start + _HASH_TOKENS]).data)
    return digest.hexdigest()


def _joined(arrays: list[NDArray[Any]], dtype: type) -> NDArray[Any]:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype)


def _count(examples: Sequence[Example]) -> Counts:
    counts = Counts(rows=len(examples))
    for example in examples:
        counts.add(example)
    return counts
