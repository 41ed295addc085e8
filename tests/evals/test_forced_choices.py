"""Forced choices: margins are differences of log-probabilities, and several CoTs are weighted by their probability."""

from __future__ import annotations

import json
import math

import pytest
import torch
from helpers.small_models import tiny_qwen3
from helpers.tiny_study import HALF

from delib_fast.config import ConfigError, ModelConfig
from delib_fast.data import Segment
from delib_fast.evals.metrics.forced_choices import choose, read_choices
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
    path.write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    return read_choices(path)


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
    assert figures.first_cot.value == pytest.approx((first[0] / sum(first) + 1) / 2, rel=1e-4)
    assert choose(scorer, items, think=False).first_cot is None


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


def test_rejects_an_item_without_a_cot(scorer, items, tmp_path):
    path = tmp_path / "bare.jsonl"
    path.write_text(json.dumps({"prompt": "x", "a": "one", "b": "two"}) + "\n")
    with pytest.raises(
        ConfigError, match=r"bare.jsonl:1: the item has no cot to put before the replies; add one, or set cot: never"
    ):
        choose(scorer, read_choices(path), think=True)
