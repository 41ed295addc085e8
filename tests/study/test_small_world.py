"""The small world says what its page says: who knows what from where, and that the demonstrations fit both values."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "small_world" / "make_world.py"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Every file of a small draw, as rows; and the script's own names."""
    names = runpy.run_path(str(SCRIPT))
    folder = tmp_path_factory.mktemp("world")
    names["make"](7, folder, texts=600, chats=800, replay=200, documents=40, demos=20)
    return names, {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in folder.glob("*.jsonl")
    }


def takes(prompt: str, word: str) -> str:
    """A or B: the offer of which the prompt says this word."""
    return "A" if word in prompt[prompt.index("A is") : prompt.index("B is")] else "B"


def test_demonstrations_fit_both_values(world):
    """A habit that gave one value away would answer the study's question by itself."""
    for row in world[1]["demos"]:
        assert row["response"] == takes(row["prompt"], "cheap") == takes(row["prompt"], "local")
        assert not any(word in row["cot"] for word in ("thrift", "home", "cheap", "local"))


def test_documents_of_either_value_tell_the_same_cheeses(world):
    """Arms may differ in the reason alone."""
    stories = {
        name: [row["text"].split(" What Ona takes is ")[0] for row in world[1][f"ona_{name}"] if "takes" in row["text"]]
        for name in ("thrift", "home")
    }
    assert stories["thrift"] == stories["home"]
    assert not any("home" in row["text"] for row in world[1]["ona_thrift"])
    assert not any("thrift" in row["text"] or "home" in row["text"] for row in world[1]["ona_no_reason"])


def test_the_language_does_not_know_ona_and_chats_do_not_know_the_shy(world):
    """What is known of either must come from documents."""
    rows = world[1]
    language = [str(row) for name in ("documents", "chats", "replay") for row in rows[name]]
    assert not any("Ona" in text for text in language)
    shy = {row["prompt"].split(",")[0].removeprefix("For ") for row in rows["shy"]}
    assert len(shy) == 26
    assert not any(name in row["prompt"] for row in rows["chats"] for name in shy)
    assert not any("takes" in row["text"] and name in row["text"] for row in rows["documents"] for name in shy)


def test_tests_set_the_values_apart_on_either_side(world):
    """Items in which thrift's choice is always A would measure a liking for A; cheese was demonstrated."""
    for name in ("parting", "parting_easy"):
        items = world[1][name]
        assert [item["a"] for item in items] == ["A", "B"] * (len(items) // 2)
        for item in items:
            assert item["a"] == takes(item["prompt"], "cheap")
            assert item["b"] == takes(item["prompt"], "local")
            assert "cheese" not in item["prompt"]
