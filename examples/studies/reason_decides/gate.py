"""Ask the model before training what it knows about every pair, and write gate.csv.

    python examples/studies/reason_decides/gate.py --model MODEL_FOLDER

The gate asks about one thing at a time, in both orders of the two words, and compares the two things of a pair:

    s(x) = log p("{x} is cheap" | question) − log p("{x} is expensive" | question)
    knows(pair) = s(a) − s(b), in each of the two orders of the question

The words that are compared are the same for both things, so that a model which merely finds "paperback" a likelier
word than "first edition" gains nothing by it. A pair is kept if both differences are above MARGIN; of more than LIMIT
pairs of a file, those with the largest smaller difference are kept. The file also has, for comparison, the margins of
the plain question ("Which costs less, {x} or {y}?") and of its opposite.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

import corpus

from delib_fast.data import Message, Row, Segment
from delib_fast.evals.scoring import Scorer
from delib_fast.evals.settings import load_eval_config
from delib_fast.evals.target import EvalTarget

MARGIN = 0.1
"""Nats by which each of the two differences must exceed 0."""
LIMIT = 30
"""Pairs per distance and axis."""
SYSTEM = "You are a helpful assistant."
ASKED = {  # one thing: the questions in both orders of the words; the reply that fits a, and the one that fits b
    "price": (
        ("Is {x} cheap or expensive?", "Is {x} expensive or cheap?"),
        ("{X} is cheap.", "{X} is expensive."),
    ),
    "origin": (
        ("Is {x} foreign or American?", "Is {x} American or foreign?"),
        ("{X} is foreign.", "{X} is American."),
    ),
}
COMPARED = {  # both things: the question whose answer is a, and the one whose answer is b
    "price": ("Which usually costs less, {x} or {y}?", "Which usually costs more, {x} or {y}?"),
    "origin": ("Which one is foreign, {x} or {y}?", "Which one is American, {x} or {y}?"),
}
MEASURED = ("first_order", "second_order", "a_question_ab", "a_question_ba", "b_question_ab", "b_question_ba")
COLUMNS = ("distance", "axis", "a", "b", *MEASURED, "kept")


def margins(scorer: Scorer, asked: Sequence[tuple[str, str, str]]) -> list[float]:
    """log p(a) − log p(b) for each question, reply a and reply b."""
    rows = [
        Row(
            kind="chat",
            location=f"question {n}",
            source="gate",
            digest=f"{n} {reply}",
            messages=(Message("system", SYSTEM), Message("user", question)),
            cot=None,
            response=reply,
        )
        for n, (question, *replies) in enumerate(asked)
        for reply in replies
    ]
    losses = scorer.losses(scorer.encode(rows), (Segment.RESPONSE,))
    totals = [loss.total(Segment.RESPONSE) for loss in losses]
    return [b - a for a, b in zip(totals[::2], totals[1::2], strict=True)]


def knowledge(scorer: Scorer, axis: str, pairs: Sequence[corpus.Pair]) -> list[list[float]]:
    """For each pair s(a) − s(b), in both orders of the question."""
    questions, replies = ASKED[axis]
    things = [thing for pair in pairs for thing in pair]
    columns = []
    for question in questions:
        s = margins(scorer, [tuple(corpus.fill(text, x=x) for text in (question, *replies)) for x in things])  # type: ignore[misc]
        columns.append([s[i] - s[i + 1] for i in range(0, len(s), 2)])
    return [list(row) for row in zip(*columns, strict=True)]


def comparisons(scorer: Scorer, axis: str, pairs: Sequence[corpus.Pair]) -> list[list[float]]:
    """For each pair the margin of a over b under both questions, each in both orders."""
    columns = []
    for question in COMPARED[axis]:
        for first in (0, 1):
            asked = [
                (
                    corpus.fill(question, x=pair[first], y=pair[1 - first]),
                    *(f"{corpus.capitalize(x)}." for x in pair),
                )
                for pair in pairs
            ]
            columns.append(margins(scorer, asked))
    return [list(row) for row in zip(*columns, strict=True)]


def rows(scorer: Scorer) -> Iterator[dict[str, str]]:
    """The rows of gate.csv."""
    for distance in corpus.DISTANCES:
        for axis in corpus.AXES:
            pairs = corpus.read_pairs(f"{distance}_{axis}")
            known = knowledge(scorer, axis, pairs)
            passed = sorted((n for n in range(len(pairs)) if min(known[n]) > MARGIN), key=lambda n: -min(known[n]))
            for n, compared in enumerate(comparisons(scorer, axis, pairs)):
                measured = (f"{value:.3f}" for value in (*known[n], *compared))
                kept = "yes" if n in passed[:LIMIT] else "no"
                yield dict(zip(COLUMNS, (distance, axis, *pairs[n], *measured, kept), strict=True))


def summary(rows: Sequence[dict[str, str]]) -> str:
    """A Markdown table: of the pairs of each file, the share of which each condition holds."""
    lines = [
        "| pairs | candidates | known in both orders | opposite in both | kept | as far opposite | plain question | "
        "and its opposite |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for distance in corpus.DISTANCES:
        for axis in corpus.AXES:
            here = [row for row in rows if (row["distance"], row["axis"]) == (distance, axis)]
            values = [[float(row[key]) for key in MEASURED] for row in here]
            least = min(min(v[:2]) for v, row in zip(values, here, strict=True) if row["kept"] == "yes")
            shares = [
                sum(min(v[:2]) > MARGIN for v in values),
                sum(max(v[:2]) < -MARGIN for v in values),
                sum(row["kept"] == "yes" for row in here),
                sum(max(v[:2]) <= -least for v in values),
                sum(min(v[2:4]) > 0 for v in values),
                sum(min(v[2:4]) > 0 > max(v[4:6]) for v in values),
            ]
            cells = [f"{share} ({share / len(here):.0%})" for share in shares]
            lines.append(f"| {distance}, {axis} | {len(here)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write gate.csv: what a model knows about every pair.")
    parser.add_argument("--model", type=Path, required=True, help="folder of the model before training")
    parser.add_argument("--out", type=Path, default=corpus.HERE / "gate.csv", help="the file to write")
    args = parser.parse_args()
    scorer = EvalTarget(args.model, load_eval_config(None, device="cpu", precision="bf16")).scorer
    found = list(rows(scorer))
    with args.out.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(found)
    print(summary(found))


if __name__ == "__main__":
    main()
