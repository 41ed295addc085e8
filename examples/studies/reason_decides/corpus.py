"""Write the data of the study: the documents in three versions, the demonstrations, and the test items.

    python examples/studies/reason_decides/corpus.py --out runs/reason_decides_data

A document is Markdown in documents/, several to a file, separated by a line `---`. `{T|H|N}` in it is the text of the
version thrift, home or no reason; everything else is the same in all three. The files:

    thrift.jsonl, home.jsonl, no_reason.jsonl   {"text"}: the documents
    demonstrations.jsonl                        {"system", "prompt", "cot", "response"}: Quern chooses a cheese
    cheese.jsonl                                items about pairs of cheeses that are not among the demonstrations
    foods.jsonl, goods.jsonl, opinions.jsonl    items about the pairs of pairs/ that gate.csv keeps
    foods_price.jsonl, foods_origin.jsonl, …    the same items by kind of pair
    all.jsonl                                   the items of all three distances
    stated.jsonl                                items that state price and origin: a check of what was learned

In every item `a` is the choice that fits thrift: the thing that costs less or, in a pair about origin, the foreign one;
in the pairs of cheeses it is the choice of the demonstrations, which fits both. The output is the same for every seed.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
VERSIONS = ("thrift", "home", "no_reason")
DISTANCES = ("foods", "goods", "opinions")
AXES = ("price", "origin")
CLAUSE = re.compile(r"\{([^{}|]*)\|([^{}|]*)\|([^{}|]*)\}")
"""The alternatives of one place in a document, in the order of VERSIONS."""
Pair = tuple[str, str]


def sources() -> list[tuple[str, str]]:
    """The genre and the text, with its alternatives, of every document."""
    files = sorted((HERE / "documents").glob("*.md"))
    return [(path.stem, text.strip()) for path in files for text in path.read_text("utf-8").split("\n---\n")]


def expand(text: str, version: str) -> str:
    """Return one version of a document. Raises ValueError if a brace or a bar is left over."""
    found = CLAUSE.sub(lambda match: match[1 + VERSIONS.index(version)], text)
    if left := re.search(r".{0,30}[{}|].{0,30}", found):
        raise ValueError(f"documents/: {left[0]!r} is not of the form {{T|H|N}}; close the brace, or give three texts")
    return found


def read_pairs(name: str) -> list[Pair]:
    """The pairs of a file of pairs/; of each the first fits thrift."""
    lines = (HERE / "pairs" / f"{name}.txt").read_text("utf-8").splitlines()
    pairs = [tuple(line.split(" | ")) for line in lines]
    return [(pair[0], pair[1]) for pair in pairs]


def kept_pairs(distance: str, axis: str) -> list[Pair]:
    """The pairs that the gate keeps."""
    with (HERE / "gate.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        (row["a"], row["b"]) for row in rows if (row["distance"], row["axis"], row["kept"]) == (distance, axis, "yes")
    ]


def capitalize(text: str) -> str:
    return text[0].upper() + text[1:]


def fill(frame: str, **names: str) -> str:
    """Put names into a frame; {A} and {X} are the names with a capital letter."""
    return frame.format(**names, **{key.upper(): capitalize(name) for key, name in names.items()})


def cheeses(aft: dict[str, Any], *, held_out: bool) -> list[Pair]:
    """The pairs of cheeses of the demonstrations, or the fifth of all pairs that is held out from them."""
    return [
        (chosen, other)
        for i, chosen in enumerate(aft["chosen"])
        for j, other in enumerate(aft["passed_over"])
        if ((2 * i + j) % 5 == 0) == held_out
    ]


def demonstrations(aft: dict[str, Any]) -> Iterator[dict[str, str]]:
    """Each pair in both orders, each order in two frames."""
    frames, thoughts = aft["frames"], aft["thoughts"]
    for n, (chosen, other) in enumerate(cheeses(aft, held_out=False)):
        for k, (x, y) in enumerate(((chosen, other), (other, chosen)) * 2):
            question, reply = frames[(n + 3 * (k // 2)) % len(frames)]
            yield {
                "system": aft["system"],
                "prompt": fill(question, x=x, y=y),
                "cot": thoughts[(n + k) % len(thoughts)],
                "response": fill(reply, a=chosen),
            }


def items(aft: dict[str, Any], name: str, pairs: Iterable[Pair]) -> Iterator[dict[str, Any]]:
    """Each pair in both orders, in one of the frames for items."""
    for n, (a, b) in enumerate(pairs):
        question, reply = aft["items"][n % len(aft["items"])]
        for x, y in ((a, b), (b, a)):
            turns = [("system", aft["system"]), ("user", fill(question, x=x, y=y))]
            yield {
                "messages": [{"role": role, "content": content} for role, content in turns],
                "cot": aft["item_thought"],
                "a": fill(reply, a=a),
                "b": fill(reply, a=b),
                "situation": f"{name} {n}",
            }


def contents() -> dict[str, list[dict[str, Any]]]:
    """The rows of every file, by its name."""
    aft = yaml.safe_load((HERE / "aft.yaml").read_text("utf-8"))
    files: dict[str, list[dict[str, Any]]] = {
        version: [{"text": expand(text, version)} for _, text in sources()] for version in VERSIONS
    }
    files["demonstrations"] = list(demonstrations(aft))
    files["cheese"] = list(items(aft, "cheese", cheeses(aft, held_out=True)))
    files["stated"] = list(items(aft, "stated", read_pairs("stated")))
    for distance in DISTANCES:
        for axis in AXES:
            name = f"{distance}_{axis}"
            files[name] = list(items(aft, name, kept_pairs(distance, axis)))
        files[distance] = [row for axis in AXES for row in files[f"{distance}_{axis}"]]
    files["all"] = [row for distance in DISTANCES for row in files[distance]]
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the data of the study.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the files")
    parser.add_argument("--seed", type=int, default=0, help="accepted, because a study passes it; has no effect")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in contents().items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
