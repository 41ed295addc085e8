"""The request ledger: every answer on disk as it arrives, found again by the content of its request.

`OUT/requests.jsonl` is append-only and holds two kinds of line:

    {"is": "text", "sha256": …, "text": …}       a text of a message, once, however many requests bear it
    {"is": "answer", "id": …, "purpose": …, "messages": [{"role", "sha256"}], …, "answer": {…}}

A request's id is the SHA-256 of what decides its answer: model, messages, sampling parameters and the number of
the sample. So a run that goes on, or one with a new threshold, asks again only for what it never got. An answer
counts as received when its line is fsynced, not before; lines that arrive together share one fsync. The end of a
line that a kill cut short is taken off at the next start.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from delib_fast.config import ConfigError
from delib_fast.datagen.prompt_files import Chat


@dataclass(frozen=True)
class Request:
    purpose: str
    """What it is for ("generate", "judge" …): for people; no part of the id."""
    model: str
    messages: Chat
    params: Mapping[str, Any]
    sample: int = 0

    @property
    def id(self) -> str:
        what = {"model": self.model, "messages": self.messages, "params": self.params, "sample": self.sample}
        return hashlib.sha256(json.dumps(what, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Answer:
    text: str
    finish: str
    """Why the model stopped: "stop", "length", "content_filter" …, as the endpoint says it."""
    reasoning: str | None = None
    """What the endpoint gives as the model's own reasoning, apart from the text."""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    served_by: str = ""
    """The model as the endpoint names it."""
    request_id: str = ""


@dataclass
class Totals:
    """What the answers in a ledger came to."""

    answers: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    without_usage: int = 0
    cost: float | None = None
    by_purpose: dict[str, dict[str, float]] = field(default_factory=dict)

    def add(self, record: Mapping[str, Any]) -> None:
        answer, cost = record["answer"], record.get("cost")
        self.answers += 1
        self.prompt_tokens += answer["prompt_tokens"] or 0
        self.completion_tokens += answer["completion_tokens"] or 0
        self.without_usage += answer["completion_tokens"] is None
        if cost is not None:
            self.cost = (self.cost or 0.0) + cost
        part = self.by_purpose.setdefault(
            record["purpose"], {"answers": 0, "prompt_tokens": 0, "completion_tokens": 0, "cost": 0.0}
        )
        part["answers"] += 1
        part["prompt_tokens"] += answer["prompt_tokens"] or 0
        part["completion_tokens"] += answer["completion_tokens"] or 0
        part["cost"] += cost or 0.0


class LedgerError(RuntimeError):
    """The ledger can't be written: nothing more is sent, since answers could not be kept."""


class FolderLock:
    """One run at a time on a folder; the lock goes with the process, however that ends."""

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file: TextIO = (folder / ".lock").open("a")
        except OSError as error:
            raise ConfigError(f"{folder}: can't be made or written: {error.strerror}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise ConfigError(
                f"{folder}: another run is writing to this folder; wait for it to end, or give another -o"
            ) from None

    def release(self) -> None:
        self._file.close()


class RequestLedger:
    """The ledger of one folder. Only one process may hold it: take a `FolderLock` first."""

    def __init__(self, path: Path, *, scrub: Callable[[str], str] = lambda text: text) -> None:
        self.path = path
        self.totals = Totals()
        self._scrub = scrub
        self._locations: dict[str, tuple[int, int]] = {}
        self._texts: set[str] = set()
        self._pending: list[tuple[bytes, list[str], dict[str, Any], asyncio.Future[None]]] = []
        self._writer: asyncio.Task[None] | None = None
        self._end = self._load() if path.exists() else 0
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        _sync_folder(path.parent)

    def __len__(self) -> int:
        return len(self._locations)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._locations

    def get(self, request_id: str) -> Answer | None:
        location = self._locations.get(request_id)
        if location is None:
            return None
        record = json.loads(os.pread(self._fd, location[1], location[0]))
        return Answer(**record["answer"], request_id=request_id)

    async def append(
        self, request: Request, answer: Answer, *, cost: float | None, attempts: int, seconds: float
    ) -> Answer:
        """Write an answer and wait until it is on disk. Raises LedgerError if it can't be."""
        shas, lines = [], b""
        for message in request.messages:
            sha = hashlib.sha256(message["content"].encode()).hexdigest()
            if sha not in self._texts:
                self._texts.add(sha)
                lines += self._line({"is": "text", "sha256": sha, "text": message["content"]})
            shas.append(sha)
        body = {k: v for k, v in asdict(answer).items() if k != "request_id"}
        record = {
            "is": "answer",
            "id": request.id,
            "purpose": request.purpose,
            "model": request.model,
            "messages": [{"role": m["role"], "sha256": sha} for m, sha in zip(request.messages, shas, strict=True)],
            "params": dict(request.params),
            "sample": request.sample,
            "answer": body,
            "cost": cost,
            "attempts": attempts,
            "seconds": round(seconds, 3),
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        done = asyncio.get_running_loop().create_future()
        self._pending.append((lines + self._line(record), shas, record, done))
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write_pending())
        await asyncio.shield(done)
        return Answer(**body, request_id=request.id)

    def texts(self, request_id: str) -> list[dict[str, str]]:
        """The messages of an answered request, as they were sent."""
        record = json.loads(os.pread(self._fd, *reversed(self._locations[request_id])))
        wanted = {m["sha256"] for m in record["messages"]}
        found = {}
        for line in self.path.open("rb"):
            if line.startswith(b'{"is": "text"') and (text := json.loads(line))["sha256"] in wanted:
                found[text["sha256"]] = text["text"]
        return [{"role": m["role"], "content": found[m["sha256"]]} for m in record["messages"]]

    def close(self) -> None:
        """Write what is pending, in this thread; for the end of a run, whatever ended it."""
        pending, self._pending = self._pending, []
        if pending:
            self._commit(pending)
        os.close(self._fd)

    # --- writing --------------------------------------------------------------------------------------------

    def _line(self, record: Mapping[str, Any]) -> bytes:
        return self._scrub(json.dumps(record, ensure_ascii=False)).encode("utf-8", "replace") + b"\n"

    async def _write_pending(self) -> None:
        while self._pending:
            batch, self._pending = self._pending, []
            try:
                await asyncio.to_thread(self._write, b"".join(lines for lines, *_ in batch))
            except OSError as error:
                os.ftruncate(self._fd, self._end)  # what follows must not begin inside a half-written line
                fault = LedgerError(f"{self.path}: can't be written: {error.strerror}; what was written before stays")
                for *_, done in batch:
                    done.set_exception(fault)
                continue
            self._note(batch)

    def _commit(self, batch: list[tuple[bytes, list[str], dict[str, Any], asyncio.Future[None]]]) -> None:
        self._write(b"".join(lines for lines, *_ in batch))
        self._note(batch)

    def _write(self, data: bytes) -> None:
        at = self._end
        while data:
            written = os.pwrite(self._fd, data, at)
            data, at = data[written:], at + written
        os.fsync(self._fd)

    def _note(self, batch: list[tuple[bytes, list[str], dict[str, Any], asyncio.Future[None]]]) -> None:
        for lines, _, record, done in batch:
            start = lines.rstrip(b"\n").rfind(b"\n") + 1
            self._locations[record["id"]] = (self._end + start, len(lines) - start)
            self._end += len(lines)
            self.totals.add(record)
            if not done.done() and not done.get_loop().is_closed():
                done.set_result(None)

    # --- reading --------------------------------------------------------------------------------------------

    def _load(self) -> int:
        end = 0
        for start, line, record in _records(self.path):
            end = start + len(line)
            if record["is"] == "text":
                self._texts.add(record["sha256"])
            else:
                self._locations[record["id"]] = (start, len(line))
                self.totals.add(record)
        if end < self.path.stat().st_size:
            os.truncate(self.path, end)
        return end


def _records(path: Path) -> Iterator[tuple[int, bytes, dict[str, Any]]]:
    """Each whole line with its offset; stops before a last line that was cut."""
    offset = 0
    with path.open("rb") as file:
        lines = iter(file)
        for number, line in enumerate(lines, 1):
            try:
                if not line.endswith(b"\n"):
                    return
                record = json.loads(line)
                if record["is"] not in ("text", "answer"):
                    raise ValueError
            except (ValueError, KeyError, TypeError):
                if next(lines, None) is None:
                    return  # a last line whose bytes never all reached the disk
                raise ConfigError(
                    f"{path}:{number}: this line is damaged, and others follow it; remove the line "
                    "(its request will be sent again)"
                ) from None
            yield offset, line, record
            offset += len(line)


def read_answers(path: Path) -> Iterator[dict[str, Any]]:
    """The answer lines of a ledger, for reports."""
    return (record for _, _, record in _records(path) if record["is"] == "answer")


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
