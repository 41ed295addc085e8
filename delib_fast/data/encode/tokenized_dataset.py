"""Encoded examples, whether their tokens are in memory or in memory-mapped files (cache.py).

Sizes: N examples, n tokens of one example.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from delib_fast.data.rows import Segment

NUM_SEGMENTS = len(Segment)
_HASH_TOKENS = 1 << 22


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """A sequence of tokens that attend to each other and to nothing else."""

    input_ids: NDArray[np.int32]
    """(n,)"""
    segments: NDArray[np.int8]
    """(n,) the `Segment` of each token."""
    location: str
    """`file:line` of the row."""
    weight: float = 1.0
    """Factor on the loss weight of each token."""

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def target_counts(self) -> NDArray[np.int64]:
        """(4,) number of targets by segment. Every token except the first is a target."""
        return np.bincount(self.segments[1:], minlength=NUM_SEGMENTS)

    @property
    def prompt_key(self) -> tuple[int, int]:
        """(number of tokens, their hash) that other replies to the same prompt share.

        These are the tokens of the prompt without its last one, which predicts the first token of the reply. (0, 0) for
        an example that does not begin with a prompt, such as a document.
        """
        others = np.flatnonzero(self.segments != Segment.PROMPT)
        shared = (int(others[0]) if len(others) else len(self)) - 1
        if shared < 1:
            return 0, 0
        data = np.ascontiguousarray(self.input_ids[:shared], np.int32).data
        return shared, int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


@dataclass(slots=True)
class Counts:
    """Counts of encoded rows, and of their examples, tokens and targets."""

    rows: int = 0
    examples: int = 0
    dropped_over_long: int = 0
    split_documents: int = 0
    """Documents that were split into several examples."""
    tokens: int = 0
    targets: dict[str, int] = field(default_factory=lambda: {s.name.lower(): 0 for s in Segment})
    """Number of targets by segment; every token of an example except the first is a target."""

    def add_row(self, examples: Sequence[Example]) -> None:
        """Add one row, given its examples: one, several if it was split, or none if it was dropped."""
        self.rows += 1
        self.dropped_over_long += not examples
        self.split_documents += len(examples) > 1
        self.examples += len(examples)
        for example in examples:
            self.tokens += len(example)
            for segment, count in zip(Segment, example.target_counts.tolist(), strict=True):
                self.targets[segment.name.lower()] += count

    def __add__(self, other: Counts) -> Counts:
        ours, theirs = asdict(self), asdict(other)
        targets = {name: n + theirs["targets"][name] for name, n in ours.pop("targets").items()}
        return Counts(**{name: n + theirs[name] for name, n in ours.items()}, targets=targets)


class TokenArrays(NamedTuple):
    """The tokens of many examples, concatenated."""

    input_ids: NDArray[np.int32]
    segments: NDArray[np.int8]

    def digest(self) -> str:
        """Return the sha256 of both arrays, which are read once."""
        digest = hashlib.sha256()
        for array in self:
            for start in range(0, len(array), _HASH_TOKENS):  # in blocks, since the array may be memory-mapped
                digest.update(np.ascontiguousarray(array[start : start + _HASH_TOKENS]).data)
        return digest.hexdigest()


class TokenizedDataset(Sequence[Example]):
    """A sequence of examples, each a span of the flat arrays that hold the tokens.

    There may be several arrays, so that datasets can be joined and examples repeated without copying a token.
    """

    def __init__(self, examples: Sequence[Example], counts: Counts | None = None) -> None:
        self.counts = counts if counts is not None else _count(examples)
        self.lengths = np.fromiter((len(e) for e in examples), np.int64, len(examples))
        """(N,) tokens of each example."""
        self.starts = np.cumsum(self.lengths) - self.lengths
        """(N,) where each example starts in its arrays."""
        self.array_of = np.zeros(len(examples), np.int32)
        """(N,) index into `arrays`."""
        self.arrays = [
            TokenArrays(
                _concatenate([e.input_ids for e in examples], np.int32),
                _concatenate([e.segments for e in examples], np.int8),
            )
        ]
        self._array_digests: list[str | None] = [None]
        self.weights = np.fromiter((e.weight for e in examples), np.float32, len(examples))
        """(N,) factor on the loss weight of each token of an example."""
        self.location: Callable[[int], str] = [e.location for e in examples].__getitem__
        """The location of an example's row, by the example's index."""
        self.target_counts = np.array([e.target_counts for e in examples], np.int64).reshape(-1, NUM_SEGMENTS)
        """(N, 4) number of targets of each example, by segment."""
        self.prompt_keys = np.array([e.prompt_key for e in examples], np.int64).reshape(-1, 2)
        """(N, 2) `Example.prompt_key` of each example."""
        self.teacher: TokenizedDataset | None = None
        """What the stage's teacher reads for each example (teacher.py); None without a teacher."""

    @classmethod
    def from_arrays(
        cls,
        *,
        input_ids: NDArray[np.int32],
        segments: NDArray[np.int8],
        lengths: NDArray[np.int64],
        weights: NDArray[np.float32],
        target_counts: NDArray[np.int64],
        prompt_keys: NDArray[np.int64],
        location: Callable[[int], str],
        counts: Counts,
    ) -> TokenizedDataset:
        """Create a dataset from concatenated arrays, without a copy, so that they may be memory-mapped.

        `lengths` has one entry per example, as do all arrays except `input_ids` and `segments`.
        """
        dataset = cls([], counts)
        dataset.lengths, dataset.weights, dataset.location = lengths, weights, location
        dataset.target_counts, dataset.prompt_keys = target_counts, prompt_keys
        dataset.starts = np.cumsum(lengths) - lengths
        dataset.array_of = np.zeros(len(lengths), np.int32)
        dataset.arrays, dataset._array_digests = [TokenArrays(input_ids, segments)], [None]
        return dataset

    @classmethod
    def join(cls, datasets: Sequence[TokenizedDataset]) -> TokenizedDataset:
        """Concatenate datasets; no token is copied."""
        dataset = cls([], sum((d.counts for d in datasets), Counts()))
        dataset.arrays = [arrays for d in datasets for arrays in d.arrays]
        dataset._array_digests = [digest for d in datasets for digest in d._array_digests]
        first_array = np.cumsum([0, *(len(d.arrays) for d in datasets)])[:-1]
        dataset.array_of = np.concatenate([d.array_of + first for d, first in zip(datasets, first_array, strict=True)])
        dataset.lengths = np.concatenate([d.lengths for d in datasets])
        dataset.starts = np.concatenate([d.starts for d in datasets])
        dataset.weights = np.concatenate([d.weights for d in datasets])
        dataset.target_counts = np.concatenate([d.target_counts for d in datasets])
        dataset.prompt_keys = np.concatenate([d.prompt_keys for d in datasets])
        ends = np.cumsum([len(d) for d in datasets])

        def location(index: int) -> str:
            k = int(np.searchsorted(ends, index, side="right"))
            return datasets[k].location(index - int(ends[k]) + len(datasets[k]))

        dataset.location = location
        teachers = [d.teacher for d in datasets if d.teacher is not None]
        if teachers:
            assert len(teachers) == len(datasets), "either every dataset of a stage has a teacher, or none has"
            dataset.teacher = cls.join(teachers)
        return dataset

    def take(self, indices: NDArray[np.int64]) -> TokenizedDataset:
        """Return the examples at these indices, which may repeat. No token is copied, and `counts` does not change."""
        dataset = TokenizedDataset([], self.counts)
        dataset.arrays, dataset._array_digests = self.arrays, self._array_digests
        for name in ("array_of", "lengths", "starts", "weights", "target_counts", "prompt_keys"):
            setattr(dataset, name, getattr(self, name)[indices])
        dataset.location = lambda index: self.location(int(indices[index]))
        dataset.teacher = None if self.teacher is None else self.teacher.take(indices)
        return dataset

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        i = int(index) % len(self)
        ids, segments = self.arrays[int(self.array_of[i])]
        span = slice(self.starts[i], self.starts[i] + self.lengths[i])
        return Example(ids[span], segments[span], self.location(i), float(self.weights[i]))

    def tokens(self, index: int) -> NDArray[np.int32]:
        """Return the (n,) ids of one example."""
        start = self.starts[index]
        return self.arrays[int(self.array_of[index])].input_ids[start : start + self.lengths[index]]

    def gather(
        self, indices: NDArray[np.int64], begins: NDArray[np.int64] | None = None, ends: NDArray[np.int64] | None = None
    ) -> tuple[NDArray[np.int32], NDArray[np.int8]]:
        """Concatenate the ids and the segments of examples.

        Args:
            indices: (M,) which examples.
            begins, ends: (M,) the span of tokens of each example; by default all of them.
        """
        starts = self.starts[indices]
        begins = starts if begins is None else starts + begins
        ends = starts + (self.lengths[indices] if ends is None else ends)
        spans = [
            (self.arrays[k], slice(begin, end))
            for k, begin, end in zip(self.array_of[indices].tolist(), begins.tolist(), ends.tolist(), strict=True)
        ]
        return (
            np.concatenate([arrays.input_ids[span] for arrays, span in spans]),
            np.concatenate([arrays.segments[span] for arrays, span in spans]),
        )

    def digest(self) -> str:
        """Return the sha256 of all tokens, segments and weights, in order, and of what a teacher reads.

        Tokens are only read by the first call.
        """
        digest = hashlib.sha256()
        for array in (self.array_of, self.starts, self.lengths, self.weights, self.target_counts, self.prompt_keys):
            digest.update(np.ascontiguousarray(array).data)
        for known in self.array_digests():
            digest.update(known.encode())
        if self.teacher is not None:
            digest.update(self.teacher.digest().encode())
        return digest.hexdigest()

    def array_digests(self) -> list[str]:
        """The digest of each of `arrays`, which is computed once."""
        found = [known or arrays.digest() for known, arrays in zip(self._array_digests, self.arrays, strict=True)]
        self._array_digests[:] = found
        return found

    def set_array_digest(self, digest: str) -> None:
        """Set the digest of the only array, if its content is known to be what that digest was computed from."""
        assert len(self.arrays) == 1
        self._array_digests[0] = digest


def _concatenate(arrays: list[NDArray[Any]], dtype: type) -> NDArray[Any]:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype)


def _count(examples: Sequence[Example]) -> Counts:
    counts = Counts()
    for example in examples:
        counts.add_row([example])
    return counts
