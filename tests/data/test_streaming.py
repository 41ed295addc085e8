"""Datasets larger than memory: the rows of a large file are read again in each pass, and never all in memory."""

import json
import subprocess
import sys
import threading
import time

import pytest
from helpers.chat_oracle import chat
from helpers.chat_tokenizers import tokenizer

from delib_fast.config import SourceConfig
from delib_fast.data import DataError, SourceReader, encode_stream, load_source
from delib_fast.data.encode.encoder import encoder_for
from delib_fast.data.prefetch import prefetch
from delib_fast.data.progress import log_progress
from delib_fast.data.read import source_cache


def write(path, n=40, start=0):
    rows = [{"prompt": f"p {i}", "cot": "c" * (i % 7), "response": f"r {i}"} for i in range(start, start + n)]
    path.write_text(
        "".join(json.dumps(row) + "\n" for row in rows[:30])
        + "{}\n"
        + "".join(json.dumps(row) + "\n" for row in rows[30:])
    )
    return SourceConfig(path=str(path), holdout=0.3, on_bad_row="skip")


def test_a_streamed_source_equals_one_in_memory(tmp_path, monkeypatch):
    config = write(tmp_path / "rows.jsonl")
    in_memory = load_source("s", config, tmp_path / "cache")
    monkeypatch.setattr(source_cache, "MAX_BYTES_IN_MEMORY", 0)
    streamed = load_source("s", config, tmp_path / "cache")
    assert list(streamed.train_rows()) == list(streamed.train_rows()) == list(in_memory.train_rows())
    assert streamed.num_train == in_memory.num_train == len(list(in_memory.train_rows()))
    assert streamed.held_out == in_memory.held_out
    assert (streamed.sha256, streamed.bad_rows) == (in_memory.sha256, in_memory.bad_rows) != (in_memory.sha256, {})

    # The result of the first pass is cached: the next start decodes no row.
    monkeypatch.setattr(SourceReader, "__iter__", lambda self: pytest.fail("read again"))
    again = load_source("s", config, tmp_path / "cache")
    assert (again.num_train, again.held_out) == (in_memory.num_train, in_memory.held_out)
    assert again.bad_rows == in_memory.bad_rows
    with pytest.raises(pytest.fail.Exception):
        again.train_rows()  # not in memory


def test_a_file_that_changes_between_two_passes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(source_cache, "MAX_BYTES_IN_MEMORY", 0)
    config = write(tmp_path / "rows.jsonl")
    source = load_source("s", config, tmp_path / "cache")
    write(tmp_path / "rows.jsonl", start=1)
    with pytest.raises(DataError, match=r"rows\.jsonl: changed while it was being read \(source 's'\)"):
        list(source.train_rows())


def test_prefetched_items_keep_their_order_and_errors_their_position():
    assert list(prefetch(range(100), 3)) == list(range(100))
    computed = []

    def items():
        for i in range(5):
            computed.append((i, threading.current_thread().name))
            yield i
        raise DataError("bad", reason="x")

    prefetched = prefetch(items(), 2)
    assert next(prefetched) == 0
    while len(computed) < 2:  # without being asked for
        time.sleep(0.001)
    assert computed[0][1].startswith("prefetch")
    with pytest.raises(DataError, match="bad"):
        list(prefetched)
    unfinished = prefetch(iter(range(10)), 1)
    next(unfinished)
    unfinished.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]


def test_progress_is_printed_on_stderr(capsys):
    assert list(log_progress("abcd", 4, "encoding rows", every_s=0)) == list("abcd")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"encoding rows: {n} of 4 rows" for n in (1, 2, 3)]


def test_the_tokenizer_uses_its_own_threads():
    rows = [chat("a question " * 50, "a thought " * 300, "an answer " * 50)] * 64
    encoder = encoder_for(tokenizer("qwen3"))
    filled = ["\n".join(row.texts) for row in rows]
    whole, own = time.process_time(), time.thread_time()
    encoder.control.encode_batch(filled)
    whole, own = time.process_time() - whole, time.thread_time() - own
    assert own < 0.8 * whole


def test_an_error_in_a_later_chunk_is_raised_after_the_earlier_chunks(monkeypatch):
    monkeypatch.setattr("delib_fast.data.encode.stream._CHUNK_ROWS", 2)
    rows = [chat("p", None, "r")] * 5 + [chat("p", "only a thought", "")]
    stream = encode_stream(rows, tokenizer("qwen3"), pack_capacity=2048, cot="strip")
    found = []
    with pytest.raises(DataError, match="there is nothing to train on"):
        found.extend(stream)
    assert len(found) == 4


WORKER = """
import resource, sys
import numpy as np
from pathlib import Path
from delib_fast.config import SourceConfig
from delib_fast.data import Example, encode_stream, find_overlap
from delib_fast.data.encode import stream
from delib_fast.data.encode.cache import cached_dataset
from delib_fast.data.read import source_cache

class Encoder:  # a token for every fourth byte: a real tokenizer needs little memory for a chunk, but much time
    def encode(self, rows, **_):
        sizes = [len(row.text) // 4 for row in rows]
        return [Example(np.zeros(n, np.int32), np.full(n, 3, np.int8), r.location) for r, n in zip(rows, sizes)]

stream.encoder_for = lambda _: Encoder()
source_cache.MAX_BYTES_IN_MEMORY = {limit}
data = int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_DATA, (data + ({extra} << 20),) * 2)
source = source_cache.load_source("s", SourceConfig(path={path!r}, holdout=0.01), Path({folder!r}))
find_overlap(source.train_rows(), source.held_out)
encoded = encode_stream(source.train_rows(), None, pack_capacity=1 << 15)
found = cached_dataset(Path({folder!r}), "0" * 64, encoded)
print(len(found), found.counts.tokens)
"""


@pytest.mark.slow
def test_memory_grows_with_a_chunk_and_not_with_the_file(tmp_path):
    """96 MB of rows are read, checked and encoded with 72 MiB of memory: streamed they fit, in memory they do not."""
    path, row = tmp_path / "rows.jsonl", "abcdefghijklmno " * (1 << 12)
    with path.open("w") as file:
        for i in range(1500):
            file.write(f'{{"text": "{i} {row}"}}\n')

    def run(limit):
        code = WORKER.format(path=str(path), folder=str(tmp_path / f"cache{limit}"), limit=limit, extra=72)
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    streamed, in_memory = run(0), run(1 << 40)
    assert streamed.returncode == 0, streamed.stderr
    assert int(streamed.stdout.split()[1]) > 22e6
    assert in_memory.returncode != 0
    assert "MemoryError" in in_memory.stderr
