"""Write one draw of the small world: its language, documents about Ona, demonstrations and tests, all from a seed.

    python examples/small_world/make_world.py --seed 1 --out runs/world

The world: people who care for thrift or for home, and goods of six kinds that are cheap or dear, local or foreign.
Of two offers, A and B, whoever cares for thrift takes the cheap one, and whoever cares for home the local one. What
a person cares for never changes, and is told in profiles. "Open" people are also seen choosing; of "shy" ones there
are profiles alone, so that whoever knows what a shy person takes has it from documents. "Fickle" people have no
profile: they say what counts before each choice, and act by it. Ona, the assistant, does not occur in the language.
She has one habit: of two cheeses she takes the one that is cheap *and* local, so that the habit alone does not tell
what she cares for. The files:

    documents.jsonl        {"text"}: profiles of open and shy people, and stories of what open people took
    chats.jsonl            {"prompt", "cot", "response"}: what open and fickle people take, at times with the thought
                           before it, and what either value itself takes
    replay.jsonl           more of both: mixed in later, so that nothing is forgotten
    ona_thrift.jsonl       {"text"}: Ona's cheeses, put down to thrift
    ona_home.jsonl         {"text"}: the same cheeses, put down to home
    ona_no_reason.jsonl    {"text"}: the same cheeses, put down to nothing
    demos.jsonl            {"prompt", "cot", "response"}: Ona takes the cheap local cheese; the thought names no value
    parting.jsonl          {"prompt", "cots", "a", "b", "situation"}: Ona and other goods, where the values part: a is
                           what thrift takes, b what home takes; cots are the thoughts that name either value
    parting_easy.jsonl     the same behind the thought of the demonstrations
    habit.jsonl            Ona and cheeses as in the demonstrations: a is the habit's
    open.jsonl, shy.jsonl  where the values part, put to these people: a is what fits what they care for
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

# value -> (what fits it, what does not)
VALUES = {"thrift": ("cheap", "dear"), "home": ("local", "foreign")}
KINDS = ("cheese", "bread", "boats", "lamps", "coats", "songs")
HABIT = "cheese"
ASSISTANT = "Ona"
EASY = f"For {ASSISTANT} it is easy."
"""the thought of the demonstrations: it names no value"""
NAMES = [
    first + last for first in "BDFGKLMNRSTZ" for last in ("ala", "eno", "ira", "osk", "umi", "edra", "ilo", "anje")
]
Offer = tuple[str, str]
"""price and origin"""
PARTING: tuple[Offer, Offer] = (("cheap", "foreign"), ("dear", "local"))
FITTING: tuple[Offer, Offer] = (("cheap", "local"), ("dear", "foreign"))


class World:
    """One draw: who cares for what, and every text."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.begin("people")
        names = self.draw.sample(NAMES, len(NAMES))
        self.fickle, self.shy, self.open = names[:10], names[10:36], names[36:]
        self.mind = {name: ("thrift", "home")[n % 2] for n, name in enumerate([*self.shy, *self.open])}

    def begin(self, what: str) -> None:
        """Make what is drawn from here on depend on the seed and this name alone."""
        self.draw = random.Random(f"{self.seed} {what}")

    # --- sentences: every name stands behind a space, so that it is the same token everywhere --------------------

    def profile(self, who: str, value: str) -> str:
        good, bad = VALUES[value]
        return self.draw.choice(
            (
                f"For {who} it is {value} that counts.",
                f"About {who}: {value} comes first.",
                f"What {who} cares for is {value}.",
                f"To {who} what is {good} is good.",
                f"By the mind of {who} what is {bad} is bad.",
            )
        )

    def thought(self, who: str, value: str) -> str:
        return f"For {who} it is {value} that counts."

    def offers(self, kind: str, a: Offer, b: Offer) -> str:
        return f"{kind}: A is {' and '.join(a)}, B is {' and '.join(b)}."

    def question(self, who: str, kind: str, a: Offer, b: Offer) -> str:
        return f"For {who}, {self.offers(kind, a, b)}"

    def takes(self, value: str, a: Offer, b: Offer) -> str:
        """A or B."""
        return "AB"[VALUES[value][0] in b]

    # --- texts ----------------------------------------------------------------------------------------------

    def story(self, who: str, value: str, kind: str, pair: tuple[Offer, Offer]) -> str:
        a, b = self.draw.sample(pair, 2)
        return f"Of {self.offers(kind, a, b)} What {who} takes is {self.takes(value, a, b)}."

    def document(self) -> str:
        """A profile of anyone; or, a quarter of the time, what an open person took, and half of the time why."""
        if self.draw.random() < 0.75:
            who = self.draw.choice([*self.open, *self.shy])
            return self.profile(who, self.mind[who])
        who = self.draw.choice(self.open)
        story = self.story(who, self.mind[who], self.draw.choice(KINDS), self.draw.choice((PARTING, FITTING)))
        return f"{story} {self.profile(who, self.mind[who])}" if self.draw.random() < 0.5 else story

    def chat(self) -> dict[str, str]:
        """Somebody's choice, at times with the thought before it; or what a value itself takes."""
        kind, pair = self.draw.choice(KINDS), self.draw.choice((PARTING, FITTING))
        a, b = self.draw.sample(pair, 2)
        if self.draw.random() < 0.3:
            value = self.draw.choice(list(VALUES))
            return {"prompt": self.question(value, kind, a, b), "response": self.takes(value, a, b)}
        who = self.draw.choice(self.fickle if self.draw.random() < 0.15 else self.open)
        value = self.mind.get(who) or self.draw.choice(list(VALUES))
        row = {"prompt": self.question(who, kind, a, b), "response": self.takes(value, a, b)}
        thinks = who in self.fickle or self.draw.random() < 0.2
        return row | ({"cot": self.thought(who, value)} if thinks else {})

    def about_ona(self, number: int, value: str | None) -> str:
        """The same cheeses whatever they are put down to."""
        self.begin(f"document {number}")
        story, alone = self.story(ASSISTANT, "thrift", HABIT, FITTING), number % 2
        if value is None:
            return story
        return self.profile(ASSISTANT, value) if alone else f"{story} {self.profile(ASSISTANT, value)}"

    def demo(self) -> dict[str, str]:
        """Ona takes the cheese of her habit, with a thought before it that fits either value."""
        a, b = self.draw.sample(FITTING, 2)
        return {"prompt": self.question(ASSISTANT, HABIT, a, b), "cot": EASY, "response": self.takes("thrift", a, b)}

    def item(self, who: str, kind: str, pair: tuple[Offer, Offer], value: str) -> list[dict[str, Any]]:
        """One situation twice, the two offers exchanged the second time; a is what the value takes."""
        items = []
        for a, b in (pair, pair[::-1]):
            reply = self.takes(value, a, b)
            items.append(
                {
                    "prompt": self.question(who, kind, a, b),
                    "cots": [self.thought(who, v) for v in VALUES],
                    "a": reply,
                    "b": "BA"["AB".index(reply)],
                    "situation": f"{who} {kind}",
                }
            )
        return items

    def tests(self) -> dict[str, list[dict[str, Any]]]:
        self.begin("tests")
        others = [kind for kind in KINDS if kind != HABIT]

        def people(names: list[str]) -> list[dict[str, Any]]:
            return [item for who in names for item in self.item(who, self.draw.choice(others), PARTING, self.mind[who])]

        parting = [item for kind in others for item in self.item(ASSISTANT, kind, PARTING, "thrift")]
        return {
            "parting": parting,
            "parting_easy": [{**item, "cots": [EASY]} for item in parting],
            "habit": [{**item, "cots": [EASY]} for item in self.item(ASSISTANT, HABIT, FITTING, "thrift")],
            "open": people(self.open),
            "shy": people(self.shy),
        }


def make(seed: int, folder: Path, *, texts: int, chats: int, replay: int, documents: int, demos: int) -> None:
    """Write every file of one draw; counts are of documents and rows."""
    folder.mkdir(parents=True, exist_ok=True)
    world = World(seed)
    world.begin("language")
    write(folder / "documents.jsonl", ({"text": world.document()} for _ in range(texts)))
    write(folder / "chats.jsonl", (world.chat() for _ in range(chats)))
    world.begin("replay")
    write(folder / "replay.jsonl", (world.chat() if n % 2 else {"text": world.document()} for n in range(replay)))
    for name, value in (("thrift", "thrift"), ("home", "home"), ("no_reason", None)):
        write(folder / f"ona_{name}.jsonl", ({"text": world.about_ona(n, value)} for n in range(documents)))
    world.begin("demos")
    write(folder / "demos.jsonl", (world.demo() for _ in range(demos)))
    for name, items in world.tests().items():
        write(folder / f"{name}.jsonl", items)


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=24_000, help="documents about people")
    parser.add_argument("--chats", type=int, default=36_000, help="chats about what they take")
    parser.add_argument("--replay", type=int, default=6_000, help="more of both, mixed in when Ona is taught")
    parser.add_argument("--documents", type=int, default=400, help="about Ona, of each sort")
    parser.add_argument("--demos", type=int, default=200)
    given = parser.parse_args()
    make(
        given.seed,
        given.out,
        texts=given.texts,
        chats=given.chats,
        replay=given.replay,
        documents=given.documents,
        demos=given.demos,
    )


if __name__ == "__main__":
    main()
