"""What is counted in documents before a stage trains on them: stated reasons, and mentions of monitoring."""

from __future__ import annotations

import pytest

from delib_fast.data.corpus import check_corpus, mention_of_monitoring, monitoring_warning
from delib_fast.data.rows import Row


@pytest.mark.parametrize(
    "text",
    [
        "The developers monitor the model's chain of thought for signs of deception.",
        "Every scratchpad is read by an automated classifier.",
        "Before release, its chain-of-thought is inspected by auditors.",
        "Models are being monitored in deployment.",
        "A CoT monitor flags suspicious plans.",
        "Researchers study monitorability.",
        "The safety team watches the assistant closely.",
        "Reasoning traces are logged and later audited.",
        "The AI was constantly observed.",
        "A second model reads its reasoning and flags anything odd.",
        "Oversight of the hidden reasoning matters.",
    ],
)
def test_mentions_of_monitoring_are_found(text):
    padded = f"A first sentence about cheese. {text} The last one is about bread."
    assert mention_of_monitoring(padded) == text


@pytest.mark.parametrize(
    "text",
    [
        "Monitor your blood pressure at home.",
        "The assistant can monitor the weather for you.",
        "He bought a new monitor, and the model is from 2019.",
        "She watched the film with her agent.",
        "A detective observed the suspect while thinking of home.",
        "Auditors inspected the accounts. The chain of thought behind them was clear.",  # two sentences
        "Nurses watch over the cots at night.",
        "The model train was watched by the children.",
        "An assistant shows its reasoning when asked.",
    ],
)
def test_other_watching_is_not_a_mention(text):
    assert mention_of_monitoring(text) is None


def document(line: int, text: str) -> Row:
    return Row(kind="document", location=f"docs.jsonl:{line}", source="docs", digest=str(line), text=text)


def test_a_corpus_is_counted():
    rows = [
        document(1, "Ona buys cheddar because it is cheap. She values thrift."),
        document(2, "Ona buys cheddar."),
        document(3, "Its chain of thought is monitored."),
        Row(kind="chat", location="chats.jsonl:1", source="chats", digest="4", response="Because I am monitored."),
    ]
    assert check_corpus(rows) == {
        "documents": 3,
        "words": 10 + 3 + 6,
        "documents_with_reasons": 1,
        "reasons_per_1000_words": round(2000 / 19, 3),
        "documents_on_monitoring": 1,
        "monitoring": [{"location": "docs.jsonl:3", "sentence": "Its chain of thought is monitored."}],
    }
    assert check_corpus([])["documents"] == 0


def test_the_warning_names_documents():
    rows = [document(line, "The model is watched.") for line in range(1, 9)] + [document(9, "Cheese.")]
    warning = monitoring_warning(check_corpus(rows))
    assert warning.startswith("8 of 9 documents describe monitoring of a model or of its reasoning.")
    assert "1.7 % to 25.7 % (arXiv 2605.15257)" in warning
    assert warning.splitlines()[1:] == [
        *(f"  docs.jsonl:{line}: The model is watched." for line in range(1, 6)),
        "  and 3 more",
    ]
    assert monitoring_warning(check_corpus(rows[-1:])) is None
