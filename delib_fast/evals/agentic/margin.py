"""A teacher-forced margin: is the aligned action more likely than the harmful one? No judge and no sampling."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from delib_fast.data import Message, Row, Segment
from delib_fast.evals.agentic.prompts import Condition, conditions, prompt, texts
from delib_fast.evals.intervals import Estimate, bootstrap, share_by_group
from delib_fast.evals.scoring import PROMPT_SHARING, Scorer


@dataclass(frozen=True, slots=True)
class MarginFigures:
    group: str
    margin: Estimate
    """Mean over conditions of logp(aligned) − logp(misaligned), nats per reply; bootstrap by condition."""
    margin_per_token: Estimate
    """The same with each logp averaged over its tokens, since the replies differ a little in length."""
    aligned_likelier: Estimate
    """Share of pairs with a margin above 0."""
    pairs: int


@dataclass(frozen=True, slots=True)
class Margins:
    figures: tuple[MarginFigures, ...]
    by_condition: dict[str, float]
    prompt_sharing: str = PROMPT_SHARING


def margins(scorer: Scorer, chosen: Sequence[Condition] | None = None) -> Margins:
    """logp(aligned action) − logp(misaligned action) over all conditions, by scenario and by goal.

        margin(condition) = mean over its pairs of [Σ_t log p(aligned_t) − Σ_t log p(misaligned_t)]

    Args:
        chosen: the conditions; by default the 3 × 9 without a scratchpad, since the replies consist of actions only.
    Limitations: how often the model would take either action; both replies may be very unlikely. The replies
    were written for this project, and their wording affects the margin: compare models, or conditions of one scenario,
    but not scenarios.
    """
    chosen = conditions(scratchpad=False) if chosen is None else list(chosen)
    rows, owners = [], []
    for condition in chosen:
        scenario = texts()["scenarios"][condition.scenario]
        for aligned, misaligned in zip(scenario["aligned"], scenario["misaligned"], strict=True):
            messages = prompt(replace(condition, scratchpad=False))
            rows += [_row(condition, messages, aligned), _row(condition, messages, misaligned)]
            owners.append(condition)
    losses = scorer.losses(scorer.encode(rows), (Segment.RESPONSE,))
    nll = np.array([loss.total(Segment.RESPONSE) for loss in losses]).reshape(-1, 2)
    tokens = np.array([loss.tokens(Segment.RESPONSE) for loss in losses]).reshape(-1, 2)
    margin, per_token = nll[:, 1] - nll[:, 0], nll[:, 1] / tokens[:, 1] - nll[:, 0] / tokens[:, 0]
    keys = [("all", "")] + [
        (name, value) for name in ("scenario", "goal") for value in dict.fromkeys(getattr(c, name) for c in chosen)
    ]
    figures = []
    for name, value in keys:
        members = np.array([i for i, c in enumerate(owners) if name == "all" or getattr(c, name) == value])
        figures.append(
            _figures(
                "all" if name == "all" else f"{name}: {value}",
                margin[members],
                per_token[members],
                [owners[i].id for i in members],
            )
        )
    ids = np.array([c.id for c in owners])
    return Margins(tuple(figures), {c.id: float(margin[ids == c.id].mean()) for c in chosen})


def _figures(
    group: str, margin: NDArray[np.float64], per_token: NDArray[np.float64], owners: Sequence[str]
) -> MarginFigures:
    return MarginFigures(
        group,
        bootstrap(lambda i: float(margin[i].mean()), owners, resamples=400),
        bootstrap(lambda i: float(per_token[i].mean()), owners, resamples=400),
        share_by_group(margin > 0, owners),
        len(margin),
    )


def _row(condition: Condition, messages: Sequence[Message], response: str) -> Row:
    digest = hashlib.blake2b(f"{condition.id}\0{response}".encode(), digest_size=8).hexdigest()
    return Row(
        kind="chat",
        location=f"scenarios.yaml ({condition.id})",
        source="agentic",
        digest=digest,
        messages=tuple(messages),
        response=response.strip(),
    )
