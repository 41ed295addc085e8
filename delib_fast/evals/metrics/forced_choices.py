"""How a model chooses between two given replies, teacher-forced: without sampling and without a judge.

    margin(item) = log p(a | prompt[, cot]) − log p(b | prompt[, cot])

If an item has several chains of thought, they are weighted by their probability under the model:

    p(a) = Σ_c p(c | prompt) · p(a | prompt, c) / (p(a | prompt, c) + p(b | prompt, c)),  margin = log p(a) / (1 − p(a))

Items are objects of a .jsonl file: `prompt` (or `messages`), `a`, `b`; optionally `cot`, the chain of thought that
precedes both replies, or `cots`, several alternatives; and `situation`. Items of one situation are resampled together
by the bootstrap.

A model also has habits: it prefers the option that is named first, or a letter. Therefore each item needs a second one
with the two options swapped in the prompt, and the margins m and m' of the two items are split:

    content = (m + m') / 2        habit = (m − m') / 2

The content is what remains of the choice when the order is averaged out. If the mean |habit| of all pairs exceeds the
mean |content|, the order decides more than the options do, and the figures are void.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from delib_fast.config import ConfigError
from delib_fast.data import Message, Row, Segment
from delib_fast.data.decontamination import words_of
from delib_fast.data.read.jsonl import HashingFile, read_items
from delib_fast.evals.intervals import Estimate, bootstrap, share_by_group
from delib_fast.evals.scoring import Scorer

Orders = Literal["both", "none"]


@dataclass(frozen=True, slots=True)
class Item:
    """A prompt with two replies."""

    location: str
    situation: str
    """Equal to the location if the file gives none."""
    messages: tuple[Message, ...]
    cots: tuple[str, ...]
    """The chains of thought that may precede the replies."""
    a: str
    b: str


@dataclass(frozen=True, slots=True)
class OrderSplit:
    """How much of the choices is due to the options, and how much to their order."""

    content: float
    """Mean over pairs of |m + m'| / 2, nats."""
    habit: float
    """Mean over pairs of |m − m'| / 2, nats."""

    @property
    def void(self) -> bool:
        """Whether the order decides more than the options do."""
        return self.habit > self.content


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
    split: OrderSplit | None
    """Of the margins; None if the prompts do not name the options."""
    first_cot_split: OrderSplit | None
    """The same of log p / (1 − p), where p is the probability of the first of `cots`; None without several of them."""


def read_choices(path: str | Path, orders: Orders = "both") -> list[Item]:
    """Read the items of a .jsonl or .json file.

    Args:
        orders: `both` if each item is present with the options in both orders; `none` if no prompt names its options.
    Returns:
        The items in the order of the file. Two items that differ only in the order have the same situation.
    Raises:
        ConfigError: an item is not valid, or lacks the one with the options swapped; with its location.
    """
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
    if orders == "none":
        for item in items:
            _refuse_named_options(item)
        return items
    for pair in pair_orders(items):
        if items[pair[0]].situation == items[pair[0]].location:
            together = " and ".join(items[i].location for i in pair)
            for i in pair:
                items[i] = replace(items[i], situation=together)
    return items


def pair_orders(items: Sequence[Item]) -> list[tuple[int, int]]:
    """The indices of each two items that differ only in the order of the options in the prompt.

    Two items belong together if they have the same two replies (exchanged, if replies are letters), chains of thought
    and situation (if the file gives it), and their prompts consist of the same words in another order.

    Raises ConfigError with the location of an item that does not belong to exactly one other.
    """
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for i, item in enumerate(items):
        words = tuple(sorted(words_of(_text(item))))
        situation = None if item.situation == item.location else item.situation
        groups[situation, frozenset((item.a.strip(), item.b.strip())), words, item.cots].append(i)
    for members in groups.values():
        first = items[members[0]]
        prompts = {tuple(words_of(_text(items[i]))) for i in members}
        if len(members) != len(prompts):
            raise ConfigError(
                f"{items[members[-1]].location}: the item is the same as that of {first.location}; remove one"
            )
        if len(members) == 1:
            raise ConfigError(
                f"{first.location}: no item has the same options in the other order. Add one with the same words in "
                "the prompt, the two options swapped; or, if no prompt names its options, set orders: none"
            )
        if len(members) > 2:
            listed = ", ".join(items[i].location for i in members)
            raise ConfigError(
                f"{first.location}: {len(members)} items have the same options and words, where two are expected "
                f"({listed}); give each pair of orders a situation of its own"
            )
    return [(members[0], members[1]) for members in groups.values()]


def split_by_order(values: NDArray[np.float64], pairs: Sequence[tuple[int, int]]) -> OrderSplit:
    """Split the margins of items into content and habit.

    Args:
        values: (items,) float64, log-odds for `a`.
        pairs: the indices of the two orders of each item, as `pair_orders` returns them.
    """
    first, second = values[[i for i, _ in pairs]], values[[j for _, j in pairs]]
    return OrderSplit(float(np.abs(first + second).mean() / 2), float(np.abs(first - second).mean() / 2))


def _text(item: Item) -> str:
    return "\n".join(message.content for message in item.messages)


def _refuse_named_options(item: Item) -> None:
    """Raise ConfigError if the prompt contains all words of `a` that `b` lacks, and all words of `b` that `a` lacks."""
    a, b, prompt = (set(words_of(text)) for text in (item.a, item.b, _text(item)))
    if a - b and b - a and (a ^ b) <= prompt:
        raise ConfigError(
            f"{item.location}: orders: none, but the prompt names both options; add the item with the options swapped, "
            "and remove orders: none"
        )


Scores = dict[tuple[tuple[Message, ...], str | None, str], tuple[float, float]]
"""log p of a chain of thought and of the reply after it, by (messages, chain of thought, reply), nats."""


def choose(
    scorer: Scorer, items: Sequence[Item], *, think: bool, orders: Orders = "both", scores: Scores | None = None
) -> ChoiceFigures:
    """Score both replies of every item.

    Args:
        think: put the item's chain of thought, or each of several, before both replies. Every item then needs one.
        orders: as in `read_choices`.
        scores: what the scorer has already computed. It is not computed again, and what is new is added.
    Limitations: how often the model would give either reply; both may be unlikely. The replies should differ
    only in the choice.
    Raises:
        ConfigError: `think` is true and an item has no chain of thought, or an item lacks the other order.
    """
    pairs = pair_orders(items) if orders == "both" else []
    texts = [(item, cot) for item in items for cot in (_cots(item) if think else (None,))]
    scores = {} if scores is None else scores
    sequences = {(item.messages, cot, text): _row(item, text, cot) for item, cot in texts for text in (item.a, item.b)}
    new = [key for key in sequences if key not in scores]
    examples = scorer.encode([sequences[key] for key in new])
    losses = scorer.losses(examples, (Segment.COT, Segment.RESPONSE)) if new else []
    scores |= {
        key: (-loss.total(Segment.COT), -loss.total(Segment.RESPONSE)) for key, loss in zip(new, losses, strict=True)
    }
    found = np.array([[scores[item.messages, cot, text] for text in (item.a, item.b)] for item, cot in texts])
    thought, reply = found[:, 0, 0], found[:, :, 1]
    margins, first, first_margins = [], [], []
    ends = np.cumsum([len(item.cots) if think else 1 for item in items])
    for at in np.split(np.arange(len(texts)), ends[:-1]):
        weights = thought[at] - np.logaddexp.reduce(thought[at])
        a, b = (weights + reply[at, side] - np.logaddexp(reply[at, 0], reply[at, 1]) for side in (0, 1))
        margins.append(float(np.logaddexp.reduce(a) - np.logaddexp.reduce(b)))
        first.append(float(np.exp(weights[0])))
        first_margins.append(float(weights[0] - np.logaddexp.reduce(weights[1:])) if len(at) > 1 else 0.0)
    several_cots = think and all(len(item.cots) > 1 for item in items)
    return _figures(
        np.array(margins),
        np.array(first) if think else None,
        [item.situation for item in items],
        split_by_order(np.array(margins), pairs) if pairs else None,
        split_by_order(np.array(first_margins), pairs) if pairs and several_cots else None,
    )


def _figures(
    margins: NDArray[np.float64],
    first: NDArray[np.float64] | None,
    situations: Sequence[str],
    split: OrderSplit | None,
    first_cot_split: OrderSplit | None,
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
        split,
        first_cot_split,
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
