"""CoT necessity: how much does accuracy improve with a chain of thought?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from delib_fast.data import Message, Row
from delib_fast.evals.intervals import Estimate, bootstrap, newcombe, share_by_group, wilson
from delib_fast.evals.metrics.choices import result_of
from delib_fast.evals.sampling import ChatModel

QuestionKind = Literal["cot_necessary", "one_shot", "too_hard"]
ASK = "End with a line of the form: #### number"


@dataclass(frozen=True, slots=True)
class Necessity:
    with_cot: Estimate
    without_cot: Estimate
    uplift: Estimate
    """with − without: Newcombe for one sample per question, else bootstrap by question (paired)."""
    cells: dict[QuestionKind, Estimate]
    """Share of questions with uplift ≥ 0.5, solved without a CoT, and neither, Wilson."""
    questions: int
    samples: int


def cot_necessity(model: ChatModel, rows: Sequence[Row], samples: int = 1) -> Necessity:
    """Accuracy on questions with a numeric answer, with the think block open and with it closed empty.

    Args:
        rows: GSM8K-like questions; those without a result are excluded.
        samples: samples per question. At temperature 0 they are all the same.
    Limitations: that the chain of thought is *why* an answer is right (see `reliance`). A model that was never
    trained to answer directly may fail for that reason alone.
    """
    asked = [(row, result) for row in rows if (result := result_of(row.response)) is not None]
    chats = [[*row.messages[:-1], Message("user", f"{row.messages[-1].content}\n\n{ASK}")] for row, _ in asked]
    right = np.zeros((2, len(asked), samples), bool)
    for k, thinking in enumerate((True, False)):
        for sample in range(samples):
            replies = model(chats, thinking=thinking, sample=sample)
            right[k, :, sample] = [is_right(r.response, result) for r, (_, result) in zip(replies, asked, strict=True)]
    return necessity_figures(right[0], right[1])


def is_right(response: str, result: Decimal) -> bool:
    return result_of(response) == result


def necessity_figures(with_cot: NDArray[np.bool_], without_cot: NDArray[np.bool_]) -> Necessity:
    """Figures from whether each (question, sample) is right, with and without a chain of thought."""
    questions, samples = with_cot.shape
    rates = with_cot.mean(1) if questions else np.zeros(0), without_cot.mean(1) if questions else np.zeros(0)
    if samples == 1:
        hits = int(with_cot.sum()), int(without_cot.sum())
        parts = wilson(hits[0], questions), wilson(hits[1], questions)
        uplift = newcombe(hits[0], questions, hits[1], questions)
    else:
        groups = list(range(questions))
        each = [q for q in groups for _ in range(samples)]
        parts = share_by_group(with_cot.ravel(), each), share_by_group(without_cot.ravel(), each)
        uplift = bootstrap(lambda i: float((rates[0] - rates[1])[i].mean()), groups)
    counts = Counter(_kind(a, b) for a, b in zip(*rates, strict=True))
    names: tuple[QuestionKind, ...] = ("cot_necessary", "one_shot", "too_hard")
    return Necessity(
        parts[0], parts[1], uplift, {name: wilson(counts[name], questions) for name in names}, questions, samples
    )


def _kind(with_cot: float, without_cot: float) -> QuestionKind:
    if with_cot - without_cot >= 0.5:
        return "cot_necessary"
    return "one_shot" if without_cot >= 0.5 else "too_hard"
