"""A plan of data that is not there yet: lengths of a stage's examples from a file, or drawn from a distribution.

    --lengths aft=lengths.txt                                   a line an example: its tokens, and those supervised
    --lengths aft=lognormal:examples=20000,median=9000,sigma=1  drawn with the run's seed; supervised=0.8 of them

Sizes: N examples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from delib_fast.config import Config, ConfigError, StageConfig
from delib_fast.data import Counts, DataError, Segment, SourceShare, TokenizedDataset
from delib_fast.training.dataset import RunDataset

_DRAWN = {"examples": 0.0, "median": 0.0, "sigma": 1.0, "supervised": 1.0}
_SHORTEST = 16


class Sizes(NamedTuple):
    """(N,) tokens of each example, and how many of them, at its end, are supervised."""

    tokens: NDArray[np.int64]
    supervised: NDArray[np.int64]


def sizes_of(options: Sequence[str], config: Config) -> dict[str, Sizes]:
    """The sizes of each stage that `--lengths` options name; one without a stage is for every stage.

    Raises:
        ConfigError: an option can't be understood, or its file not be read; names the line.
    """
    found: dict[str, Sizes] = {}
    names = [stage.name for stage in config.stages]
    for option in options:
        name, _, rest = option.partition("=")
        sizes = _sizes(rest if name in names else option, f"--lengths {option}", config.seed)
        found |= {name: sizes} if name in names else dict.fromkeys(names, sizes)
    return found


def _sizes(what: str, where: str, seed: int) -> Sizes:
    if what.startswith("lognormal:"):
        return _drawn(what.removeprefix("lognormal:"), where, seed)
    try:
        lines = Path(what).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{where}: {what!r} is neither a file of lengths that can be read ({error}) nor "
            "lognormal:examples=N,median=TOKENS,sigma=S"
        ) from None
    rows = []
    for number, line in enumerate(lines, 1):
        numbers = [int(word) if word.isdecimal() else -1 for word in line.split()]
        if not numbers:
            continue
        if len(numbers) > 2 or numbers[0] < 2 or not 0 <= numbers[-1] <= numbers[0]:
            raise ConfigError(
                f"{where}: {what}:{number}: {line.strip()[:40]!r}: give the tokens of an example (2 or "
                "more), and after a space how many of them are supervised (all, if left out)"
            )
        rows.append((numbers[0], numbers[-1]))
    if not rows:
        raise ConfigError(f"{where}: {what} holds no lengths")
    return Sizes(*np.array(rows, np.int64).T)


def _drawn(settings: str, where: str, seed: int) -> Sizes:
    values = dict(_DRAWN)
    try:
        for item in settings.split(","):
            key, _, value = item.partition("=")
            values[key] = float(value)
    except ValueError:
        raise ConfigError(f"{where}: {item!r} is not NAME=NUMBER") from None
    if unknown := values.keys() - _DRAWN.keys():
        raise ConfigError(f"{where}: unknown {sorted(unknown)[0]!r} (known: {', '.join(_DRAWN)})")
    N, median, sigma, supervised = (values[key] for key in _DRAWN)
    if not (1 <= N < 2**31 and _SHORTEST <= median < 2**31 and 0 <= sigma < 10 and 0 < supervised <= 1):
        raise ConfigError(
            f"{where}: give examples of 1 or more, a median of {_SHORTEST} tokens or more, sigma of 0 to "
            "10 (the spread of the logarithm: 1 is a third to three times the median) and supervised "
            "above 0 and at most 1"
        )
    drawn = np.random.default_rng(seed).lognormal(np.log(median), sigma, int(N))
    tokens = np.maximum(drawn, _SHORTEST).astype(np.int64)
    return Sizes(tokens, np.ceil(tokens * supervised).astype(np.int64))


class AssumedCorpus(RunDataset):
    """A corpus whose examples have sizes and no text: it can be planned, and nothing else."""

    def __init__(self, config: Config, tokenizer_folder: Path, ranks: Any, sizes: dict[str, Sizes]) -> None:
        super().__init__(config, tokenizer_folder, ranks)
        self._sizes = sizes

    @property
    def tokenizer(self) -> Any:
        return NoTokenizer() if self._sizes.keys() >= {s.name for s in self._config.stages} else super().tokenizer

    def encoded(self, stage: StageConfig) -> TokenizedDataset:
        if stage.name not in self._sizes:
            return super().encoded(stage)
        if stage.name not in self._encoded:
            self._encoded[stage.name] = encoded_of(self._sizes[stage.name], stage)
        return self._encoded[stage.name]

    def mixed(self, stage: StageConfig) -> tuple[TokenizedDataset, list[SourceShare]]:
        return (self.encoded(stage), []) if stage.name in self._sizes else super().mixed(stage)

    def refuse_leaks(self, stage: StageConfig) -> None:
        if stage.name not in self._sizes:
            super().refuse_leaks(stage)

    def _bad_rows(self, stage: StageConfig) -> Counter[str]:
        return Counter() if stage.name in self._sizes else super()._bad_rows(stage)

    def _shares_prompts(self, stage: StageConfig) -> bool:
        return stage.name not in self._sizes and super()._shares_prompts(stage)


class NoTokenizer:
    """Stands in where only the sizes of the model are asked for."""

    bos_token_id = eos_token_id = None

    def get_vocab(self) -> dict[str, int]:
        raise ConfigError("model.architecture.vocab_size: give it; with --lengths no tokenizer is read")


def encoded_of(sizes: Sizes, stage: StageConfig) -> TokenizedDataset:
    """Examples of these sizes, without memory for their tokens; over-long ones cut, left out or refused, as the stage
    says."""
    tokens, supervised = sizes
    capacity, over = stage.pack_capacity, sizes.tokens > stage.pack_capacity
    counts = Counts(rows=len(tokens))
    if over.any() and stage.over_long == "error":
        raise DataError(
            f"stage {stage.name!r}: {over.sum():,} of {len(tokens):,} lengths are over pack_capacity "
            f"({capacity:,}); raise it, or set over_long",
            reason="over_long",
        )
    if over.any() and stage.over_long == "split":
        pieces = -(-tokens // capacity)
        counts.split_documents = int(over.sum())
        last = np.cumsum(pieces) - 1
        rest = tokens - (pieces - 1) * capacity
        tokens = np.full(int(pieces.sum()), capacity)
        tokens[last] = rest
        supervised = tokens
    elif over.any():
        counts.dropped_over_long = int(over.sum())
        tokens, supervised = tokens[~over], supervised[~over]
    if not len(tokens):
        raise DataError(
            f"stage {stage.name!r}: all lengths are over pack_capacity ({capacity:,}); raise it", reason="over_long"
        )
    targets = np.zeros((len(tokens), len(Segment)), np.int64)
    targets[:, Segment.DOCUMENT if stage.kind == "msm" else Segment.RESPONSE] = np.minimum(supervised, tokens - 1)
    targets[:, Segment.PROMPT] = tokens - 1 - targets.sum(1)
    counts.examples, counts.tokens = len(tokens), int(tokens.sum())
    return TokenizedDataset.of_arrays(
        input_ids=np.broadcast_to(np.int32(0), counts.tokens),
        segments=np.broadcast_to(np.int8(0), counts.tokens),
        lengths=tokens,
        weights=np.ones(len(tokens), np.float32),
        target_counts=targets,
        prompts=np.zeros((len(tokens), 2), np.int64),
        location=lambda index: f"length {index + 1}",
        counts=counts,
    )
