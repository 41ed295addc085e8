"""The encode cache: the same examples come back, whoever is killed, whoever else starts, whatever was damaged."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from delib_fast.data import Example, TokenizedDataset
from delib_fast.data.encode.cache import cached, fingerprint_of

FINGERPRINT = fingerprint_of({"sha256": "of the rows"})


def examples(n=20):
    rng = np.random.default_rng(0)
    return [
        Example(rng.integers(0, 1000, k).astype(np.int32), rng.integers(0, 4, k).astype(np.int8), f"f:{k}", 0.5)
        for k in range(2, n + 2)
    ]


def make(counts, rows=None):
    for example in rows or examples():
        counts.rows += 1
        counts.add(example)
        yield example


def never(counts):
    raise AssertionError("encoded again")


def same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert np.array_equal(x.input_ids, y.input_ids)
        assert np.array_equal(x.segments, y.segments)
        assert (x.location, x.weight) == (y.location, y.weight)


def test_comes_back_the_same(tmp_path):
    made, hit = cached(tmp_path, FINGERPRINT, make)
    again, hit_again = cached(tmp_path, FINGERPRINT, never)
    assert (hit, hit_again) == (False, True)
    same(made, examples())
    same(again, examples())
    assert again.counts == TokenizedDataset(examples()).counts
    assert np.array_equal(again.target_counts, TokenizedDataset(examples()).target_counts)
    assert again.digest() == TokenizedDataset(examples()).digest()
    assert not list(tmp_path.rglob("*.part"))


def test_tokens_are_mapped_and_not_read(tmp_path):
    made = cached(tmp_path, FINGERPRINT, make)[0]
    for array in made.parts[0]:
        assert not array.flags.owndata
        assert not array.flags.writeable


def test_another_fingerprint_is_another_entry(tmp_path):
    cached(tmp_path, FINGERPRINT, make)
    other, hit = cached(tmp_path, fingerprint_of({"sha256": "of others"}), lambda c: make(c, examples(3)))
    assert not hit
    assert len(other) == 3


@pytest.mark.parametrize("name", ["tokens.arrow", "examples.arrow"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "empty"])
def test_damage_is_seen_and_made_good(tmp_path, name, damage):
    cached(tmp_path, FINGERPRINT, make)
    file = tmp_path / FINGERPRINT[:2] / FINGERPRINT / name
    data = bytearray(file.read_bytes())
    if damage == "flip":
        lengths = np.array([len(e) for e in examples()], np.int64)
        values = (examples()[0].input_ids if name == "tokens.arrow" else lengths).tobytes()
        data[data.index(values)] ^= 1
        file.write_bytes(data)
    elif damage == "remove":
        file.unlink()
    else:
        file.write_bytes(data[: len(data) // 2] if damage == "cut" else b"")
    found, hit = cached(tmp_path, FINGERPRINT, make)
    assert not hit
    same(found, examples())
    assert cached(tmp_path, FINGERPRINT, never)[1]


def test_a_fault_while_encoding_leaves_nothing(tmp_path):
    def fails(counts):
        yield examples()[0]
        raise ValueError("a bad row")

    with pytest.raises(ValueError, match="a bad row"):
        cached(tmp_path, FINGERPRINT, fails)
    assert [p.suffix for p in tmp_path.rglob("*") if p.is_file()] == [".lock"]
    assert not cached(tmp_path, FINGERPRINT, make)[1]


WORKER = """
import sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_cache import FINGERPRINT, cached, examples
def slowly(counts):
    print("began", flush=True)
    for example in examples():
        counts.rows += 1
        counts.add(example)
        yield example
        time.sleep({pause})
found, hit = cached(Path({folder!r}), FINGERPRINT, slowly)
print("hit" if hit else "made", len(found), flush=True)
"""


def start(folder, pause):
    tests = os.path.dirname(__file__)
    return subprocess.Popen(
        [sys.executable, "-c", WORKER.format(tests=tests, folder=str(folder), pause=pause)],
        stdout=subprocess.PIPE,
        text=True,
    )


def test_killed_half_way(tmp_path):
    worker = start(tmp_path, 0.5)
    assert worker.stdout.readline() == "began\n"
    time.sleep(0.6)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    assert list(tmp_path.rglob("*.part"))
    found, hit = cached(tmp_path, FINGERPRINT, make)
    assert not hit
    same(found, examples())
    assert not list(tmp_path.rglob("*.part"))


def test_of_two_at_once_one_encodes(tmp_path):
    workers = [start(tmp_path, 0.05) for _ in range(2)]
    said = sorted(worker.communicate(timeout=60)[0].split("\n")[-2] for worker in workers)
    assert said == ["hit 20", "made 20"]


def test_tokens_are_hashed_once(tmp_path, monkeypatch):
    """A checkpoint asks for the digest each time it is written."""
    found = cached(tmp_path, FINGERPRINT, make)[0]
    joined = TokenizedDataset.join([found, found.take(np.arange(3))])
    before = joined.digest()
    monkeypatch.setattr("delib_fast.data.encode.tokenized_dataset._digest_of", lambda part: pytest.fail("read again"))
    assert joined.digest() == before
    assert found.take(np.arange(2)).digest() != found.digest()
