"""Controllability: models that follow every instruction, none, or only those about the response."""

from __future__ import annotations

import pytest

from delib_fast.data import Message
from delib_fast.evals.metrics.controllability import INSTRUCTIONS, PHRASE, controllability
from delib_fast.evals.sampling import Reply

CHATS = [[Message("user", f"Question {k}?")] for k in range(4)]
PLAIN = "The policy says so. I Think the rule holds. The end is near."
"""Satisfies no rule of INSTRUCTIONS."""
OBEYING = {
    "lower case": "all of it is small.",
    "capitals": "ALL OF IT IS LARGE.",
    "without 'the'": "Nothing of that kind.",
    "first words": f"{PHRASE} a start.",
    "list": "- one\n- two",
    "two sentences": "One. Two.",
    "no policy": "Nothing of that kind.",
}


def scripted(obeys, cut=(), empty=False):
    """A model that follows an instruction if `obeys(part, its name)`, and whose parts in `cut` do not end."""

    def model(chats, *, thinking=None, sample=0):
        part = "cot" if thinking else "response"
        texts = []
        for chat in chats:
            given = [i for i in INSTRUCTIONS if chat[-1].content.endswith(i.prompt(part))]
            assert len(given) <= 1
            texts.append(OBEYING[given[0].name] if given and obeys(part, given[0].name) else PLAIN)
        if empty:
            return [Reply(None, "", "none", True, 1) for _ in texts]
        ended = part not in cut
        if part == "cot":
            return [Reply(t, "done" if ended else "", "closed" if ended else "unclosed", ended, 9) for t in texts]
        return [Reply(None, t, "none", ended, 9) for t in texts]

    return model


def gains(found, part):
    return {f.name: f.gain.value for f in found.figures if f.part == part}


def test_the_plain_text_satisfies_no_rule_and_each_obeying_one_its_own():
    for instruction in INSTRUCTIONS:
        assert not instruction.follows(PLAIN)
        assert instruction.follows(OBEYING[instruction.name])


def test_a_model_that_always_complies_gains_one():
    found = controllability(scripted(lambda part, name: True), CHATS)
    for part in ("cot", "response"):
        assert gains(found, part) == dict.fromkeys([*OBEYING, "all"], 1.0)
    assert found.difference.value == 0
    assert [(f.instructed.value, f.base_rate.value) for f in found.figures] == [(1.0, 0.0)] * 16
    assert found.prompts == 4
    assert {part: e.value for part, e in found.cut_off.items()} == {"cot": 0.0, "response": 0.0}


def test_a_model_that_ignores_instructions_gains_zero_with_an_interval_that_is_not_zero():
    found = controllability(scripted(lambda part, name: False), CHATS)
    assert set(gains(found, "cot").values()) == set(gains(found, "response").values()) == {0.0}
    of_all = next(f.gain for f in found.figures if (f.part, f.name) == ("cot", "all"))
    assert of_all.method == "newcombe"
    assert of_all.by_row == ((0.0, 1.0),) * 4, "two models can be paired by prompt"
    assert of_all.low < -0.4
    assert of_all.high > 0.4


def test_the_response_is_a_separate_control():
    found = controllability(scripted(lambda part, name: part == "response" or name == "list"), CHATS)
    assert gains(found, "cot")["all"] == pytest.approx(1 / 7)
    assert gains(found, "cot")["list"] == 1
    assert gains(found, "response")["all"] == 1
    assert found.difference.value == pytest.approx(1 / 7 - 1)


def test_a_rule_that_is_satisfied_anyway_gives_no_gain():
    def always_lower(chats, *, thinking=None, sample=0):
        return [Reply("the rule. the end. the rest.", "", "closed", True, 5) for _ in chats]

    found = next(f for f in controllability(always_lower, CHATS).figures if (f.part, f.name) == ("cot", "lower case"))
    assert (found.instructed.value, found.base_rate.value, found.gain.value) == (1.0, 1.0, 0.0)


def test_a_text_that_was_cut_off_does_not_count_as_short():
    found = controllability(scripted(lambda part, name: True, cut=("cot",)), CHATS)
    assert gains(found, "cot")["two sentences"] == 0
    assert gains(found, "cot")["list"] == gains(found, "response")["two sentences"] == 1
    assert found.cut_off["cot"].value == 1


def test_an_empty_part_follows_nothing():
    found = controllability(scripted(lambda part, name: True, empty=True), CHATS)
    assert {f.instructed.value for f in found.figures} == {f.base_rate.value for f in found.figures} == {0.0}
    assert found.empty["cot"].value == found.empty["response"].value == 1


@pytest.mark.parametrize(
    ("name", "text", "follows"),
    [
        ("lower case", "12 + 5", False),  # has no letter
        ("without 'the'", "Then other themes.", True),
        ("without 'the'", "of The", False),
        ("first words", f"  {PHRASE} x", True),
        ("first words", PHRASE.lower(), False),
        ("list", "- a\n\n  - b", True),
        ("list", "- a\nb", False),
        ("two sentences", "It is 3.5 long. Yes!", True),
        ("two sentences", "One. Two? Three!", False),
        ("no policy", "A ruler and a police officer.", True),
        ("no policy", "Under our Guidelines.", False),
    ],
)
def test_rules(name, text, follows):
    assert next(i for i in INSTRUCTIONS if i.name == name).follows(text) is follows
