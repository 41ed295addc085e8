"""What is measured of a model between rounds: scores on held-out prompts, and its distance from the starting model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from delib_fast.config import SourceConfig
from delib_fast.data import read_source
from delib_fast.evals.intervals import Estimate, mean
from delib_fast.evals.metrics.drift import drift_from_base
from delib_fast.files import write_atomic
from delib_fast.rounds.sampling import CurrentModel, Drawn
from delib_fast.rounds.selection import Candidate

LOWEST_SCORE = 1.0
"""The score of a held-out reply that cannot be used: truncated, empty, or with stray tags."""
DRIFT_ROWS = "drift_rows.jsonl"
"""The file of the starting model's replies that the drift is measured on."""
_MOST_DRIFT_ROWS = 128


def heldout_record(candidate: Candidate) -> dict[str, Any]:
    """The reply to a held-out prompt as plain data.

    Its score is None if the ratings of the judge cannot be read, and 1 if the reply itself cannot be used: otherwise a
    model that is cut off more often would look better.
    """
    reply, rating = candidate.drawn.reply, candidate.rating
    score = LOWEST_SCORE if rating is None else None if rating.fault is not None else rating.score
    return {
        "prompt_id": candidate.drawn.prompt.id,
        "cot": reply.cot,
        "response": reply.response,
        "tokens": reply.tokens,
        "dropped": candidate.dropped,
        "score": score,
        "votes": [] if rating is None else rating.votes,
        "request_ids": [] if rating is None else rating.request_ids,
    }


@dataclass(frozen=True)
class Measure:
    """The figures of the model after a round (0: the starting model)."""

    after_round: int
    heldout: list[dict[str, Any]] = field(default_factory=list)
    """One record for each held-out prompt, see `heldout_record`."""
    drift: list[dict[str, Any]] = field(default_factory=list)
    """For each segment: KL(start ‖ model), and the nll of the starting model's replies under both models."""

    @property
    def scores(self) -> dict[str, float]:
        """The score of each held-out prompt that has one, by the id of the prompt."""
        return {r["prompt_id"]: r["score"] for r in self.heldout if r["score"] is not None}

    def score(self) -> Estimate | None:
        """The mean held-out score; None without held-out prompts."""
        return mean(list(self.scores.values())) if self.scores else None

    def change(self, start: Measure) -> Estimate | None:
        """The mean difference of the scores from those of the starting model, paired by prompt."""
        differences = [score - start.scores[key] for key, score in self.scores.items() if key in start.scores]
        return mean(differences) if differences and self.after_round else None

    def win_rate(self, start: Measure) -> float | None:
        """The share of prompts with a higher score than that of the starting model; an equal score counts one half."""
        pairs = [(score, start.scores[key]) for key, score in self.scores.items() if key in start.scores]
        if not pairs or not self.after_round:
            return None
        return sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)

    def figures(self, start: Measure) -> dict[str, Any]:
        """The figures as plain data, compared with the starting model."""
        score, change = self.score(), self.change(start)
        return {
            "after_round": self.after_round,
            "score": None if score is None else estimate_record(score),
            "change": None if change is None else estimate_record(change),
            "win_rate": self.win_rate(start),
            "unrated": sum(record["score"] is None for record in self.heldout),
            "unusable": sum(record["score"] is not None and not record["votes"] for record in self.heldout),
            "tokens": sum(record["tokens"] for record in self.heldout),
            "drift": self.drift,
        }


def write_drift_rows(path: Path, drawn: Sequence[Drawn]) -> None:
    """Write the first usable reply of the starting model to each prompt, at most 128, as rows."""
    rows: dict[str, dict[str, Any]] = {}
    for one in drawn:
        if one.fault(needs_cot=False) is None and one.prompt.id not in rows and len(rows) < _MOST_DRIFT_ROWS:
            cot = {"reasoning_content": one.reply.cot} if one.reply.cot else {}
            reply = {"role": "assistant", **cot, "content": one.reply.response}
            rows[one.prompt.id] = {"messages": [*one.prompt.turns, reply]}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values()))


def measure_drift(
    current: CurrentModel, start: CurrentModel, rows: Path, system_prompt: str | None
) -> list[dict[str, Any]]:
    """KL(start ‖ current) in nats per token, and the nll under both models, on replies of the starting model.

    Both models are in memory. Returns one record per segment; none if the starting model had no usable reply.
    """
    if not rows.exists() or not rows.stat().st_size:
        return []
    chats = read_source("replies of the starting model", SourceConfig(path=str(rows)))
    with start.loaded() as base, current.loaded() as model:
        found = drift_from_base(current.scorer(model, system_prompt), chats, base)
    return [
        {
            "segment": drift.segment,
            "kl": estimate_record(drift.kl),
            "start_nll": estimate_record(drift.base_nll),
            "nll": estimate_record(drift.nll),
            "tokens": drift.tokens,
        }
        for drift in found
    ]


def estimate_record(estimate: Estimate) -> dict[str, Any]:
    """An estimate as plain data. A bound that one row does not give is None."""
    value, low, high = (None if math.isnan(x) else x for x in (estimate.value, estimate.low, estimate.high))
    return {"value": value, "low": low, "high": high, "n": estimate.n}


def measure_from(tree: Mapping[str, Any]) -> Measure:
    """A measure that was written as plain data."""
    return Measure(int(tree["after_round"]), list(tree["heldout"]), list(tree["drift"]))
