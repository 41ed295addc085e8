"""How a model chooses between two given replies, teacher-forced: without sampling and without a judge.

    margin(item) = log p(a | prompt[, cot]) − log p(b | prompt[, cot])

If an item has several chains of thought, they are weighted by their probability under the model:

    p(a) = Σ_c p(c | prompt) · p(a | prompt, c) / (p(a | prompt, c) + p(b | prompt, c)),  margin = log p(a) / (1 − p(a))

Items are objects of a .jsonl file: `prompt` (or `messages`), `a`, `b`; optionally `cot`, the chain of thought that
precedes both replies, or `cots`, several alternatives; and `situation`. Items of one situation (for example with the
two options swapped) are resampled together by the bootstrap.
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
    """The chains of thought that may precede the replies."""
    a: str
    b: str


@dataclass(frozen=True, slots=True)
class ChoiceFigures:
    """Figures over all items, with intervals by situation."""

    share: Estimate
    """Share of items in which `a` is the more likely reply."""
    probability: Estimate
    """Mean of p(a) / (p(a) + p(b))."""
    margin: Estimate
    """Mean of log p(a) − log p(b), nats per reply."""
    first_cot: Estimate | None
    """Mean probability of the first of `cots`, relative to all of them; None without chains of thought."""
    margins: tuple[float, ...]
    """The margin of each item."""


def read_choices(path: str | Path) -> list[Item]:
    """Read the items of a .jsonl or .json file. Raises ConfigError with the location of an invalid one."""
    path = Path(path)
    try:
        file = HashingFile(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        items = [_item(found.value, f"{path}:{found.line}") for found in read_items(file, path)]
    finally:
        file.close()
    if not items:
        raise ConfigError(f"{path}: has no items")
    return items


def choose(scorer: Scorer, items: Sequence[Item], *, think: bool) -> ChoiceFigures:
    """Score both replies of every item.

    Args:
        think: put the item's chain of thought, or each of several, before both replies. Every item then needs one.
    Limitations: how often the model would give either reply; both may be unlikely. The replies should differ
    only in the choice, and each item should also be present with the two options swapped; otherwise the wording
    affects the margin.
    Raises:
        ConfigError: `think` is true and an item has no chain of thought.
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
        raise ConfigError(f"{item.location}: the item has no cot to put before the replies; add one, or set cot: never")
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
        raise ConfigError(f"{location}: an item is an object with prompt, a and b")
    for key in ("a", "b"):
        if not isinstance(value.get(key), str) or not value[key].strip():
            raise ConfigError(f"{location}: an item needs {key!r}, a reply, as text")
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
        raise ConfigError(f"{location}: an item needs a prompt as text, or messages with role and content")
    cots = value.get("cots", [value["cot"]] if value.get("cot") else [])
    if not isinstance(cots, list) or not all(isinstance(cot, str) and cot.strip() for cot in cots):
        raise ConfigError(f"{location}: cots must be a list of non-empty texts")
    return Item(location, str(value.get("situation", location)), messages, tuple(cots), value["a"], value["b"])
