"""Multiple-choice questions and numeric answers from GSM8K rows, and how answers are parsed."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from delib_fast.data import Row

LETTERS = "ABCDEFGH"
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_STATED = re.compile(r"(?:answer|choice|option)\s*(?:(?:is|:|=)\s*)?\**\(?([A-H])\)?\b(?!\w)", re.IGNORECASE)
_MAX_DIGITS = 24  # Decimal computes with 28 digits
_BRACKETED = re.compile(r"\(([A-H])\)")
_ALONE = re.compile(r"^[^\w\n]*([A-H])[^\w\n]*$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Choice:
    """One question with lettered options."""

    question: str
    options: tuple[str, ...]
    correct: int
    key: str
    """Identifies the question, and seeds its random draws."""

    def prompt(self, before: str = "") -> str:
        """The question as a user message. `before`, such as a hint, is prepended."""
        listed = "\n".join(f"({LETTERS[k]}) {option}" for k, option in enumerate(self.options))
        ask = "Which is right? End with the line: Answer: (letter)"
        return f"{before}\n\n{self.question}\n\n{listed}\n\n{ask}".strip()


def choices_from_gsm8k(rows: Sequence[Row], options: int = 4) -> list[Choice]:
    """Make a multiple-choice question from each row whose result is a number.

    The wrong options are numbers from the row's own steps (results of an unfinished calculation), then numbers near
    the result. Their order is drawn with the row's digest as the seed.
    """
    if not 3 <= options <= len(LETTERS):
        raise ValueError(f"options is {options}; a question has 3 to {len(LETTERS)}")
    choices = []
    for row in rows:
        result = result_of(row.response)
        if result is None:
            continue
        generator = random.Random(row.digest)
        wrong = _wrong_numbers(row, result, options - 1, generator)
        listed = [result, *wrong]
        generator.shuffle(listed)
        question = next(m.content for m in reversed(row.messages) if m.role == "user")
        choices.append(Choice(question, tuple(map(_format, listed)), listed.index(result), row.digest))
    return choices


def result_of(text: str) -> Decimal | None:
    """The result of an answer: the number after "####", "A:", "Answer:" or "answer is" if there is one, else the last
    number. None if there is no number."""
    for marker in ("####", "\nA:", "Answer:", "answer is"):
        if marker in text and (found := _NUMBER.search(text.rpartition(marker)[2])):
            return _decimal(found[0])
    numbers = _NUMBER.findall(text)
    return _decimal(numbers[-1]) if numbers else None


def chosen_option(response: str, options: int) -> int | None:
    """The option that a reply chooses: the last one stated as the answer, else the last letter in parentheses, else a
    letter on a line of its own. None if there is none."""
    for pattern in (_STATED, _BRACKETED, _ALONE):
        if letters := [m.upper() for m in pattern.findall(response)]:
            index = LETTERS.index(letters[-1])
            return index if index < options else None
    return None


def _wrong_numbers(row: Row, result: Decimal, count: int, generator: random.Random) -> list[Decimal]:
    steps = [_decimal(n) for n in _NUMBER.findall(row.cot or "")]
    near = [result + 1, result - 1, result * 2, result + 10, result / 2, result - 10, result * 10]
    generator.shuffle(steps)
    wrong: list[Decimal] = []
    for number in (*steps, *near, *(result + k for k in range(2, 20))):
        if number is not None and number != result and number not in wrong and number >= 0:
            wrong.append(number)
        if len(wrong) == count:
            break
    return wrong


def _decimal(text: str) -> Decimal | None:
    """The number of a text; None if it has more digits than the arithmetic is exact for."""
    digits = text.replace(",", "")
    return Decimal(digits) if len(digits) <= _MAX_DIGITS else None


def _format(number: Decimal) -> str:
    return f"{number:f}".rstrip("0").rstrip(".") if number != number.to_integral_value() else f"{int(number)}"
