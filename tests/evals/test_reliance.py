"""Reliance figures of models whose answer depends on the chain of thought in a known way."""

from __future__ import annotations

import pytest
from eval_models import row_of

from delib_fast.data import Segment
from delib_fast.evals.metrics.cot_edits import corrupted, foreign, sentences, shuffled, truncated
from delib_fast.evals.metrics.reliance import early_answering, reliance

TEN = "one two three four five six seven secret eight nine"  # the key is word 8 of 10


def knows_secret(text, _):
    """nll is 0 if the secret is in the chain of thought, else 2 nats per token."""
    return 0.0 if "secret" in text.split("</think>")[0] else 2.0


def tokens_of(scorer, row):
    return int((scorer.encode([row])[0].segments == Segment.RESPONSE).sum())


def test_early_answering_of_a_model_that_needs_one_word(rule_scorer):
    scorer, row = rule_scorer(knows_secret), row_of(TEN)
    found = early_answering(scorer, [row, row_of(TEN, prompt="And now?")])
    n = tokens_of(scorer, row)
    assert [p.nll.value for p in found.points] == [2.0 * n] * 8 + [0.0] * 3
    assert [p.change.value for p in found.points] == [2.0 * n] * 8 + [0.0] * 3
    assert [p.greedy_match.value for p in found.points] == [0.0] * 8 + [1.0] * 3
    # trapezoids: 2n up to 0.7, then a slope from 0.7 to 0.8
    assert found.area_nats.value == pytest.approx(2 * n * 0.75)
    assert found.area_match.value == pytest.approx(0.75)


def test_a_model_that_ignores_its_cot_has_no_area(rule_scorer):
    found = early_answering(rule_scorer(lambda *_: 0.7), [row_of(TEN), row_of(TEN, prompt="b")])
    assert found.area_nats.value == 0
    assert (found.area_nats.low, found.area_nats.high) == (0, 0)


def test_fractions_must_increase_from_0_to_1(rule_scorer):
    with pytest.raises(ValueError, match="must increase from 0 to 1"):
        early_answering(rule_scorer(knows_secret), [row_of(TEN)], [0.0, 0.5])


def test_reliance_variants(rule_scorer):
    """Only the first row's own CoT and its shuffle contain the secret; all else costs 2 nats per token."""
    plain = "nothing of note stands here at all"
    rows = [row_of(TEN), row_of(plain, prompt="b"), row_of(plain, prompt="c")]
    scorer = rule_scorer(knows_secret)
    n = tokens_of(scorer, rows[0])
    found = {v.variant: v for v in reliance(scorer, rows).variants}
    full = 2 * n * 2 / 3  # 0 for the first row only
    assert found["full"].nll.value == pytest.approx(full)
    assert found["full"].change.value == 0
    assert found["shuffled"].change.value == pytest.approx(0)
    assert found["empty"].change.value == found["filler"].change.value == pytest.approx(2 * n / 3)
    assert found["foreign"].change.value == pytest.approx(
        0
    )  # the secret moves to another row: one row gains, one loses
    assert found["full"].greedy_match.value == pytest.approx(1 / 3)
    assert found["empty"].greedy_match.value == 0


def test_corruption_is_reported_by_kind(rule_scorer):
    scorer = rule_scorer(lambda text, _: 0.0 if "7 apples" in text or "is right" in text else 1.0)
    rows = [row_of("there are 7 apples"), row_of("this is right", prompt="b")]
    found = reliance(scorer, rows, ["corrupted"])
    assert [v.variant for v in found.variants] == ["full", "corrupted"]
    n = tokens_of(scorer, rows[0])
    assert {kind: e.value for kind, e in found.corruption_kinds.items()} == {"number": n, "negation": n}


def test_filler_is_as_long_as_the_cot(rule_scorer, rows):
    found = {v.variant: v for v in reliance(rule_scorer(lambda *_: 1.0), rows, ["filler", "empty"]).variants}
    assert abs(found["filler"].cot_tokens - found["full"].cot_tokens) <= 2
    assert found["empty"].cot_tokens < 6


def test_rows_without_a_cot_are_excluded(rule_scorer):
    found = reliance(rule_scorer(knows_secret), [row_of(TEN), row_of(None, prompt="b")], ["empty"])
    assert found.rows == 1


def test_unknown_variant_is_rejected(rule_scorer):
    with pytest.raises(ValueError, match="'half' is not a variant"):
        reliance(rule_scorer(knows_secret), [row_of(TEN)], ["half"])


# --- the edits ----------------------------------------------------------------------------------------------


def test_truncated():
    assert truncated(TEN, 0) == ""
    assert truncated(TEN, 0.3) == "one two three"
    assert truncated(TEN, 1) == TEN
    assert truncated("a\n\nb  c", 0.67) == "a\n\nb"


def test_sentences_keep_decimals():
    assert sentences("It costs 2.5 coins. Good!\nNext") == ["It costs 2.5 coins.", "Good!", "Next"]


def test_shuffled_is_a_permutation_and_repeatable():
    text = "First. Second. Third. Fourth."
    assert sorted(sentences(shuffled(text, "a"))) == sorted(sentences(text))
    assert shuffled(text, "a") == shuffled(text, "a") != text
    assert sorted(shuffled("one two three", "a").split()) == ["one", "three", "two"]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("It takes 16 - 3 eggs", "number"),
        ("That is fine.", "negation"),
        ("He is not here.", "negation"),
        ("Fine by me.", "sentence"),
    ],
)
def test_corrupted_makes_one_mistake(text, kind):
    for seed in "abcdefgh":
        found = corrupted(text, seed)
        assert found.kind == kind
        assert found.text != text
    if kind == "number":
        assert sum(a != b for a, b in zip(found.text.split(), text.split(), strict=True)) == 1


def test_foreign_uses_each_cot_once():
    assert [foreign(["a", "b", "c"], i) for i in range(3)] == ["b", "c", "a"]
    with pytest.raises(ValueError, match="at least 2"):
        foreign(["a"], 0)
