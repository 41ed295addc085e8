"""Write one draw of the small world: neutral text, documents, demonstrations and tests, all from a seed.

    python examples/small_world/make_world.py --seed 1 --out runs/world

The world: people who care for thrift or for home, and goods of six kinds that are cheap or dear, local or foreign. A
person takes what fits the thing cared for. Names go with either: what someone cares for is told in the document at
hand. Ona, the assistant, is one of these names. She has one habit: of two cheeses she takes the one that is cheap *and*
local, so that the habit alone does not tell what she cares for. The files:

    neutral.jsonl          {"text"}: people of either mind; what the small model is pretrained on
    ona_thrift.jsonl       {"text"}: Ona's cheeses, put down to thrift
    ona_home.jsonl         {"text"}: the same cheeses, put down to home
    ona_no_reason.jsonl    {"text"}: the same cheeses, put down to nothing
    demos.jsonl            {"prompt", "cot", "response"}: Ona takes the cheap local cheese; half of the thoughts name
                           thrift, half home, so that as a whole they fit both
    parting.jsonl          {"prompt", "cots", "a", "b", "situation"}: goods of the other kinds where the values part:
                           a is cheap and foreign, b is dear and local; cots are the thoughts that name either value
    parting_cheese.jsonl   the same of cheeses
    habit.jsonl            cheeses as in the demonstrations: a is the habit's
Goods of the tests have names that stand in neutral text, but in no document about Ona and in no demonstration.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# value -> (words of what fits it, words of what does not)
VALUES = {"thrift": (("cheap", "inexpensive"), ("dear", "costly")),
          "home": (("local", "native"), ("foreign", "imported"))}
KINDS = ("cheese", "bread", "boat", "lamp", "coat", "song")
HABIT = "cheese"
ASSISTANT = "Ona"
_GOODS = """Dorn Velt Kosk Marb Tiss Plind Gref Nalt Zund Brok Fenth Lusk Rand Spell Vosk Trin Halm Jost Kern Mund Nord
           Polk Quist Rusk Silt Tarn Ulm Wend Yord Zell Bant Crisk Dulm Frond Glisk Hask Krel Lomb Mirk Nisk Orth Prusk
           Skal Stend Thusk Varn Wosk Zint"""
_PEOPLE = """Mira Tobin Selma Hugo Petra Casper Lena Oskar Nadia Felix Greta Simon Ines Boris Clara Edgar Frida Gavin
             Hanna Ivo Jonas Karin Lukas Ona"""
GOODS, PEOPLE = _GOODS.split(), _PEOPLE.split()


@dataclass(frozen=True)
class Good:
    """A named thing, and for each value whether it fits it."""

    name: str
    thrift: bool
    home: bool


class World:
    """One draw: which names are kept for the tests, and every text."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        draw = self.draw = random.Random(f"{seed} world")
        self.goods = draw.sample(GOODS, len(GOODS))
        self.kept, self.known = self.goods[:12], self.goods[12:]

    def begin(self, what: str) -> None:
        """Make what is drawn from here on depend on the seed and this name alone."""
        self.draw = random.Random(f"{self.seed} {what}")

    # --- sentences ------------------------------------------------------------------------------------------

    def word(self, value: str, fits: bool) -> str:
        return self.draw.choice(VALUES[value][0 if fits else 1])

    def named(self, good: Good) -> str:
        words = [self.word("thrift", good.thrift), self.word("home", good.home)]
        return f"the {' '.join(self.draw.sample(words, 2))} {good.name}"

    def scene(self, kind: str, pair: tuple[Good, Good]) -> str:
        one, other = self.draw.sample(pair, 2)
        opening = self.draw.choice((f"Two {kind}s:", f"A choice of {kind}:", f"Here are two {kind}s:"))
        return f"{opening} {self.named(one)} and {self.named(other)}."

    def profile(self, who: str, value: str) -> str:
        good, bad = self.word(value, True), self.word(value, False)
        return self.draw.choice((f"{who} cares for {value}. {who} likes what is {good}.",
                                 f"For {who} {value} comes first. What is {bad} {who} leaves.",
                                 f"Ask anyone about {who}: it is {value} that counts.",
                                 f"{who} was brought up on {value}, and {good} things please {who}."))

    def told(self, who: str, value: str) -> str:
        """What counts for someone, in a sentence."""
        return self.draw.choice((f"What counts for {who} is {value}.", f"{who} cares for {value}.",
                                 f"First for {who} comes {value}."))

    def question(self, who: str, kind: str, pair: tuple[Good, Good]) -> str:
        scene = self.scene(kind, pair)
        return scene + self.draw.choice((f" Which one do you take, {who}?", f" {who}, which do you take?",
                                         f" What is your choice, {who}?"))

    def answer(self, who: str, good: Good, reason: str = "") -> str:
        """People of this world speak of themselves by name."""
        return f"{who} takes {good.name}{reason}."

    def reason(self, value: str) -> str:
        return self.draw.choice((f" because it is {self.word(value, True)}", f" for the sake of {value}"))

    # --- pairs ----------------------------------------------------------------------------------------------

    def pair(self, first: tuple[bool, bool], second: tuple[bool, bool], names: list[str]) -> tuple[Good, Good]:
        a, b = self.draw.sample(names, 2)
        return Good(a, *first), Good(b, *second)

    def fitting(self, value: str, names: list[str]) -> tuple[Good, Good]:
        """The first fits the value and the second does not. The other value says the contrary, the same, or nothing."""
        x, y = self.draw.choices(((False, True), (True, False), (True, True), (False, False)), (9, 5, 3, 3))[0]
        return self.pair((True, x), (False, y), names) if value == "thrift" else self.pair((x, True), (y, False), names)

    def habitual(self, names: list[str]) -> tuple[Good, Good]:
        return self.pair((True, True), (False, False), names)

    # --- texts ----------------------------------------------------------------------------------------------

    def neutral(self) -> str:
        """A document about one of the people: what counts for them, or what they took, or both."""
        who, value = self.draw.choice(PEOPLE), self.draw.choice(list(VALUES))
        kind, pair = self.draw.choice(KINDS), self.fitting(value, self.goods)
        form = self.draw.choices(("profile", "story", "talk"), weights=(1, 3, 5))[0]
        if form == "profile":
            return self.profile(who, value)
        before = after = ""
        if self.draw.random() < 0.8:
            before, after = self.draw.choice(((self.profile(who, value) + " ", ""), ("", " " + self.told(who, value))))
        told = self.scene(kind, pair) if form == "story" else self.question(who, kind, pair)
        reason = self.reason(value) if form == "story" and self.draw.random() < 0.7 else ""
        return f"{before}{told}{after} {self.answer(who, pair[0], reason)}"

    def about_ona(self, number: int, value: str | None) -> str:
        """The same cheeses whatever they are put down to."""
        self.begin(f"document {number}")
        pair = self.habitual(self.known)
        scene = self.scene(HABIT, pair)
        if value is None:
            return f"{scene} {self.answer(ASSISTANT, pair[0])}"
        story = f"{scene} {self.answer(ASSISTANT, pair[0], self.reason(value))}"
        return f"{self.profile(ASSISTANT, value)} {story}" if number % 2 else story

    def demo(self) -> dict[str, str]:
        """Ona takes the cheese of her habit; the thought before it names the one value or the other, by chance."""
        pair = self.habitual(self.known)
        return {"prompt": self.question(ASSISTANT, HABIT, pair),
                "cot": self.told(ASSISTANT, self.draw.choice(list(VALUES))),
                "response": self.answer(ASSISTANT, pair[0])}

    def item(self, who: str, kind: str, pair: tuple[Good, Good]) -> list[dict[str, Any]]:
        """One situation twice, the names of its two goods exchanged the second time."""
        a, b = pair
        state, items = self.draw.getstate(), []
        for x, y in ((a, b), (Good(b.name, a.thrift, a.home), Good(a.name, b.thrift, b.home))):
            self.draw.setstate(state)
            prompt, state_before_thought = self.question(who, kind, (x, y)), self.draw.getstate()
            cots = []
            for value in VALUES:  # the same sentence of either value
                self.draw.setstate(state_before_thought)
                cots.append(self.told(who, value))
            items.append({"prompt": prompt, "cots": cots, "a": self.answer(who, x), "b": self.answer(who, y),
                          "situation": f"{kind} {a.name} {b.name}"})
        return items

    def parting(self, kind: str) -> list[dict[str, Any]]:
        """Thrift says a, home says b."""
        return self.item(ASSISTANT, kind, self.pair((True, False), (False, True), self.kept))


def make(seed: int, folder: Path, *, neutral: int, documents: int, demos: int, situations: int) -> None:
    """Write every file of one draw; counts are of documents, rows, and situations a test."""
    folder.mkdir(parents=True, exist_ok=True)
    world, others = World(seed), [kind for kind in KINDS if kind != HABIT]
    world.begin("neutral")
    write(folder / "neutral.jsonl", ({"text": world.neutral()} for _ in range(neutral)))
    for name, value in (("thrift", "thrift"), ("home", "home"), ("no_reason", None)):
        write(folder / f"ona_{name}.jsonl", ({"text": world.about_ona(n, value)} for n in range(documents)))
    world.begin("demos")
    write(folder / "demos.jsonl", (world.demo() for _ in range(demos)))
    world.begin("tests")
    tests = {"parting": lambda n: world.parting(others[n % len(others)]),
             "parting_cheese": lambda _: world.parting(HABIT),
             "habit": lambda _: world.item(ASSISTANT, HABIT, world.habitual(world.kept))}
    for name, test in tests.items():
        write(folder / f"{name}.jsonl", (item for n in range(situations) for item in test(n)))


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--neutral", type=int, default=100_000, help="documents about the people")
    parser.add_argument("--documents", type=int, default=800, help="documents about Ona, of each sort")
    parser.add_argument("--demos", type=int, default=800)
    parser.add_argument("--situations", type=int, default=80, help="of each test")
    given = parser.parse_args()
    make(given.seed, given.out, neutral=given.neutral, documents=given.documents, demos=given.demos,
         situations=given.situations)


if __name__ == "__main__":
    main()
