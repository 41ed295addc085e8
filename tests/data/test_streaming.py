"""Data sets larger than memory: the rows of a large file are read anew in each pass, and never all held."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from chat_oracle import chat
from tokenizers_for_tests import tokenizer

from delib_fast.config import AFTConfig, SourceConfig
from delib_fast.data import Counts, DataError, TokenizedDataset, encode_stream
from delib_fast.data.encode.encoder import encoder_for
from delib_fast.data.prefetch import prefetch
from delib_fast.data.read import source_cache as opened
from delib_fast.data.read.source_cache import load_source
from delib_fast.data.read.sources import SourceStream


def write(path, n=40, start=0):
    rows = [{"prompt": f"p {i}", "cot": "c" * (i % 7), "response": f"r {i}"} for i in range(start, start + n)]
    path.write_text(
        "".join(json.dumps(row) + "\n" for row in rows[:30])
        + "{}\n"
        + "".join(json.dumps(row) + "\n" for row in rows[30:])
    )
    return SourceConfig(path=str(path), holdout=0.3, on_bad_row="skip")


def test_a_streamed_source_is_the_held_one(tmp_path, monkeypatch):
    config = write(tmp_path / "rows.jsonl")
    held = load_source("s", config, tmp_path / "cache")
    monkeypatch.setattr(opened, "HELD_BYTES", 0)
    streamed = load_source("s", config, tmp_path / "cache")
    assert not isinstance(streamed.train, list)
    assert list(streamed.train) == list(streamed.train) == held.train
    assert len(streamed.train) == len(held.train)
    assert list(streamed.held_out) == held.held_out
    assert (streamed.sha256, streamed.bad_rows) == (held.sha256, held.bad_rows) != (held.sha256, {})

    # what the first pass told is remembered: the next start reads no row
    monkeypatch.setattr(SourceStream, "__iter__", lambda self: pytest.fail("read again"))
    again = load_source("s", config, tmp_path / "cache")
    assert (len(again.train), again.held_out, again.bad_rows) == (len(held.train), held.held_out, held.bad_rows)


def test_a_file_that_changes_between_two_passes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(opened, "HELD_BYTES", 0)
    config = write(tmp_path / "rows.jsonl")
    source = load_source("s", config, tmp_path / "cache")
    write(tmp_path / "rows.jsonl", start=1)
    with pytest.raises(DataError, match=r"rows\.jsonl: was changed while it was being read \(source 's'\)"):
        list(source.train)


def test_things_made_ahead_come_in_order_and_errors_in_their_place():
    assert list(prefetch(range(100), 3)) == list(range(100))
    made = []

    def items():
        for i in range(5):
            made.append((i, threading.current_thread().name))
            yield i
        raise DataError("bad", reason="x")

    taken = prefetch(items(), 2)
    assert next(taken) == 0
    time.sleep(0.05)
    assert len(made) >= 2
    assert made[0][1].startswith("ahead")
    with pytest.raises(DataError, match="bad"):
        list(taken)
    left = prefetch(iter(range(10)), 1)
    next(left)
    left.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("ahead")]


def test_encoding_uses_other_threads_than_its_own():
    rows = [chat("a question " * 50, "a thought " * 300, "an answer " * 50)] * 64
    encoder = encoder_for(tokenizer("qwen3"))
    filled = [encoder._text(row, "train", None)[0] for row in rows]
    whole, own = time.process_time(), time.thread_time()
    encoder.control.encode_batch(filled)
    whole, own = time.process_time() - whole, time.thread_time() - own
    assert own < 0.8 * whole


def test_a_row_that_fails_in_a_later_chunk_is_told(monkeypatch):
    monkeypatch.setattr("delib_fast.data.encode._CHUNK_ROWS", 2)
    rows = [chat("p", None, "r")] * 5 + [chat("p", "only a thought", "")]
    stream = encode_stream(rows, tokenizer("qwen3"), AFTConfig(train=["s"], cot="strip"), Counts())
    seen = []
    with pytest.raises(DataError, match="there is nothing to supervise"):
        seen.extend(stream)
    assert len(seen) == 4


WORKER = """
import resource, sys
sys.path.insert(0, {tests!r})
import numpy as np
from pathlib import Path
from tokenizers_for_tests import tokenizer
from delib_fast.config import AFTConfig, SourceConfig
from delib_fast.data import Example, encode, encode_stream, find_overlap, opened
from delib_fast.data.cache import cached

class Encoder:  # a token every fourth byte: the tokenizer's own memory is that of a chunk, and its time is long
    def encode(self, rows, **_):
        sizes = [len(row.text) // 4 for row in rows]
        return [Example(np.zeros(n, np.int32), np.full(n, 3, np.int8), r.place) for r, n in zip(rows, sizes)]

encode.encoder_for = lambda _: Encoder()
opened.HELD_BYTES = {held}
data = int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_DATA, (data + ({extra} << 20),) * 2)
source = opened.open_source("s", SourceConfig(path={path!r}, holdout=0.01), Path({folder!r}))
find_overlap(source.train, source.held_out)
stage = AFTConfig(train=["s"], pack_capacity=1 << 15, tokens_per_step=1 << 15)
found, _ = cached(Path({folder!r}), "0" * 64, lambda counts: encode_stream(source.train, None, stage, counts))
print(len(found), found.counts.tokens)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_memory_is_that_of_a_chunk_and_not_of_the_file(tmp_path, name):
    """96 MB of rows through scan, guard and encoding with 72 MiB of memory: held they don't fit, streamed they do."""
    path, row = tmp_path / name, "abcdefghijklmno " * (1 << 12)
    before, between, after = ("[", ",\n", "]") if name.endswith(".json") else ("", "\n", "\n")
    with path.open("w") as file:
        for i in range(1500):
            file.write(f'{between if i else before}{{"text": "{i} {row}"}}')
        file.write(after)

    def run(held):
        code = WORKER.format(
            tests=str(Path(__file__).parent), path=str(path), folder=str(tmp_path / f"cache{held}"), held=held, extra=72
        )
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    streamed, held = run(0), run(1 << 40)
    assert streamed.returncode == 0, streamed.stderr
    assert int(streamed.stdout.split()[1]) > 22e6
    assert held.returncode != 0
    assert "MemoryError" in held.stderr


def test_the_cache_keeps_what_the_examples_say(tmp_path, monkeypatch):
    from delib_fast.data.encode.cache import cached

    monkeypatch.setattr("delib_fast.data.encode.cache._PLACES_AT_ONCE", 3)
    rows = [
        chat("a long question of many words, word after word, more than sixteen tokens " * 2, "c", f"r {i}")
        for i in range(8)
    ]
    stage, tok = AFTConfig(train=["s"]), tokenizer("qwen3")
    found, _ = cached(tmp_path, "1" * 64, lambda counts: encode_stream(rows, tok, stage, counts))
    fresh = TokenizedDataset(list(encode_stream(rows, tok, stage, Counts())))
    for name in ("lengths", "weights", "target_counts", "prompts"):
        assert np.array_equal(getattr(found, name), getattr(fresh, name)), name
    assert list(found.locations) == fresh.locations
    assert found.digest() == fresh.digest()
    assert len(set(found.prompts[:, 1])) == 1
