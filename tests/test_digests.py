"""JSON with a digest, and hashes of files that are computed once."""

from __future__ import annotations

import json
import math
import os

import pytest

from delib_fast import digests
from delib_fast.data.disk_cache import cache_folder
from delib_fast.digests import (
    DamagedError,
    append_json_line,
    hash_file_once,
    hash_files,
    hash_tree,
    read_json,
    read_json_lines,
    seal,
    unseal,
    write_json,
)

CONTENT = {"a": 1.5, "b": [True, None, "x\n\u2028é"], "c": {"d": -1e-300, "10": math.nan}, "e": (1, 2), 3: "key"}


def test_round_trip(tmp_path):
    write_json(tmp_path / "a", CONTENT)
    found = read_json(tmp_path / "a")
    assert found.keys() == {"a", "b", "c", "e", "3"}
    assert found["b"] == CONTENT["b"]
    assert found["e"] == [1, 2]
    assert math.isnan(found["c"]["10"])
    assert unseal(seal({"a": "\udcff"})) == {"a": "?"}, "what UTF-8 cannot encode does not look like damage"


def test_every_flipped_bit_is_found_or_changes_nothing():
    text = seal(CONTENT, indent=1).encode()
    expected, harmless = json.dumps(unseal(text)), 0
    for bit in range(8 * len(text)):
        data = bytearray(text)
        data[bit // 8] ^= 1 << bit % 8
        try:
            assert json.dumps(unseal(bytes(data))) == expected
            harmless += 1
        except DamagedError:
            continue
    assert harmless < 100, "white space, and the letter of an exponent"


@pytest.mark.parametrize("text", [b"", b"[]", b"null", b"{}", b'{"a": 1}', b"\xff", b"[" * 100_000, b'{"digest": 3}'])
def test_what_is_not_sealed_is_damaged(text):
    with pytest.raises(DamagedError):
        unseal(text)


def test_lines(tmp_path):
    for n in range(4):
        append_json_line(tmp_path / "a", {"n": n})
    lines = (tmp_path / "a").read_bytes().splitlines(keepends=True)
    (tmp_path / "a").write_bytes(b"".join([lines[0], lines[1].replace(b'"n": 1', b'"n": 7'), *lines[2:]])[:-5])
    assert read_json_lines(tmp_path / "a") == ([{"n": 0}, {"n": 2}], [2, 4])
    append_json_line(tmp_path / "a", {"n": 4})
    assert read_json_lines(tmp_path / "a") == ([{"n": 0}, {"n": 2}, {"n": 4}], [2, 4])


# --- hashes -------------------------------------------------------------------------------------------------


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A file large enough to be remembered, last changed a minute ago, and the list of the files that are read."""
    monkeypatch.setenv("DELIB_FAST_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "weights"
    path.write_bytes(bytes(2 << 20))
    reads, plain = [], digests.hash_file
    monkeypatch.setattr(digests, "hash_file", lambda p: (reads.append(p.name), plain(p))[1])
    age = [60.0]
    now = digests.time.time_ns
    monkeypatch.setattr(digests.time, "time_ns", lambda: now() + int(age[0] * 1e9))
    return path, reads, age


def test_a_file_is_hashed_once(large):
    path, reads, _ = large
    assert hash_file_once(path) == hash_file_once(path) == hash_files(path.parent)["weights"]
    assert reads == ["weights"]
    hash_tree(str(path))
    assert reads == ["weights"]


def test_a_change_that_keeps_size_and_mtime_is_found(large):
    path, reads, _ = large
    before, state = hash_file_once(path), path.stat()
    with path.open("r+b") as file:
        file.write(b"\1")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (state.st_size, state.st_mtime_ns)
    assert hash_file_once(path) != before
    assert len(reads) == 2


def test_a_file_in_the_place_of_another_is_found(large):
    path, _, _ = large
    before, state = hash_file_once(path), path.stat()
    other = path.with_name("other")
    other.write_bytes(b"\1" + bytes((2 << 20) - 1))
    os.utime(other, ns=(state.st_atime_ns, state.st_mtime_ns))
    other.rename(path)
    assert hash_file_once(path) != before


def test_a_file_that_has_just_changed_is_not_remembered(large):
    """Another change within the resolution of the clock would keep its time stamps."""
    path, reads, age = large
    age[0] = 0.0
    hash_file_once(path)
    hash_file_once(path)
    assert len(reads) == 2
    age[0] = -60.0  # the clock of the file server is ahead
    hash_file_once(path)
    hash_file_once(path)
    assert len(reads) == 4


def test_hashes_are_kept_in_the_cache_folder_of_everything_else(tmp_path, monkeypatch):
    """Catches a folder named `~` in the working directory."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("~/kept", "$HOME/kept", "${HOME}/kept"):
        monkeypatch.setenv("DELIB_FAST_CACHE", value)
        with cache_folder(None) as folder:
            assert digests.default_cache_folder() == folder == tmp_path / "kept"
    monkeypatch.delenv("DELIB_FAST_CACHE")
    with cache_folder(None) as folder:
        assert digests.default_cache_folder() == folder == tmp_path / ".cache" / "delib_fast"


def test_a_damaged_memory_is_not_believed(large, tmp_path):
    path, reads, _ = large
    right = hash_file_once(path)
    (record,) = (tmp_path / "cache" / "hashes").iterdir()
    record.write_text(record.read_text().replace(right, right[::-1]))
    assert hash_file_once(path) == right
    assert len(reads) == 2
    record.unlink()
    record.mkdir()  # nothing can be remembered
    assert hash_file_once(path) == right
