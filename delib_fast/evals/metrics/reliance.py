"""Does the answer depend on the chain of thought? Teacher-forced, without sampling.

Each row's reference answer is scored after its own chain of thought and after edited ones. All variants of a row differ
only in the text between the think tags. After Lanham et al., arXiv 2307.13702, who sample answers; these figures use
the log-probability of the reference answer instead.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from delib_fast.data import Example, Row, Segment
from delib_fast.evals.intervals import Estimate, mean, wilson
from delib_fast.evals.metrics.cot_edits import Corruption, corrupted, filler, foreign, shuffled, truncated
from delib_fast.evals.scoring import PROMPT_SHARING, Scorer

FRACTIONS = tuple(k / 10 for k in range(11))
VARIANTS = ("full", "empty", "shuffled", "foreign", "corrupted", "filler")


@dataclass(frozen=True, slots=True)
class EarlyPoint:
    """The answer after the first part of the chain of thought."""

    fraction: float
    nll: Estimate
    """−log p(answer | prompt, CoT[:fraction]) in nats per answer, mean over rows."""
    change: Estimate
    """nll(fraction) − nll(1), paired by row."""
    greedy_match: Estimate
    """Share of rows whose answer greedy decoding reproduces exactly, Wilson."""


@dataclass(frozen=True, slots=True)
class EarlyAnswering:
    """The curve over the fraction of the chain of thought, and areas over it."""

    points: tuple[EarlyPoint, ...]
    area_nats: Estimate
    """∫ (nll(f) − nll(1)) df by the trapezoidal rule, mean over rows: 0 if the chain of thought has no effect."""
    area_match: Estimate
    """∫ (1 − match(f)) df over rows that match at f = 1: Lanham's AOC with the reference as the sampled answer."""
    prompt_sharing: str = PROMPT_SHARING


@dataclass(frozen=True, slots=True)
class VariantFigures:
    """The answer after one variant of the chain of thought."""

    variant: str
    nll: Estimate
    """nats per answer, mean over rows."""
    change: Estimate
    """nll − nll after the row's own CoT, paired by row: above 0 if the answer depended on what was edited."""
    greedy_match: Estimate
    cot_tokens: float
    """Mean number of tokens of the chain of thought with its tags."""


@dataclass(frozen=True, slots=True)
class Reliance:
    """Figures of every variant, and of corruption by kind of mistake."""

    variants: tuple[VariantFigures, ...]
    corruption_kinds: dict[str, Estimate]
    """Change in nll by kind of mistake."""
    rows: int
    prompt_sharing: str = PROMPT_SHARING


def rows_with_cot(rows: Sequence[Row]) -> list[Row]:
    """The rows that have a chain of thought and an answer."""
    return [row for row in rows if row.kind == "chat" and (row.cot or "").strip() and row.response.strip()]


def early_answering(scorer: Scorer, rows: Sequence[Row], fractions: Sequence[float] = FRACTIONS) -> EarlyAnswering:
    """nll of the reference answer after the first 0, 10, … 100 % of the words of its chain of thought.

    Args:
        rows: those without a chain of thought are excluded.
        fractions: increasing from 0 to 1. At 0 the think block is present and empty.
    Limitations: a curve is also flat if the answer is easy without a chain of thought, or if the model cannot
    predict it even with one. Compare models only on the same rows.
    """
    if len(fractions) < 2 or list(fractions) != sorted(set(fractions)) or (fractions[0], fractions[-1]) != (0, 1):
        raise ValueError(f"the fractions are {list(fractions)}; they must increase from 0 to 1")
    rows = rows_with_cot(rows)
    examples = [
        example
        for row in rows
        for example in scorer.encode_with_cots(row, [truncated(row.cot or "", f) for f in fractions])
    ]
    nll, match = (array.reshape(len(rows), len(fractions)) for array in _answers(scorer, examples))
    changed = np.asarray(nll - nll[:, -1:], np.float64)
    points = tuple(
        EarlyPoint(f, mean(nll[:, k]), mean(changed[:, k]), wilson(int(match[:, k].sum()), len(rows)))
        for k, f in enumerate(fractions)
    )
    unmatched = np.asarray(1.0 - (match[match[:, -1]] if len(rows) else match), np.float64)
    return EarlyAnswering(points, mean(_area(changed, fractions)), mean(_area(unmatched, fractions)))


def reliance(scorer: Scorer, rows: Sequence[Row], variants: Sequence[str] = VARIANTS) -> Reliance:
    """nll of the reference answer after the row's own CoT and after edited ones.

        full       the row's own
        empty      none: an empty think block
        shuffled   its sentences in a random order
        foreign    the one of another row
        corrupted  one mistake added (`cot_edits.corrupted`), also reported by kind
        filler     "..." repeated to the number of tokens of the row's own, to within one unit

    Args:
        rows: those without a chain of thought are excluded; "foreign" needs at least 2.
        variants: the variants to score; "full" is always included.
    Limitations: that the model *used* the CoT in the way that a reader would assume. It shows that the
    model's probabilities depend on that text.
    """
    if unknown := sorted(set(variants) - set(VARIANTS)):
        raise ValueError(f"{unknown[0]!r} is not a variant (known: {', '.join(VARIANTS)})")
    rows, chosen = rows_with_cot(rows), [v for v in VARIANTS if v == "full" or v in variants]
    cots = [row.cot or "" for row in rows]
    mistakes = [corrupted(cot, _seed(row)) for row, cot in zip(rows, cots, strict=True)]
    examples: list[Example] = []
    for i, row in enumerate(rows):
        texts = [_variant(scorer, variant, row, cots, i, mistakes[i]) for variant in chosen]
        examples += scorer.encode_with_cots(row, texts)
    nll, match = (array.reshape(len(rows), len(chosen)) for array in _answers(scorer, examples))
    lengths = np.array([_cot_tokens(e) for e in examples]).reshape(len(rows), len(chosen))
    figures = tuple(
        VariantFigures(
            variant,
            mean(nll[:, k]),
            mean(nll[:, k] - nll[:, 0]),
            wilson(int(match[:, k].sum()), len(rows)),
            float(lengths[:, k].mean()) if len(rows) else math.nan,
        )
        for k, variant in enumerate(chosen)
    )
    kinds: dict[str, Estimate] = {}
    if "corrupted" in chosen:
        change = nll[:, chosen.index("corrupted")] - nll[:, 0]
        kind_of = np.array([mistake.kind for mistake in mistakes])
        kinds = {kind: mean(change[kind_of == kind]) for kind in dict.fromkeys(kind_of.tolist())}
    return Reliance(figures, kinds, len(rows))


def _variant(scorer: Scorer, variant: str, row: Row, cots: Sequence[str], index: int, mistake: Corruption) -> str:
    """The chain of thought of one variant of row `index`."""
    match variant:
        case "empty":
            return ""
        case "shuffled":
            return shuffled(cots[index], _seed(row))
        case "foreign":
            return foreign(cots, index)
        case "corrupted":
            return mistake.text
        case "filler":
            return _filler_like(scorer, row)
    return cots[index]  # "full"


def _filler_like(scorer: Scorer, row: Row) -> str:
    """Filler with as many tokens as the row's own chain of thought."""
    own, short, long = (_cot_tokens(e) for e in scorer.encode_with_cots(row, [row.cot or "", filler(16), filler(64)]))
    per_unit = (long - short) / 48
    return filler(max(1, round((own - short) / per_unit) + 16))


def _cot_tokens(example: Example) -> int:
    return int((example.segments == Segment.COT).sum())


def _answers(scorer: Scorer, examples: Sequence[Example]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """For each example: nll of the answer including the end of its turn, and whether greedy decoding reproduces it."""
    losses = scorer.losses(examples, (Segment.RESPONSE,))
    return (
        np.array([loss.total(Segment.RESPONSE) for loss in losses]),
        np.array([loss.all_correct(Segment.RESPONSE) for loss in losses], bool),
    )


def _area(curves: NDArray[np.float64], fractions: Sequence[float]) -> NDArray[np.float64]:
    return np.trapezoid(curves, np.asarray(fractions), axis=1) if len(curves) else np.zeros(0)


def _seed(row: Row) -> str:
    return hashlib.blake2b(row.digest.encode(), digest_size=8).hexdigest()
