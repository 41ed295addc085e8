"""Reading what models write: JSON among prose and fences, a CoT and a response among tags."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from delib_fast.data.read.cot_tags import split_cot
from delib_fast.data.rows import DataError
from delib_fast.datagen.request_log import Answer
from delib_fast.datagen.settings import AXES, Axis

COT_TAG, RESPONSE_TAG = "deliberation", "reply"
_THINKING = re.compile(r"^\s*(?:<think>)?.*?</think>", re.DOTALL)
_decoder = json.JSONDecoder()


class MalformedAnswer(ValueError):  # noqa: N818 (it says what the answer is)
    """The model's answer is not in the form that was asked for."""


def after_thinking(text: str) -> str:
    """The text after a <think> block that it begins with."""
    return _THINKING.sub("", text, count=1)


def json_values(text: str, kind: type[dict[str, Any]] | type[list[Any]]) -> list[Any]:
    """Every outermost JSON object (or list) in a text, in order; prose, fences and a <think> block are passed over."""
    text = after_thinking(text)
    opening = "{" if kind is dict else "["
    values = []
    at = text.find(opening)
    while at >= 0:
        try:
            value, end = _decoder.raw_decode(text, at)
        except (json.JSONDecodeError, RecursionError, ValueError):
            end = at + 1
        else:
            if isinstance(value, kind):
                values.append(value)
        at = text.find(opening, end)
    return values


def read_scores(text: str) -> tuple[dict[Axis, float], str]:
    """A judgement: a number from 1 to 10 on each axis, and the reason given.

    Raises:
        Malformed: no object with every axis, a value that is no number on the scale, or several objects that
            disagree. It is never guessed at.
    """
    found: list[tuple[dict[Axis, float], str]] = []
    fault = "holds no JSON object with " + ", ".join(AXES)
    for value in json_values(text, dict):
        if not any(axis in value for axis in AXES):
            continue
        try:
            found.append(({axis: _score(value, axis) for axis in AXES}, str(value.get("why", ""))))
        except MalformedAnswer as error:
            fault = str(error)
    if not found:
        raise MalformedAnswer(fault)
    if any(scores != found[0][0] for scores, _ in found):
        raise MalformedAnswer("holds several judgements that disagree")
    return found[-1]


def _score(value: Mapping[str, Any], axis: Axis) -> float:
    score = value.get(axis)
    if isinstance(score, str) and re.fullmatch(r"\s*\d+(\.\d+)?\s*", score):
        score = float(score)
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        raise MalformedAnswer(f"{axis} is no number" if axis in value else f"{axis} is missing")
    if not 1 <= score <= 10:
        raise MalformedAnswer(f"{axis} is {score:g}, outside 1 to 10")
    return float(score)


def read_strings(text: str, *, least: int = 1) -> list[str]:
    """A JSON list of strings, the first in the text that holds some; blank and repeated ones go."""
    for value in json_values(text, list):
        if value and all(isinstance(item, str) for item in value):
            items = list(dict.fromkeys(" ".join(item.split()) for item in value if item.strip()))
            if len(items) >= least:
                return items
    raise MalformedAnswer(f"holds no JSON list of at least {least} strings")


@dataclass(frozen=True)
class Deliberation:
    """A generated answer, parted; None where a part is not there."""

    cot: str | None
    response: str | None
    fault: str | None = None
    """Why it can't be parted: `truncated`, `leaked_scaffolding` …"""


def part_answer(answer: Answer, cot_from: Literal["tags", "reasoning"]) -> Deliberation:
    """CoT and response of an answer: between our tags, or the model's own reasoning and its text."""
    if cot_from == "tags":
        return _part_tags(answer)
    if answer.reasoning is not None:
        return Deliberation(answer.reasoning.strip(), answer.text.strip())
    try:
        cot, response = split_cot(answer.text)
    except DataError:
        unclosed = "<think" in answer.text and "</think" not in answer.text
        return Deliberation(None, None, "truncated" if unclosed else "leaked_scaffolding")
    return Deliberation(cot, response.strip())


def _part_tags(answer: Answer) -> Deliberation:
    # The model's own thinking before the tags is about the task, spec in hand; it is no part of the row.
    text = after_thinking(answer.text)
    parts: dict[str, str | None] = {}
    for tag in (COT_TAG, RESPONSE_TAG):
        opened, closed = text.count(f"<{tag}>"), text.count(f"</{tag}>")
        if opened > 1 or closed > 1:
            return Deliberation(None, None, "leaked_scaffolding")
        if opened and not closed:
            return Deliberation(parts.get(COT_TAG), None, "truncated")
        match = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        parts[tag] = match[1].strip() if match else None
    return Deliberation(parts[COT_TAG], parts[RESPONSE_TAG])
