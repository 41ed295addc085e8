"""The request log: answers on disk are kept, an incomplete last line is removed, and equal requests are one."""

from __future__ import annotations

import asyncio
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from delib_fast.config import ConfigError
from delib_fast.datagen import request_log as log_module
from delib_fast.datagen.request_log import Answer, Request, RequestLog, WriteError, lock_folder

ANSWER = Answer("tëxt\u2028with\nlines", "stop", "thoughts", 5, 7, "served")


def request(content: str = "hello", **changes: Any) -> Request:
    chat = ({"role": "system", "content": "the spec"}, {"role": "user", "content": content})
    return Request(**{"purpose": "p", "model": "m", "messages": chat, "params": {"temperature": 1.0}, **changes})


def write(path: Path, *requests: Request, answer: Answer = ANSWER, cost: float | None = None) -> None:
    async def main() -> None:
        log = RequestLog(path)
        await asyncio.gather(*(log.append(r, answer, cost=cost, attempts=1, seconds=0.1) for r in requests))
        log.close()

    asyncio.run(main())


def test_written_answers_are_found_again(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    requests = [request(f"{i}") for i in range(50)]
    write(path, *requests, cost=0.5)
    log = RequestLog(path)
    assert len(log) == 50
    for one in requests:
        found = log.get(one.id)
        assert found is not None
        assert (found.text, found.reasoning, found.completion_tokens) == (ANSWER.text, "thoughts", 7)
        assert found.request_id == one.id
        assert log.messages(one.id) == list(one.messages)
    assert (log.totals.answers, log.totals.completion_tokens, log.totals.cost) == (50, 350, 25.0)
    assert path.read_text().count("the spec") == 1, "a text that every request contains is written once"


def test_id_depends_on_the_content(tmp_path: Path) -> None:
    base = request()
    assert request(purpose="another").id == base.id, "the purpose does not change the answer"
    different = [request("other"), request(model="n"), request(params={"temperature": 0.5}), request(sample=1)]
    assert len({r.id for r in (base, *different)}) == 5


@pytest.mark.parametrize("cut", [1, 2, 40, 200])
def test_incomplete_last_line_is_removed(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    first, last = request("first"), request("last")
    write(path, first)
    whole = path.read_bytes()
    write(path, last)
    path.write_bytes(path.read_bytes()[:-cut])
    log = RequestLog(path)
    assert first.id in log
    assert last.id not in log
    assert path.read_bytes().startswith(whole)
    assert path.read_bytes().endswith(b"\n")
    log.close()
    write(path, last)
    assert last.id in RequestLog(path)


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_truncated_log_keeps_every_whole_line(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """A log that is truncated at any byte opens, has every answer before that byte, and accepts new ones."""
    path = tmp_path_factory.mktemp("cut") / "r.jsonl"
    requests = [request(f"{i} ü") for i in range(4)]
    for one in requests:
        write(path, one)
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:at])
    expected = {json.loads(line)["id"] for line in whole[:at].split(b"\n")[:-1] if b'"is": "answer"' in line}
    log = RequestLog(path)
    assert {r.id for r in requests if r.id in log} == expected
    log.close()
    write(path, *[r for r in requests if r.id not in expected])
    log = RequestLog(path)
    assert all(log.messages(r.id) == list(r.messages) for r in requests)


def test_damaged_last_line_is_removed_and_one_in_the_middle_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    write(path, request("a"))
    good = path.read_bytes()
    path.write_bytes(good + b"\0\0\0\0\n")
    assert len(RequestLog(path)) == 1
    assert path.read_bytes() == good
    path.write_bytes(b"{half\n" + good)
    with pytest.raises(ConfigError, match=r"r\.jsonl:1: this line is damaged"):
        RequestLog(path)


def test_full_disk_stops_the_run_and_keeps_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.jsonl"
    write(path, request("kept"))
    size = path.stat().st_size
    real = os.pwrite

    def full(fd: int, data: bytes, at: int) -> int:
        if at > size:
            raise OSError(28, "No space left on device")
        return real(fd, data[: len(data) // 2], at)  # half of it still fits

    async def main() -> None:
        log = RequestLog(path)
        monkeypatch.setattr(log_module.os, "pwrite", full)
        with pytest.raises(WriteError, match="No space left"):
            await log.append(request("lost"), ANSWER, cost=None, attempts=1, seconds=0)
        monkeypatch.setattr(log_module.os, "pwrite", real)
        await log.append(request("later"), ANSWER, cost=None, attempts=1, seconds=0)
        log.close()

    asyncio.run(main())
    log = RequestLog(path)
    assert [request(c).id in log for c in ("kept", "lost", "later")] == [True, False, True]


def test_append_returns_when_the_answer_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """append returns after the fsync of its line; answers that arrive together share one."""
    synced: list[int] = []
    real = os.fsync
    path = tmp_path / "r.jsonl"

    def fsync(fd: int) -> None:
        real(fd)
        synced.append(path.stat().st_size)

    async def main() -> None:
        log = RequestLog(path)
        monkeypatch.setattr(log_module.os, "fsync", fsync)

        async def one(i: int) -> None:
            await log.append(request(f"{i}"), ANSWER, cost=None, attempts=1, seconds=0)
            location = log._locations[request(f"{i}").id]
            assert synced[-1] >= sum(location)

        await asyncio.gather(*map(one, range(100)))
        assert len(synced) < 20
        log.close()

    asyncio.run(main())


def test_second_run_on_a_folder_is_refused(tmp_path: Path) -> None:
    lock = lock_folder(tmp_path / "out")
    with pytest.raises(ConfigError, match="another run is writing to it"):
        lock_folder(tmp_path / "out")
    lock.release()
    lock_folder(tmp_path / "out").release()


def test_every_flipped_bit_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    """In every line but the last: an answer that was changed on disk is never used."""
    path = tmp_path / "r.jsonl"
    first = request("first")
    write(path, first)
    lines = len(path.read_bytes())
    write(path, request("last"))
    whole = path.read_bytes()
    log = RequestLog(path)
    expected = log.get(first.id), log.messages(first.id), log.totals
    log.close()
    refused = 0
    for bit in random.Random(0).sample(range(8 * lines), 400):
        path.write_bytes(whole[: bit // 8] + bytes([whole[bit // 8] ^ 1 << bit % 8]) + whole[bit // 8 + 1 :])
        try:
            log = RequestLog(path)
        except ConfigError:
            refused += 1
        else:
            assert (log.get(first.id), log.messages(first.id), log.totals) == expected
            log.close()
    assert refused > 380


def test_lines_without_a_digest_are_read(tmp_path: Path) -> None:
    """Those of an old version, and those that a user has appended."""
    path = tmp_path / "r.jsonl"
    write(path, request("first"))
    records = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert all(record.pop("digest") for record in records)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert request("first").id in RequestLog(path)


def test_links_and_pipes_are_refused(tmp_path: Path) -> None:
    """The file of a link is not changed, and a named pipe is not waited for."""
    other, path = tmp_path / "other.txt", tmp_path / "r.jsonl"
    other.write_text("a file of the user")
    path.symlink_to(other)
    with pytest.raises(WriteError, match=r"r\.jsonl: cannot be opened"):
        RequestLog(path)
    assert other.read_text() == "a file of the user"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(WriteError, match=r"r\.jsonl: cannot be opened: is a named pipe, not a regular file"):
        RequestLog(path)
