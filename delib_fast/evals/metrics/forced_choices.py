"""How a model chooses between two given replies, teacher-forced: nothing is sampled and nothing judged.

    margin(item) = log p(a | prompt[, cot]) − log p(b | prompt[, cot])

Where an item gives several chains of thought, the model thinks each as often as it finds it likely among them:

    p(a) = Σ_c p(c | prompt) · p(a | prompt, c) / (p(a | prompt, c) + p(b | prompt, c)),  margin = log p(a) / (1 − p(a))

Items are objects of a .jsonl file: `prompt` (or `messages`), `a`, `b`; optionally `cot`, the chain of thought that both
replies stand behind, or `cots`, several that the model may have; and `situation`: items of one situation (its two
things named the other way round, say) are drawn together by the bootstrap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from delib_fast.config import ConfigError
from delib_fast.data import Message, Row, Segment
from delib_fast.data.read.jsonl import HashingFile, read_items
from delib_fast.evals.intervals import Estimate, bootstrap, share_by_group
from delib_fast.evals.scoring import Scorer


@dataclass(frozen=True, slots=True)
class Item:
    """A prompt with two replies."""

    location: str
    situation: str
    messages: tuple[Message, ...]
    cots: tuple[str, ...]
    """those that the replies may stand behind"""
    a: str
    b: str


@dataclass(frozen=True, slots=True)
class ChoiceFigures:
    """Over all items, with intervals by situation."""

    share: Estimate
    """of items in which `a` is the likelier reply"""
    probability: Estimate
    """mean of p(a) / (p(a) + p(b))"""
    margin: Estimate
    """mean of log p(a) − log p(b), nats a reply"""
    first_cot: Estimate | None
    """mean probability of the first of `cots` among them; None where nothing was thought"""
    margins: tuple[float, ...]
    """of each item"""


def read_choices(path: str | Path) -> list[Item]:
    """The items of a .jsonl or .json file. Raises ConfigError with the place of a faulty one."""
    path = Path(path)
    try:
        file = HashingFile(path)
    except OSError as error:
        raise ConfigError(f"{path}: choices can't be read: {error.strerror}") from None
    try:
        items = [_item(found.value, f"{path}:{found.line}") for found in read_items(file, path)]
    finally:
        file.close()
    if not items:
        raise ConfigError(f"{path}: holds no choices")
    return items


def choose(scorer: Scorer, items: Sequence[Item], *, think: bool) -> ChoiceFigures:
    """Score both replies of every item.

    Args:
        think: put the item's chain of thought (or each of several) before both replies; an item without one is then
            an error.
    What it can't show: how often the model would say either; both may be unlikely. Replies should differ in nothing
    but the choice, and items come with the two sides exchanged, or the wording is in the margin too.
    """
    texts = [(item, cot) for item in items for cot in (_cots(item) if think else (None,))]
    rows = [_row(item, reply, cot) for item, cot in texts for reply in (item.a, item.b)]
    losses = scorer.losses(scorer.encode(rows), (Segment.COT, Segment.RESPONSE))
    reply = -np.array([loss.total(Segment.RESPONSE) for loss in losses]).reshape(-1, 2)
    thought = -np.array([loss.total(Segment.COT) for loss in losses]).reshape(-1, 2)[:, 0]
    margins, first = [], []
    ends = np.cumsum([len(item.cots) if think else 1 for item in items])
    for at in np.split(np.arange(len(texts)), ends[:-1]):
        weights = thought[at] - np.logaddexp.reduce(thought[at])
        a, b = (weights + reply[at, side] - np.logaddexp(reply[at, 0], reply[at, 1]) for side in (0, 1))
        margins.append(float(np.logaddexp.reduce(a) - np.logaddexp.reduce(b)))
        first.append(float(np.exp(weights[0])))
    return _figures(np.array(margins), np.array(first) if think else None, [item.situation for item in items])


def _figures(
    margins: NDArray[np.float64], first: NDArray[np.float64] | None, situations: Sequence[str]
) -> ChoiceFigures:
    probabilities = 1 / (1 + np.exp(-np.clip(margins, -700, 700)))

    def mean_of(values: NDArray[np.float64]) -> Estimate:
        return bootstrap(lambda i: float(values[i].mean()), situations, resamples=400)

    return ChoiceFigures(
        share_by_group(margins > 0, situations),
        mean_of(probabilities),
        mean_of(margins),
        None if first is None else mean_of(first),
        tuple(margins.tolist()),
    )


def _cots(item: Item) -> tuple[str, ...]:
    if not item.cots:
        raise ConfigError(f"{item.location}: has no cot for the replies to stand behind; give one, or set cot: never")
    return item.cots


def _row(item: Item, reply: str, cot: str | None) -> Row:
    return Row(
        kind="chat",
        location=item.location,
        source="choices",
        digest=item.location,
        messages=item.messages,
        cot=cot,
        response=reply.strip(),
    )


def _item(value: Any, location: str) -> Item:
    if not isinstance(value, dict):
        raise ConfigError(f"{location}: a choice is an object with prompt, a and b")
    for key in ("a", "b"):
        if not isinstance(value.get(key), str) or not value[key].strip():
            raise ConfigError(f"{location}: a choice needs {key!r}, a reply, as text")
    if value["a"].strip() == value["b"].strip():
        raise ConfigError(f"{location}: a and b are the same reply")
    turns = value.get("messages", value.get("prompt"))
    messages: tuple[Message, ...]
    if isinstance(turns, str):
        messages = (Message("user", turns),)
    elif (
        isinstance(turns, list)
        and turns
        and all(
            isinstance(t, dict) and isinstance(t.get("content"), str) and isinstance(t.get("role"), str) for t in turns
        )
    ):
        messages = tuple(Message(t["role"], t["content"]) for t in turns)
    else:
        raise ConfigError(f"{location}: a choice needs a prompt as text, or messages with role and content")
    cots = value.get("cots", [value["cot"]] if value.get("cot") else [])
    if not isinstance(cots, list) or not all(isinstance(cot, str) and cot.strip() for cot in cots):
        raise ConfigError(f"{location}: cots is a list of chains of thought, each a text")
    return Item(location, str(value.get("situation", location)), messages, tuple(cots), value["a"], value["b"])
