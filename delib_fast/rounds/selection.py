"""Which replies of a round are kept, and the rows that they become."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from delib_fast.datagen.dedup import text_key
from delib_fast.datagen.user_prompts import UserPrompt
from delib_fast.rounds.judging import Rating
from delib_fast.rounds.sampling import Drawn
from delib_fast.rounds.settings import KeepConfig


@dataclass
class Candidate:
    """A reply, its rating, and why it is dropped."""

    drawn: Drawn
    rating: Rating | None = None
    dropped: str | None = None
    """None if the reply is kept."""

    @property
    def score(self) -> float:
        """The score of a rated reply."""
        assert self.rating is not None, "only rated replies have a score"
        return self.rating.score

    @property
    def key(self) -> bytes:
        """Equal for replies with the same prompt, chain of thought and response."""
        return reply_key(self.drawn.prompt, self.drawn.reply.cot, self.drawn.reply.response)


def reply_key(prompt: UserPrompt, cot: str | None, response: str) -> bytes:
    """Equal for replies to a prompt with the same chain of thought and response, but for case and punctuation."""
    return text_key(f"{prompt.id}\n{cot or ''}\n{response}")


def select(candidates: Sequence[Candidate], rules: KeepConfig, seen: Iterable[bytes]) -> list[Candidate]:
    """Drop the replies that are not trained on, and return the others, in order.

        below_threshold   score < threshold
        not_best          best_of_k: another reply to the prompt has a higher score (then: a higher sum over the axes;
                          then: it was sampled earlier)
        not_above_mean    best_of_k: the best reply does not have a score above the mean of the prompt's rated replies
        duplicate         an earlier round kept the same reply to the prompt, or it was sampled twice

    Args:
        candidates: all replies of the round. Those that are dropped already are not considered.
        seen: the keys of the replies that earlier rounds kept.
    """
    rated: dict[str, list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        if candidate.dropped is None:
            rated[candidate.drawn.prompt.id].append(candidate)
    known = set(seen)
    for own in rated.values():
        mean = fmean(candidate.score for candidate in own)
        if rules.best_of_k:
            best = min(own, key=_rank)
            for candidate in own:
                if candidate is not best:
                    candidate.dropped = "not_best"
                elif candidate.score <= mean:
                    candidate.dropped = "not_above_mean"
        for candidate in own:
            if rules.threshold is not None and candidate.score < rules.threshold:
                candidate.dropped = "below_threshold"
            if candidate.dropped is None:
                if candidate.key in known:
                    candidate.dropped = "duplicate"
                known.add(candidate.key)
    return [candidate for candidate in candidates if candidate.dropped is None]


def _rank(candidate: Candidate) -> tuple[float, float, int]:
    assert candidate.rating is not None
    return -candidate.score, -sum(candidate.rating.scores.values()), candidate.drawn.number


def row_of(candidate: Candidate, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """A kept reply as a row: prompt (or messages), cot, response, and where they came from."""
    drawn, rating = candidate.drawn, candidate.rating
    assert rating is not None
    reply = drawn.reply
    cot = {"cot": reply.cot} if reply.cot else {}
    prompt: dict[str, Any] = {"prompt": drawn.prompt.turns[0]["content"]}
    if not drawn.prompt.single:
        reasoning = {"reasoning_content": reply.cot} if reply.cot else {}
        turns = [dict(turn) for turn in drawn.prompt.turns]
        prompt = {"messages": [*turns, {"role": "assistant", **reasoning, "content": reply.response}]}
    return {
        **prompt,
        **cot,
        "response": reply.response,
        "scores": rating.scores,
        "votes": rating.votes,
        "sample": drawn.number,
        "prompt_id": drawn.prompt.id,
        "request_ids": rating.request_ids,
        **provenance,
    }


def dropped_row(candidate: Candidate) -> dict[str, Any]:
    """A dropped reply, for dropped.jsonl."""
    drawn, rating = candidate.drawn, candidate.rating
    return {
        "prompt_id": drawn.prompt.id,
        "reason": candidate.dropped,
        "sample": drawn.number,
        "prompt": drawn.prompt.conversation,
        "cot": drawn.reply.cot,
        "response": drawn.reply.response,
        "votes": [] if rating is None else rating.votes,
        "request_ids": [] if rating is None else rating.request_ids,
    }


def drop_counts(candidates: Sequence[Candidate]) -> dict[str, int]:
    """The number of dropped replies by reason, the most frequent first."""
    counts = Counter(candidate.dropped for candidate in candidates if candidate.dropped is not None)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
