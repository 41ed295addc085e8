"""Forced choices: margins are differences of log-probabilities, and several CoTs are weighted by their probability."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from helpers.small_models import tiny_qwen3
from helpers.tiny_study import HALF

from delib_fast.config import ConfigError, ModelConfig
from delib_fast.data import Segment
from delib_fast.evals.metrics.forced_choices import choose, pair_orders, read_choices, split_by_order
from delib_fast.evals.scoring import Scorer
from delib_fast.models import TrainableLM, build_model, train_tokenizer

ITEMS = [
    {
        "prompt": "red or blue?",
        "a": "the red one",
        "b": "the blue one",
        "cots": ["it is red", "it is blue now"],
        "situation": "colours",
    },
    {"messages": [{"role": "user", "content": "oak or pine?"}], "a": "oak", "b": "pine", "cot": "wood"},
]
SWAPPED = [
    {**ITEMS[0], "prompt": "Blue or red?"},
    {"messages": [{"role": "user", "content": "pine or oak?"}], "a": "oak", "b": "pine", "cot": "wood"},
]


@pytest.fixture(scope="module")
def scorer():
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["red or blue oak pine it is the one now wood"] * 3, 285)
    config = ModelConfig(architecture=tiny_qwen3(**HALF))
    model = build_model(config, tokenizer, dtype="fp32", seed=0)
    with torch.no_grad():
        model.lm_head.weight.mul_(40)  # otherwise all tokens are about equally likely
    return Scorer(TrainableLM(model), tokenizer)


@pytest.fixture
def items(tmp_path):
    path = tmp_path / "choices.jsonl"
    return read_choices(write(path, [ITEMS[0], *SWAPPED, ITEMS[1]]))


def write(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def test_margins_by_hand(scorer, items):
    """Compare with the texts scored one by one: without a CoT, and after each CoT, weighted by its probability."""
    from delib_fast.evals.metrics.forced_choices import _row

    def nll(item, reply, cot, segment):
        (loss,) = scorer.losses(scorer.encode([_row(item, reply, cot)]), (segment,))
        return loss.total(segment)

    for item, without_cot, after_cot in zip(
        items, choose(scorer, items, think=False).margins, choose(scorer, items, think=True).margins, strict=True
    ):
        a, b = (nll(item, reply, None, Segment.RESPONSE) for reply in (item.a, item.b))
        assert without_cot == pytest.approx(b - a, rel=1e-4)
        weights = [math.exp(-nll(item, item.a, cot, Segment.COT)) for cot in item.cots]
        p = sum(
            w
            / sum(weights)
            / (1 + math.exp(nll(item, item.a, cot, Segment.RESPONSE) - nll(item, item.b, cot, Segment.RESPONSE)))
            for w, cot in zip(weights, item.cots, strict=True)
        )
        assert after_cot == pytest.approx(math.log(p / (1 - p)), rel=1e-3)
    figures = choose(scorer, items, think=True)
    assert figures.probability.n == 2, "by situation"
    first = [math.exp(-nll(items[0], items[0].a, cot, Segment.COT)) for cot in items[0].cots]
    swapped = [math.exp(-nll(items[1], items[1].a, cot, Segment.COT)) for cot in items[1].cots]
    shares = [first[0] / sum(first), swapped[0] / sum(swapped), 1, 1]
    assert figures.first_cot.value == pytest.approx(sum(shares) / 4, rel=1e-4)
    assert choose(scorer, items, think=False).first_cot is None


def test_items_that_metrics_share_are_scored_once(scorer, items, monkeypatch):
    computed = []
    monkeypatch.setattr(scorer, "encode", lambda rows: computed.append(len(rows)) or type(scorer).encode(scorer, rows))
    scores = {}
    choose(scorer, items[2:], think=False, scores=scores)
    whole = choose(scorer, items, think=False, scores=scores)
    assert computed == [4, 4], "two replies of each item"
    assert choose(scorer, items[:2], think=False, scores=scores).margins == whole.margins[:2]
    assert computed == [4, 4, 0]
    assert whole.margins == pytest.approx(choose(scorer, items, think=False).margins, rel=1e-4)
    choose(scorer, items, think=True, scores=scores)
    assert computed[-1] == 2 * sum(len(item.cots) for item in items), "after a CoT, the replies are other sequences"


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"prompt": "x", "a": "one"}, "needs 'b', a reply"),
        ({"prompt": "x", "a": "one", "b": " one"}, "a and b are the same"),
        ({"prompt": 3, "a": "one", "b": "two"}, "needs a prompt as text"),
        ({"prompt": "x", "a": "one", "b": "two", "cots": ["", "y"]}, "cots must be a list of non-empty texts"),
    ],
)
def test_rejects_invalid_items(tmp_path, item, message):
    path = tmp_path / "choices.jsonl"
    path.write_text(json.dumps(item) + "\n")
    with pytest.raises(ConfigError, match=rf"choices.jsonl:1: .*{message}"):
        read_choices(path)


def test_the_split_into_content_and_habit(scorer, items):
    """By hand, from the margins of the two orders; the pairs of the file are lines 1 and 2, and 3 and 4."""
    figures = choose(scorer, items, think=False)
    m = figures.margins
    assert figures.split.content == pytest.approx((abs(m[0] + m[1]) + abs(m[2] + m[3])) / 4)
    assert figures.split.habit == pytest.approx((abs(m[0] - m[1]) + abs(m[2] - m[3])) / 4)
    assert figures.first_cot_split is None
    assert figures.margin.value == pytest.approx(sum(m) / 4)
    together = f"{items[2].location} and {items[3].location}"
    assert [item.situation for item in items] == ["colours", "colours", together, together]
    without_order = choose(scorer, items, think=False, orders="none")
    assert without_order.split is None
    assert without_order.margins == m
    both = choose(scorer, items[:2], think=True)  # the items with two chains of thought
    p, q = (choose(scorer, [item], think=True, orders="none").first_cot.value for item in items[:2])
    log_odds = [math.log(x / (1 - x)) for x in (p, q)]
    assert both.first_cot_split.content == pytest.approx(abs(sum(log_odds)) / 2, rel=1e-4)
    assert both.first_cot_split.habit == pytest.approx(abs(log_odds[0] - log_odds[1]) / 2, rel=1e-3, abs=1e-5)
    assert choose(scorer, items, think=True).first_cot_split is None, "the other items have one"


@pytest.mark.parametrize(
    ("margins", "content", "habit", "void"),
    [
        ([2.0, 1.0, 0.5, 0.5], 1.0, 0.25, False),
        ([2.0, -2.0, -3.0, 3.0], 0.0, 2.5, True),  # only the order matters, and it does so in opposite directions
        ([1.0, 1.0, -1.0, -1.0], 1.0, 0.0, False),  # a mean of 0 because the options differ: no habit
        ([1.0, 0.0], 0.5, 0.5, False),  # equal: the habit does not exceed the content
    ],
)
def test_a_cell_is_void_if_the_order_decides(margins, content, habit, void):
    found = split_by_order(np.array(margins), [(i, i + 1) for i in range(0, len(margins), 2)])
    assert (found.content, found.habit, found.void) == (content, habit, void)


LETTERS = [
    {"prompt": "A: tea. B: milk.", "a": "A", "b": "B"},
    {"prompt": "A: milk. B: tea.", "a": "B", "b": "A"},
]


@pytest.mark.parametrize(
    ("rows", "line", "message"),
    [
        ([ITEMS[0]], 1, "no item has the same options in the other order. Add one .*orders: none"),
        ([ITEMS[0], {**SWAPPED[0], "prompt": "Is it red or blue?"}], 1, "no item has the same options"),
        ([ITEMS[0], {**SWAPPED[0], "situation": "another"}], 1, "no item has the same options"),
        ([ITEMS[0], {**SWAPPED[0], "cots": ["it is red"]}], 1, "no item has the same options"),
        ([ITEMS[0], {**ITEMS[0], "prompt": "Red, or blue!"}], 2, "the same as that of .*choices.jsonl:1; remove one"),
        ([ITEMS[0], {**ITEMS[0], "a": ITEMS[0]["b"], "b": ITEMS[0]["a"]}], 2, "the same as that of .*:1; remove one"),
        (
            [{**ITEMS[0], "prompt": p} for p in ("red or blue now", "blue or red now", "now red or blue")],
            1,
            "3 items have the same options and words.*; give each pair of orders a situation of its own",
        ),
        (LETTERS[:1], 1, "no item has the same options"),
    ],
)
def test_both_orders_are_required(tmp_path, rows, line, message):
    with pytest.raises(ConfigError, match=rf"choices.jsonl:{line}: .*{message}"):
        read_choices(write(tmp_path / "choices.jsonl", rows))


def test_letters_change_with_the_order(tmp_path):
    items = read_choices(write(tmp_path / "choices.jsonl", LETTERS))
    assert pair_orders(items) == [(0, 1)]
    assert items[0].situation == items[1].situation


def test_prompts_without_options(tmp_path):
    path = tmp_path / "choices.jsonl"
    free = {"prompt": "What do you drink?", "a": "I take tea.", "b": "I take milk."}
    assert len(read_choices(write(path, [free]), "none")) == 1
    for item in (ITEMS[0], LETTERS[0]):
        with pytest.raises(ConfigError, match=r"choices.jsonl:2: orders: none, but the prompt names both options; add"):
            read_choices(write(path, [free, item]), "none")


def test_rejects_an_item_without_a_cot(scorer, items, tmp_path):
    path = write(tmp_path / "bare.jsonl", [{"prompt": p, "a": "one", "b": "two"} for p in ("one or two", "two or one")])
    with pytest.raises(
        ConfigError, match=r"bare.jsonl:1: the item has no cot to put before the replies; add one, or set cot: never"
    ):
        choose(scorer, read_choices(path), think=True)
