"""The encoding cache: the same examples are returned after a kill, a concurrent start, or damage on the disk."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from helpers.chat_oracle import chat
from helpers.chat_tokenizers import tokenizer

from delib_fast.config import ConfigError
from delib_fast.data import Example, TokenizedDataset, encode_rows, encode_stream
from delib_fast.data.disk_cache import cache_folder, cache_key, cached_json
from delib_fast.data.encode.cache import cached_dataset
from delib_fast.data.encode.tokenized_dataset import TokenArrays

KEY = cache_key({"sha256": "of the rows"})


def examples(n=20):
    rng = np.random.default_rng(0)
    return [
        Example(rng.integers(0, 1000, k).astype(np.int32), rng.integers(0, 4, k).astype(np.int8), f"f:{k}", 0.5)
        for k in range(2, n + 2)
    ]


def encoded(n=20):
    """What `encode_stream` yields for n rows."""
    return ([example] for example in examples(n))


def never_started():
    """Encoded rows for a call that must find the entry in the cache."""
    pytest.fail("encoded again")
    yield []


def assert_same(found, expected):
    assert len(found) == len(expected)
    for x, y in zip(found, expected, strict=True):
        assert np.array_equal(x.input_ids, y.input_ids)
        assert np.array_equal(x.segments, y.segments)
        assert (x.location, x.weight) == (y.location, y.weight)


def temporary_folders(folder):
    return list(folder.rglob(".*.writing-*"))


def test_a_stored_dataset_equals_the_encoded_one(tmp_path):
    written = cached_dataset(tmp_path, KEY, encoded())
    again = cached_dataset(tmp_path, KEY, never_started())
    assert_same(written, examples())
    assert_same(again, examples())
    assert again.counts == TokenizedDataset(examples()).counts
    assert np.array_equal(again.target_counts, TokenizedDataset(examples()).target_counts)
    assert again.digest() == TokenizedDataset(examples()).digest()
    assert not temporary_folders(tmp_path)


def test_tokens_are_memory_mapped(tmp_path):
    for array in cached_dataset(tmp_path, KEY, encoded()).arrays[0]:
        assert not array.flags.owndata
        assert not array.flags.writeable


def test_another_key_is_another_entry(tmp_path):
    cached_dataset(tmp_path, KEY, encoded())
    assert len(cached_dataset(tmp_path, cache_key({"sha256": "of other rows"}), encoded(3))) == 3


@pytest.mark.parametrize("name", ["tokens.arrow", "examples.arrow"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "empty"])
def test_a_damaged_entry_is_encoded_again(tmp_path, name, damage):
    cached_dataset(tmp_path, KEY, encoded())
    file = tmp_path / KEY[:2] / KEY / name
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
    rows = encoded()
    assert_same(cached_dataset(tmp_path, KEY, rows), examples())
    assert next(rows, None) is None  # the rows were encoded
    cached_dataset(tmp_path, KEY, never_started())


def test_an_error_while_encoding_leaves_no_entry(tmp_path):
    def fails():
        yield [examples()[0]]
        raise ValueError("a bad row")

    with pytest.raises(ValueError, match="a bad row"):
        cached_dataset(tmp_path, KEY, fails())
    assert [p.suffix for p in tmp_path.rglob("*") if p.is_file()] == [".lock"]
    assert_same(cached_dataset(tmp_path, KEY, encoded()), examples())


def test_counts_include_dropped_and_split_rows(tmp_path):
    whole = examples(3)
    found = cached_dataset(tmp_path, KEY, iter([whole[:1], [], whole[1:]]))
    assert_same(found, whole)
    assert (found.counts.rows, found.counts.dropped_over_long, found.counts.split_documents) == (3, 1, 1)


WORKER = """
import sys, time
sys.path[:0] = [{tests!r}, {helpers!r}]
from pathlib import Path
from test_cache import KEY, cached_dataset, examples
encoded_here = []
def slowly():
    print("began", flush=True)
    for example in examples():
        encoded_here.append(example)
        yield [example]
        print("wrote", flush=True)
        time.sleep({pause})
found = cached_dataset(Path({folder!r}), KEY, slowly())
print("encoded" if encoded_here else "found", len(found), flush=True)
"""


def start(folder, pause):
    tests = os.path.dirname(__file__)
    code = WORKER.format(tests=tests, helpers=os.path.dirname(tests), folder=str(folder), pause=pause)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_a_killed_process_leaves_no_entry(tmp_path):
    worker = start(tmp_path, 0.5)
    assert [worker.stdout.readline() for _ in range(2)] == ["began\n", "wrote\n"]
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    assert temporary_folders(tmp_path)
    rows = encoded()
    assert_same(cached_dataset(tmp_path, KEY, rows), examples())
    assert next(rows, None) is None  # the rows were encoded
    assert not temporary_folders(tmp_path)


def test_only_one_of_two_concurrent_processes_encodes(tmp_path):
    workers = [start(tmp_path, 0.05) for _ in range(2)]
    output = sorted(worker.communicate(timeout=900)[0].split("\n")[-2] for worker in workers)
    assert output == ["encoded 20", "found 20"]


def test_tokens_are_hashed_once(tmp_path, monkeypatch):
    """A checkpoint needs the digest each time it is written."""
    found = cached_dataset(tmp_path, KEY, encoded())
    joined = TokenizedDataset.join([found, found.take(np.arange(3))])
    before = joined.digest()
    monkeypatch.setattr(TokenArrays, "digest", lambda self: pytest.fail("read again"))
    assert joined.digest() == before
    assert found.take(np.arange(2)).digest() != found.digest()


def test_the_cache_stores_everything_about_the_examples(tmp_path, monkeypatch):
    monkeypatch.setattr("delib_fast.data.encode.cache._LOCATIONS_PER_CHUNK", 3)
    question = "a long question of many words, word after word, more than sixteen tokens " * 2
    rows = [chat(question, "c", f"r {i}") for i in range(8)]
    found = cached_dataset(tmp_path, KEY, encode_stream(rows, tokenizer("qwen3"), pack_capacity=2048))
    fresh = encode_rows(rows, tokenizer("qwen3"), pack_capacity=2048)
    for name in ("lengths", "weights", "target_counts", "prompt_keys"):
        assert np.array_equal(getattr(found, name), getattr(fresh, name)), name
    assert [found.location(i) for i in range(8)] == [fresh.location(i) for i in range(8)]
    assert found.digest() == fresh.digest()
    assert found.counts == fresh.counts
    assert len(set(found.prompt_keys[:, 1])) == 1


# --- the cache folder ---------------------------------------------------------------------------------------


def test_cached_json_is_computed_once(tmp_path):
    assert cached_json(tmp_path / "new", "key", lambda: {"n": 1}) == {"n": 1}
    assert cached_json(tmp_path / "new", "key", lambda: pytest.fail("computed again")) == {"n": 1}
    (tmp_path / "new" / "key.json").write_text("{")
    assert cached_json(tmp_path / "new", "key", lambda: {"n": 2}) == {"n": 2}


def test_a_cache_folder_that_cannot_be_used_is_a_config_error(tmp_path, monkeypatch):
    monkeypatch.setenv("DELIB_FAST_CACHE", str(tmp_path / "env"))
    with cache_folder(None) as folder:
        assert folder == tmp_path / "env"
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigError, match=r"cache_dir: .*file cannot be used: .*; set cache_dir or \$DELIB_FAST_CACHE"),
        cache_folder(str(tmp_path / "file")) as folder,
    ):
        cached_json(folder, "key", dict)
