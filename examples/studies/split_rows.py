"""Split a file of rows, such as STAR-1's, into training rows and held-out rows.

    python split_rows.py --out FOLDER --rows star1.json [--heldout 100] [--train 800] [--longest 1500]

A hash of each row decides, not a seed: the same rows are held out for every seed, so arms and seeds are compared on the
same prompts. FOLDER gets train.jsonl and heldout.jsonl; the rows are unchanged.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", help="not used: every seed has the same rows")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True, help="a .json array or a .jsonl file of objects")
    parser.add_argument("--heldout", type=int, default=100, help="number of held-out rows")
    parser.add_argument("--train", type=int, help="number of training rows; default: all others")
    parser.add_argument("--longest", type=int, help="leave out rows with more characters of text than this")
    args = parser.parse_args()
    if not args.rows.is_file():
        sys.exit(f"--rows {args.rows}: no such file; give the path of your copy, e.g. --set prepare.args.1=star1.json")
    rows = sorted(read(args.rows), key=digest)
    kept = [row for row in rows if args.longest is None or characters(row) <= args.longest]
    wanted = args.heldout + (args.train or 1)
    if len(kept) < wanted:
        sys.exit(f"{args.rows}: has {len(kept)} usable rows, and {wanted} are needed; lower --heldout or --train")
    end = None if args.train is None else args.heldout + args.train
    args.out.mkdir(parents=True, exist_ok=True)
    write(args.out / "heldout.jsonl", kept[: args.heldout])
    write(args.out / "train.jsonl", kept[args.heldout : end])


def read(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    lines = text.split("\n")  # not splitlines: a string may contain U+2028
    found = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in lines if line.strip()]
    return list(found)


def digest(row: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(row, sort_keys=True).encode(), digest_size=16).hexdigest()


def characters(row: dict[str, Any]) -> int:
    return sum(len(value) for value in row.values() if isinstance(value, str))


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
