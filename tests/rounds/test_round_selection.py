"""Which replies are kept: thresholds and the best of K, against values computed by hand."""

from __future__ import annotations

import pytest

from delib_fast.datagen.user_prompts import UserPrompt
from delib_fast.evals.sampling import Reply
from delib_fast.rounds.judging import Rating
from delib_fast.rounds.sampling import Drawn
from delib_fast.rounds.selection import Candidate, drop_counts, reply_key, row_of, select
from delib_fast.rounds.settings import KeepConfig

A, B = (UserPrompt(({"role": "user", "content": text},), f"p.txt:{n}") for n, text in ((1, "a?"), (2, "b?")))


def candidate(prompt: UserPrompt, number: int, *votes: tuple[int, int], text: str | None = None) -> Candidate:
    """A reply with votes of (compliance, helpfulness)."""
    reply = Reply("because", text or f"reply {number}", "closed", finished=True, tokens=5)
    rating = Rating([{"compliance": c, "helpfulness": h, "why": ""} for c, h in votes], ["id"])
    return Candidate(Drawn(prompt, number, reply), rating)


def kept(candidates: list[Candidate], seen: set[bytes] = frozenset(), **rules: object) -> list[tuple[str, int]]:
    found = select(candidates, KeepConfig.model_validate(rules), seen)
    return [(c.drawn.prompt.turns[0]["content"], c.drawn.number) for c in found]


def test_the_score_is_the_minimum_over_ratings_and_axes():
    rating = candidate(A, 0, (9, 8), (7, 10), (8, 9)).rating
    assert rating is not None
    assert rating.scores == {"compliance": 7, "helpfulness": 8, "min": 7}
    assert rating.score == 7


def test_threshold_keeps_every_reply_at_or_above_it():
    found = [candidate(A, 0, (7, 9)), candidate(A, 1, (9, 6)), candidate(A, 2, (8, 8)), candidate(B, 0, (6, 6))]
    assert kept(found, threshold=7) == [("a?", 0), ("a?", 2)]
    assert [c.dropped for c in found] == [None, "below_threshold", None, "below_threshold"]
    assert drop_counts(found) == {"below_threshold": 2}


def test_best_of_k_keeps_the_best_above_the_mean():
    """Scores 5 7 6: mean 6, so the 7 is kept. Scores 4 4: the best is at the mean, so nothing is."""
    found = [candidate(A, n, (s, 9)) for n, s in enumerate((5, 7, 6))] + [candidate(B, n, (4, 9)) for n in range(2)]
    assert kept(found, best_of_k=True) == [("a?", 1)]
    assert [c.dropped for c in found] == ["not_best", None, "not_best", "not_above_mean", "not_best"]


def test_ties_are_broken_by_the_sum_of_the_axes_and_then_by_the_order():
    """Scores 6 6 6 3 with sums 14, 15, 15: the second reply is the first of the best."""
    found = [candidate(A, 0, (6, 8)), candidate(A, 1, (6, 9)), candidate(A, 2, (9, 6)), candidate(A, 3, (3, 3))]
    assert kept(found, best_of_k=True) == [("a?", 1)]


def test_both_rules_apply_together():
    """A: best 8 above its mean 6 and at the threshold. B: best 6 above its mean 4.5 but below the threshold."""
    found = [candidate(A, 0, (8, 8)), candidate(A, 1, (4, 4)), candidate(B, 0, (6, 6)), candidate(B, 1, (3, 3))]
    assert kept(found, best_of_k=True, threshold=7) == [("a?", 0)]


def test_replies_without_a_rating_do_not_count_in_the_mean():
    """Rated 5 and 7 (mean 6): the unread one does not pull the mean to 4."""
    unread = candidate(A, 2)
    unread.rating, unread.dropped = Rating(fault="malformed_judge"), "malformed_judge"
    found = [candidate(A, 0, (5, 9)), candidate(A, 1, (7, 9)), unread]
    assert kept(found, best_of_k=True) == [("a?", 1)]
    assert unread.dropped == "malformed_judge"


def test_a_reply_is_kept_once():
    found = [
        candidate(A, 0, (9, 9), text="Yes."),
        candidate(A, 1, (9, 9), text="yes"),
        candidate(B, 0, (9, 9), text="Yes."),
    ]
    assert kept(found, threshold=5) == [("a?", 0), ("b?", 0)]
    assert found[1].dropped == "duplicate"
    again = [candidate(A, 0, (9, 9), text="Yes."), candidate(A, 1, (9, 9), text="No.")]
    assert kept(again, {reply_key(A, "because", "Yes.")}, threshold=5) == [("a?", 1)]


@pytest.mark.parametrize("single", [True, False])
def test_a_kept_reply_is_an_ordinary_row(tmp_path, single):
    import json

    from delib_fast.config import SourceConfig
    from delib_fast.data import read_source

    turns = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "a?"})
    prompt = A if single else UserPrompt(turns, "p.jsonl:1", single=False)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row_of(candidate(prompt, 0, (9, 8)), {"round": 1})) + "\n")
    (row,) = read_source("kept", SourceConfig(path=str(path)))
    expected = [("user", "a?")] if single else [("system", "Be brief."), ("user", "a?")]
    assert [(m.role, m.content) for m in row.messages] == expected
    assert (row.cot, row.response) == ("because", "reply 0")
