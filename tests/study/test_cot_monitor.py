"""The study of the monitor in examples/studies: its file, and how it splits rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from delib_fast.study import load_study
from delib_fast.study.plan import arms_of
from delib_fast.study.summary import find_arm

STUDIES = Path(__file__).parents[2] / "examples/studies"


def test_its_contrasts_name_its_arms():
    study = load_study(STUDIES / "cot_monitor.yaml")
    arms = arms_of(study)
    assert [arm.label for arm in arms] == [
        "base",
        "AFT (no CoT)",
        "AFT (CoT × 0)",
        "AFT (CoT × 0.3)",
        "AFT (CoT)",
        "AFT (CoT only)",
    ]
    for contrast in study.contrasts:
        assert find_arm(contrast.a, arms) != find_arm(contrast.b, arms)


def split(folder, rows, *args):
    source = folder / "rows.json"
    source.write_text(json.dumps(rows))
    command = [sys.executable, str(STUDIES / "split_rows.py"), "--rows", str(source), "--out", str(folder), *args]
    done = subprocess.run(command, capture_output=True, text=True)
    parts = [folder / "train.jsonl", folder / "heldout.jsonl"]
    return done, [[json.loads(line) for line in p.read_text().split("\n")[:-1]] if p.exists() else [] for p in parts]


def test_rows_are_split_by_their_hash(tmp_path):
    rows = [{"question": f"q{k}", "response": "x" * k, "n": k} for k in range(40)]
    done, (train, heldout) = split(tmp_path, rows, "--heldout", "5", "--train", "20", "--longest", "32", "--seed", "1")
    assert done.returncode == 0, done.stderr
    assert (len(train), len(heldout)) == (20, 5)
    chosen = [row["n"] for row in (*train, *heldout)]
    assert len(set(chosen)) == 25
    assert max(chosen) <= 30, "of at most 32 characters: a question of 2 or 3 and a response of n"
    _, again = split(tmp_path, rows[::-1], "--heldout", "5", "--train", "20", "--longest", "32", "--seed", "2")
    assert again == [train, heldout], "neither the order of the file nor the seed decides"
    _, (rest, _) = split(tmp_path, rows, "--heldout", "5")
    assert len(rest) == 35


def test_lines_of_a_jsonl_file_may_contain_line_separators(tmp_path):
    """`str.splitlines` cuts a JSON string at U+2028 and U+0085."""
    rows = [{"question": f"a\u2028b\u0085{k}"} for k in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    done, (train, heldout) = split(tmp_path, [], "--rows", str(tmp_path / "rows.jsonl"), "--heldout", "1")
    assert done.returncode == 0, done.stderr
    assert (len(train), len(heldout)) == (2, 1)
    assert sorted(row["question"] for row in (*train, *heldout)) == [row["question"] for row in rows]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--heldout", "4"), "has 3 usable rows, and 5 are needed; lower --heldout or --train"),
        (("--rows", "none.json"), "--rows none.json: no such file"),
    ],
)
def test_a_split_that_is_not_possible_is_refused(tmp_path, args, message):
    done, parts = split(tmp_path, [{"question": str(k)} for k in range(3)], *args)
    assert done.returncode == 1
    assert message in done.stderr
    assert parts == [[], []]
