"""Plans without data: the lengths of a stage's examples are read from a file, or drawn from a distribution.

    --lengths aft=lengths.txt                                   one example per line: tokens, and supervised tokens
    --lengths aft=lognormal:examples=20000,median=9000,sigma=1  drawn with the run's seed; supervised=0.8 of the tokens

Sizes: N examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from delib_fast.config import Config, ConfigError, StageConfig
from delib_fast.data import Counts, DataError, Segment, TokenizedDataset
from delib_fast.files import read_text

_LOGNORMAL_DEFAULTS = {"examples": 0.0, "median": 0.0, "sigma": 1.0, "supervised": 1.0}
_SHORTEST = 16
_SHOWN_CHARACTERS = 40


class Lengths(NamedTuple):
    """The lengths of the examples of a stage."""

    tokens: NDArray[np.int64]
    """(N,) tokens of each example."""
    supervised: NDArray[np.int64]
    """(N,) supervised tokens at the end of each example."""


def parse_lengths(options: Sequence[str], config: Config) -> dict[str, Lengths]:
    """Parse `--lengths` options into the lengths of each stage. An option without a stage applies to every stage.

    Raises:
        ConfigError: an option is not valid, or its file cannot be read; the message names the line of the file.
    """
    found: dict[str, Lengths] = {}
    names = [stage.name for stage in config.stages]
    for option in options:
        name, _, rest = option.partition("=")
        lengths = _parse(rest if name in names else option, f"--lengths {option}", config.seed)
        found |= {name: lengths} if name in names else dict.fromkeys(names, lengths)
    return found


def _parse(value: str, where: str, seed: int) -> Lengths:
    if value.startswith("lognormal:"):
        return _draw(value.removeprefix("lognormal:"), where, seed)
    try:
        lines = read_text(value).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{where}: {value!r} is neither a readable file of lengths ({error}) nor "
            "lognormal:examples=N,median=TOKENS,sigma=S"
        ) from None
    rows = []
    for number, line in enumerate(lines, 1):
        numbers = [int(word) if word.isdecimal() else -1 for word in line.split()]
        if not numbers:
            continue
        if len(numbers) > 2 or numbers[0] < 2 or not 0 <= numbers[-1] <= numbers[0]:
            raise ConfigError(
                f"{where}: {value}:{number}: {line.strip()[:_SHOWN_CHARACTERS]!r}: give the number of tokens of an "
                "example (2 or more) and, after a space, how many of them are supervised (default: all)"
            )
        rows.append((numbers[0], numbers[-1]))
    if not rows:
        raise ConfigError(f"{where}: {value} contains no lengths")
    return Lengths(*np.array(rows, np.int64).T)


def _draw(settings: str, where: str, seed: int) -> Lengths:
    values = dict(_LOGNORMAL_DEFAULTS)
    for item in settings.split(","):
        key, _, value = item.partition("=")
        try:
            values[key] = float(value)
        except ValueError:
            raise ConfigError(f"{where}: {item!r} is not NAME=NUMBER") from None
    if unknown := values.keys() - _LOGNORMAL_DEFAULTS.keys():
        raise ConfigError(f"{where}: unknown {sorted(unknown)[0]!r} (known: {', '.join(_LOGNORMAL_DEFAULTS)})")
    N, median, sigma, supervised = (values[key] for key in _LOGNORMAL_DEFAULTS)
    if not (1 <= N < 2**31 and _SHORTEST <= median < 2**31 and 0 <= sigma < 10 and 0 < supervised <= 1):
        raise ConfigError(
            f"{where}: give examples (1 or more), median (tokens, {_SHORTEST} or more), optionally sigma (0 to 10, the "
            "standard deviation of the logarithm: with 1, two thirds of the lengths are a third to three times the "
            "median) and supervised (above 0 and at most 1)"
        )
    drawn = np.random.default_rng(seed).lognormal(np.log(median), sigma, int(N))
    tokens = np.maximum(drawn, _SHORTEST).astype(np.int64)
    return Lengths(tokens, np.ceil(tokens * supervised).astype(np.int64))


def synthetic_examples(lengths: Lengths, stage: StageConfig) -> TokenizedDataset:
    """Create examples of these lengths for a plan. Every token is 0, and all of them share one element of memory.

    Examples longer than the pack capacity are split, dropped or rejected, as the stage's `over_long` says.

    Raises DataError if they are rejected, or if no example remains.
    """
    tokens, supervised = lengths
    capacity, over = stage.pack_capacity, lengths.tokens > stage.pack_capacity
    counts = Counts(rows=len(tokens))
    if over.any() and stage.over_long == "error":
        raise DataError(
            f"stage {stage.name!r}: {over.sum():,} of {len(tokens):,} lengths are above pack_capacity ({capacity:,}); "
            "raise it, or set over_long",
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
            f"stage {stage.name!r}: all lengths are above pack_capacity ({capacity:,}); raise it", reason="over_long"
        )
    targets = np.zeros((len(tokens), len(Segment)), np.int64)
    targets[:, Segment.DOCUMENT if stage.kind == "msm" else Segment.RESPONSE] = np.minimum(supervised, tokens - 1)
    targets[:, Segment.PROMPT] = tokens - 1 - targets.sum(1)
    counts.examples, counts.tokens = len(tokens), int(tokens.sum())
    return TokenizedDataset.from_arrays(
        input_ids=np.broadcast_to(np.int32(0), counts.tokens),
        segments=np.broadcast_to(np.int8(0), counts.tokens),
        lengths=tokens,
        weights=np.ones(len(tokens), np.float32),
        target_counts=targets,
        prompt_keys=np.zeros((len(tokens), 2), np.int64),  # no shared prompts
        location=lambda index: f"length {index + 1}",
        counts=counts,
    )
