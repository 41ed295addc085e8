"""Disks that fail for a moment or for good: the run ends with exit code 3 and the reason, and loses nothing that was
on disk."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from scripted_model import ScriptedModel, status

from delib_fast import files
from delib_fast.datagen import request_log, session
from delib_fast.datagen.answers import Answer, Charge, Request
from delib_fast.datagen.request_log import RequestLog, WriteError

HANG_S = 60.0


class FailingDisk:
    """Makes system calls of the request log fail with an errno, from the n-th call of `pwrite` or `fsync` on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, code: int, *, after: int, calls: tuple[str, ...]) -> None:
        self.code, self.left = code, after
        self.failing = False
        for name in calls:
            monkeypatch.setattr(request_log.os, name, self._wrapped(getattr(os, name), name))
        monkeypatch.setattr(session, "write_atomic", self._wrapped(files.write_atomic, "write_atomic"))

    def _wrapped(self, real, name):
        def call(*arguments):
            if name in ("pwrite", "fsync"):
                self.left -= 1
            self.failing = self.failing or self.left < 0
            if self.failing:
                raise OSError(self.code, os.strerror(self.code))
            return real(*arguments)

        return call


@pytest.fixture
def run(invoke: Callable[[str], tuple[int, str]]) -> Callable[[], tuple[int, str]]:
    """Run `deliberate` in this process. Returns the exit code and the output."""
    return lambda: invoke("deliberate spec.md prompts.txt -o out URL --model-name Quill")


EVERY_CALL = ("pwrite", "fsync", "ftruncate", "pread")


@pytest.mark.timeout(HANG_S)
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize(
    ("after", "what"),
    [
        (0, "requests.jsonl: cannot be opened"),
        (1, "settings.yaml: cannot be written"),
        (5, "requests.jsonl: cannot be written"),  # the line of an answer
        (6, "requests.jsonl: cannot be written"),  # its sync
        (9, "requests.jsonl: cannot be written"),
    ],
)
def test_a_disk_that_fails_for_good(code: int, after: int, what: str, run, model: ScriptedModel, monkeypatch) -> None:
    """Every later call fails too: the half-written line cannot be removed, and no summary can be written."""
    with monkeypatch.context() as patch:
        FailingDisk(patch, code, after=after, calls=EVERY_CALL)
        exit_code, output = run()
    assert exit_code == 3, output
    assert f"error: out/{what}: {os.strerror(code)}; free space on the disk" in output
    kept = RequestLog(Path("out/requests.jsonl"))
    assert all(kept.get(request_id) is not None for request_id in list(kept._locations))
    kept.close()
    exit_code, output = run()
    assert exit_code == 0, output
    assert "4 rows" in output or "2 rows" in output


@pytest.mark.timeout(HANG_S)
def test_the_first_error_is_reported(run, model: ScriptedModel, monkeypatch) -> None:
    """The key is rejected, and then the summary cannot be written: the message is about the key."""
    model.fault = lambda key, attempt, purpose, request: status(401)
    with monkeypatch.context() as patch:

        def full(path, data):
            if path.name == "summary.json":
                raise OSError(errno.ENOSPC, "No space left on device")
            return files.write_atomic(path, data)

        patch.setattr(session, "write_atomic", full)
        exit_code, output = run()
    assert exit_code == 3
    assert "rejects the key" in output


def request(content: str) -> Request:
    return Request("p", "m", ({"role": "user", "content": content},), {})


@pytest.mark.timeout(HANG_S)
def test_every_waiting_append_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that is not about the disk reaches every waiting request, too."""

    async def main() -> list[BaseException | None]:
        log = RequestLog(tmp_path / "r.jsonl")
        monkeypatch.setattr(log, "_write", lambda data: (_ for _ in ()).throw(MemoryError("no memory")))
        appends = [
            log.append(request(f"{i}"), Answer("a", "stop"), cost=None, attempts=1, seconds=0.0) for i in range(5)
        ]
        return await asyncio.gather(*appends, return_exceptions=True)

    assert [type(fault) for fault in asyncio.run(main())] == [MemoryError] * 5


def test_a_text_that_was_not_written_is_written_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first request that contains a text fails to be written; the second one brings the text along."""
    path = tmp_path / "r.jsonl"

    async def main() -> None:
        log = RequestLog(path)
        with monkeypatch.context() as patch:
            patch.setattr(request_log.os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "I/O")))
            with pytest.raises(WriteError, match="cannot be written: I/O"):
                await log.append(request("same"), Answer("a", "stop"), cost=None, attempts=1, seconds=0.0)
        later = Request("p", "m", request("same").messages, {}, sample=1)
        await log.append(later, Answer("b", "stop"), cost=None, attempts=1, seconds=0.0)
        assert log.messages(later.id) == [{"role": "user", "content": "same"}]
        log.close()

    asyncio.run(main())
    assert len(RequestLog(path)) == 1


def test_failures_and_their_cost_are_kept(tmp_path: Path) -> None:
    async def main() -> None:
        log = RequestLog(tmp_path / "r.jsonl")
        await log.append_failure(
            request("x"), "timeout", detail="late", attempt=1, seconds=0.5, at_most=Charge(10, 0.25)
        )
        log.close()

    asyncio.run(main())
    totals = RequestLog(tmp_path / "r.jsonl").totals
    assert (totals.answers, totals.failed, totals.at_most) == (0, {"timeout": 1}, Charge(10, 0.25))
