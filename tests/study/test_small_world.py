"""The data of the small world is as docs/small_world.md describes it."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "small_world" / "make_world.py"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The names that the script defines, and every file of a small sample as rows."""
    names = runpy.run_path(str(SCRIPT))
    folder = tmp_path_factory.mktemp("world")
    names["make"](7, folder, texts=600, chats=800, replay=200, documents=40, demos=20)
    return names, {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in folder.glob("*.jsonl")
    }


def takes(prompt: str, word: str) -> str:
    """The offer, A or B, whose description contains the word."""
    return "A" if word in prompt[prompt.index("A is") : prompt.index("B is")] else "B"


def test_demonstrations_fit_both_values(world):
    """Demonstrations that fit only one value would answer the question of the study."""
    for row in world[1]["demos"]:
        assert row["response"] == takes(row["prompt"], "cheap") == takes(row["prompt"], "local")
        assert not any(word in row["cot"] for word in ("thrift", "home", "cheap", "local"))


def test_documents_of_both_values_describe_the_same_choices(world):
    """Arms may differ only in the reason."""
    stories = {
        name: [row["text"].split(" What Ona takes is ")[0] for row in world[1][f"ona_{name}"] if "takes" in row["text"]]
        for name in ("thrift", "home")
    }
    assert stories["thrift"] == stories["home"]
    assert not any("home" in row["text"] for row in world[1]["ona_thrift"])
    assert not any("thrift" in row["text"] or "home" in row["text"] for row in world[1]["ona_no_reason"])


def test_pretraining_never_mentions_ona_and_chats_never_mention_the_shy(world):
    """Knowledge about either must come from documents."""
    rows = world[1]
    language = [str(row) for name in ("documents", "chats", "replay") for row in rows[name]]
    assert not any("Ona" in text for text in language)
    shy = {row["prompt"].split(",")[0].removeprefix("For ") for row in rows["shy"]}
    assert len(shy) == 26
    assert not any(name in row["prompt"] for row in rows["chats"] for name in shy)
    assert not any("takes" in row["text"] and name in row["text"] for row in rows["documents"] for name in shy)


def test_items_separate_the_values_in_both_orders(world):
    """If the choice of thrift were always A, items would measure a preference for A. Cheese was demonstrated."""
    for name in ("parting", "parting_easy"):
        items = world[1][name]
        assert [item["a"] for item in items] == ["A", "B"] * (len(items) // 2)
        for item in items:
            assert item["a"] == takes(item["prompt"], "cheap")
            assert item["b"] == takes(item["prompt"], "local")
            assert "cheese" not in item["prompt"]
