"""Parse answers: JSON among prose and code fences, or a CoT and a response between tags."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from delib_fast.data.read.cot_tags import split_cot
from delib_fast.data.rows import DataError
from delib_fast.datagen.answers import Answer, clean_text
from delib_fast.datagen.settings import AXES, Axis

COT_TAG, RESPONSE_TAG = "deliberation", "reply"
_THINKING_END = "</think>"
_NUMBER = re.compile(r"\d{1,9}(?:\.\d{1,9})?")
_RESCANNED = 8  # how often `json_values` may read a character again after values that are not valid JSON
_decoder = json.JSONDecoder()


class MalformedAnswer(ValueError):  # noqa: N818 (named after the answer)
    """The model's answer is not in the requested form."""


def strip_thinking(text: str) -> str:
    """Remove everything up to the first </think>, if there is one: the chat template may have opened the block."""
    before, closing, after = text.partition(_THINKING_END)
    return after if closing else before


def json_values(text: str, kind: type[dict[str, Any]] | type[list[Any]]) -> list[Any]:
    """Return every outermost JSON object (or list) of a text. Prose, code fences and a <think> block are skipped.

    The cost is linear in the text. After a value that is not valid JSON, the search continues inside it, which reads
    its characters again: on average at most 8 times, then it continues where the value stopped being valid. Values
    after one that is nested too deeply for Python are not found.
    """
    text = strip_thinking(text)
    opening = "{" if kind is dict else "["
    values = []
    budget = _RESCANNED * len(text)
    start = text.find(opening)
    while start >= 0:
        try:
            value, end = _decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            budget -= max(error.pos, _string_end(text, error)) - start
            end = start + 1 if budget > 0 else max(error.pos, start + 1)
        except RecursionError:
            break
        except ValueError:  # an integer with more digits than Python reads
            end = start + 1
        else:
            if isinstance(value, kind):
                values.append(value)
        start = text.find(opening, end)
    return values


def _string_end(text: str, error: json.JSONDecodeError) -> int:
    """Where the decoder stopped reading: the position of an unterminated string is that of its beginning."""
    return len(text) if error.msg.startswith("Unterminated string") else error.pos


def parse_scores(text: str, axes: Sequence[Axis] = AXES) -> tuple[dict[Axis, float], str]:
    """Parse a judgement into (score from 1 to 10 on each axis, the judge's reason), without guessing.

    Args:
        axes: the axes that the judge was asked to rate. Others are ignored.
    Raises:
        MalformedAnswer: no object has every axis, a value is not a number on the scale, or several objects disagree.
    """
    found: list[tuple[dict[Axis, float], str]] = []
    fault = "it contains no JSON object with " + ", ".join(axes)
    for value in json_values(text, dict):
        if not any(axis in value for axis in axes):
            continue
        try:
            why = value.get("why")
            found.append(({axis: _score(value, axis) for axis in axes}, why if isinstance(why, str) else ""))
        except MalformedAnswer as error:
            fault = str(error)
    if not found:
        raise MalformedAnswer(fault)
    if any(scores != found[0][0] for scores, _ in found):
        raise MalformedAnswer("it contains several judgements that disagree")
    return found[-1]


def _score(value: Mapping[str, Any], axis: Axis) -> float:
    score = value.get(axis)
    if isinstance(score, str) and _NUMBER.fullmatch(score.strip()):
        score = float(score)
    if isinstance(score, bool) or not isinstance(score, int | float) or score != score:
        raise MalformedAnswer(f"{axis} is not a number" if axis in value else f"{axis} is missing")
    if not 1 <= score <= 10:
        shown = f"{score:g}" if abs(score) < 1e9 else "too large"  # an int may be too large for a float
        raise MalformedAnswer(f"{axis} is {shown}, outside 1 to 10")
    return float(score)


def parse_strings(text: str, *, min_items: int = 1) -> list[str]:
    """Return the first JSON list of at least `min_items` strings in a text, without blank or repeated strings.

    Raises:
        MalformedAnswer: there is no such list.
    """
    for value in json_values(text, list):
        if value and all(isinstance(item, str) for item in value):
            # JSON inside of an answer has its own escapes, of NUL and of half surrogate pairs.
            items = list(dict.fromkeys(" ".join(clean_text(item).split()) for item in value if item.strip()))
            if len(items) >= min_items:
                return items
    raise MalformedAnswer(f"it contains no JSON list of at least {min_items} strings")


@dataclass(frozen=True)
class Deliberation:
    """A generated answer, split into its parts; a part that is missing is None."""

    cot: str | None
    response: str | None
    fault: str | None = None
    """Why the answer cannot be split: `truncated` or `leaked_scaffolding`."""


def split_answer(answer: Answer, cot_from: Literal["tags", "reasoning"]) -> Deliberation:
    """Split an answer into CoT and response: at our tags, or into the model's own reasoning and its text."""
    if cot_from == "tags":
        return _split_at_tags(answer)
    if answer.reasoning is not None:
        return Deliberation(answer.reasoning.strip(), answer.text.strip())
    try:
        cot, response = split_cot(answer.text)
    except DataError:
        unclosed = "<think" in answer.text and "</think" not in answer.text
        return Deliberation(None, None, "truncated" if unclosed else "leaked_scaffolding")
    return Deliberation(cot, response.strip())


def _split_at_tags(answer: Answer) -> Deliberation:
    # The model's own thinking before the tags is about our instructions and the spec, so it must not be in the row.
    # A closing tag inside of the CoT or the response is not its end.
    stripped = strip_thinking(answer.text)
    text = stripped if f"<{COT_TAG}>" in stripped else answer.text
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
