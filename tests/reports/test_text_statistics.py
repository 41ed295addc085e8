"""Statistics of the texts of a corpus: distinct n-grams, recurring names and phrases."""

from __future__ import annotations

from delib_fast.reports.text_statistics import distinct_ngrams, recurring


def test_distinct_ngrams():
    texts = ["the red fox", "The red dog!"]
    assert [distinct_ngrams(texts, n) for n in (1, 2, 3, 4)] == [round(4 / 6, 4), 0.75, 1.0, None]


def test_recurring_names_and_phrases():
    texts = [
        "Today Mira Lund visits Port Alba. She takes the cheese that is on sale.",
        "Then Mira Lund sleeps. A man takes the cheese that is on the shelf, says OpenAI.",
        "Bread is good, says Mira Lund. “The Bread.” The",
        "Bread is good.",
    ]
    found = recurring(texts)
    assert found["names"] == [("Mira Lund", 0.75)], "'Bread' and 'She' only begin sentences"
    assert found["phrases"] == [
        ("takes the cheese that is", 0.5),
        ("the cheese that is on", 0.5),
    ]
    assert recurring([]) == {"names": [], "phrases": []}
