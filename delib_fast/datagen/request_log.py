"""The request log: every answer is synced to disk when it arrives, and is looked up by the content of its request.

`OUT/requests.jsonl` is append-only and has two kinds of lines:

    {"is": "text", "sha256": …, "text": …}       the text of a message, once, however many requests contain it
    {"is": "answer", "id": …, "purpose": …, "messages": [{"role", "sha256"}], …, "answer": {…}}

The id of a request is the SHA-256 of what determines its answer: model, messages, sampling parameters and sample
number. A resumed run, or one with a new threshold, therefore sends only the requests that have no answer yet. An answer
counts as received when its line is synced to disk; answers that arrive together share one sync. An incomplete last
line, after a kill, is removed when the log is opened.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from delib_fast.config import ConfigError
from delib_fast.datagen.prompt_files import Chat
from delib_fast.files import FileLock, sync_descriptor, sync_folder


@dataclass(frozen=True)
class Request:
    """A chat, the model that answers it, and the sampling parameters."""

    purpose: str
    """What the answer is for ("generate", "judge" …). Informational: not part of the id."""
    model: str
    messages: Chat
    params: Mapping[str, Any]
    """Sampling parameters, with the names that the endpoint expects."""
    sample: int = 0
    """Requests that differ only in this number are answered independently."""

    @property
    def id(self) -> str:
        content = {"model": self.model, "messages": self.messages, "params": self.params, "sample": self.sample}
        return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Answer:
    """The answer of a model."""

    text: str
    finish: str
    """Why the model stopped, as the endpoint reports it: "stop", "length", "content_filter" …"""
    reasoning: str | None = None
    """The model's own reasoning, if the endpoint returns it separately from the text."""
    prompt_tokens: int | None = None
    """None if the endpoint does not report it."""
    completion_tokens: int | None = None
    served_by: str = ""
    """The model's name as the endpoint reports it."""
    request_id: str = ""

    @property
    def truncated(self) -> bool:
        """Whether the answer was cut off at the token limit."""
        return self.finish in ("length", "max_tokens")


@dataclass
class Totals:
    """Sums over the answers of a log."""

    answers: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    without_usage: int = 0
    """Answers whose tokens the endpoint did not report."""
    cost: float | None = None
    by_purpose: dict[str, dict[str, float]] = field(default_factory=dict)

    def add(self, record: Mapping[str, Any]) -> None:
        """Add an answer, given its record in the log."""
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


class RequestLogError(RuntimeError):
    """The log cannot be written. No more requests are sent, because their answers would be lost."""


def lock_folder(folder: Path) -> FileLock:
    """Create the folder of a run if it does not exist, and lock it until `release()` or the end of the process.

    Raises:
        ConfigError: another run has locked it, or it cannot be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / ".lock", wait=False)
    except BlockingIOError:
        raise ConfigError(
            f"{folder}: another run is writing to this folder; wait until it ends, or use another -o"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be created, written to or locked: {error.strerror}; use another -o"
        ) from None


@dataclass(frozen=True)
class _Pending:
    """An answer that has not been written yet."""

    lines: bytes
    """The lines of new texts, followed by the line of the answer."""
    record: dict[str, Any]
    written: asyncio.Future[None]


class RequestLog:
    """The request log of a folder. Only one process may open it: call `lock_folder` first.

    Args:
        scrub: removes secrets from each line before it is written.
    """

    def __init__(self, path: Path, *, scrub: Callable[[str], str] = lambda text: text) -> None:
        self.path = path
        self.totals = Totals()
        self._scrub = scrub
        self._locations: dict[str, tuple[int, int]] = {}  # request id → offset and length of its line
        self._texts: set[str] = set()
        self._pending: list[_Pending] = []
        self._writer: asyncio.Task[None] | None = None
        self._end = self._load() if path.exists() else 0
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        sync_folder(path.parent)

    def __len__(self) -> int:
        return len(self._locations)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._locations

    def get(self, request_id: str) -> Answer | None:
        """Return the answer to a request; None if there is none yet."""
        if request_id not in self._locations:
            return None
        return Answer(**self._record(request_id)["answer"], request_id=request_id)

    async def append(
        self, request: Request, answer: Answer, *, cost: float | None, attempts: int, seconds: float
    ) -> None:
        """Write an answer, and return when it is on disk. Raises RequestLogError if it cannot be written."""
        hashes, lines = [], b""
        for message in request.messages:
            sha256 = hashlib.sha256(message["content"].encode()).hexdigest()
            if sha256 not in self._texts:
                self._texts.add(sha256)
                lines += self._line({"is": "text", "sha256": sha256, "text": message["content"]})
            hashes.append(sha256)
        record = {
            "is": "answer",
            "id": request.id,
            "purpose": request.purpose,
            "model": request.model,
            "messages": [
                {"role": m["role"], "sha256": sha256} for m, sha256 in zip(request.messages, hashes, strict=True)
            ],
            "params": dict(request.params),
            "sample": request.sample,
            "answer": {k: v for k, v in asdict(answer).items() if k != "request_id"},
            "cost": cost,
            "attempts": attempts,
            "seconds": round(seconds, 3),
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        written = asyncio.get_running_loop().create_future()
        self._pending.append(_Pending(lines + self._line(record), record, written))
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write_pending())
        await asyncio.shield(written)

    def messages(self, request_id: str) -> list[dict[str, str]]:
        """Return the messages of an answered request, as they were sent. Raises KeyError for an unknown request."""
        record = self._record(request_id)
        wanted = {m["sha256"] for m in record["messages"]}
        found = {}
        with self.path.open("rb") as file:
            for line in file:
                if line.startswith(b'{"is": "text"') and (text := json.loads(line))["sha256"] in wanted:
                    found[text["sha256"]] = text["text"]
        return [{"role": m["role"], "content": found[m["sha256"]]} for m in record["messages"]]

    def close(self) -> None:
        """Write pending answers in this thread, and close the file. Call this at the end of a run, also on errors."""
        pending, self._pending = self._pending, []
        if pending:
            self._write(b"".join(item.lines for item in pending))
            self._add(pending)
        os.close(self._descriptor)

    # --- writing --------------------------------------------------------------------------------------------

    def _line(self, record: Mapping[str, Any]) -> bytes:
        return self._scrub(json.dumps(record, ensure_ascii=False)).encode("utf-8", "replace") + b"\n"

    async def _write_pending(self) -> None:
        while self._pending:
            batch, self._pending = self._pending, []
            try:
                await asyncio.to_thread(self._write, b"".join(item.lines for item in batch))
            except OSError as error:
                os.ftruncate(self._descriptor, self._end)  # the next line must not begin inside a half-written one
                fault = RequestLogError(
                    f"{self.path}: cannot be written: {error.strerror}; what was written before is kept"
                )
                for item in batch:
                    item.written.set_exception(fault)
                continue
            self._add(batch)

    def _write(self, data: bytes) -> None:
        offset = self._end
        while data:
            written = os.pwrite(self._descriptor, data, offset)
            data, offset = data[written:], offset + written
        sync_descriptor(self._descriptor)

    def _add(self, batch: list[_Pending]) -> None:
        """Add written answers to the index and the totals."""
        for item in batch:
            start = item.lines.rstrip(b"\n").rfind(b"\n") + 1  # after the lines of texts
            self._locations[item.record["id"]] = (self._end + start, len(item.lines) - start)
            self._end += len(item.lines)
            self.totals.add(item.record)
            if not item.written.done() and not item.written.get_loop().is_closed():
                item.written.set_result(None)

    # --- reading --------------------------------------------------------------------------------------------

    def _record(self, request_id: str) -> dict[str, Any]:
        offset, length = self._locations[request_id]
        record: dict[str, Any] = json.loads(os.pread(self._descriptor, length, offset))
        return record

    def _load(self) -> int:
        """Read the index and the totals, and remove an incomplete last line. Returns the end of the file, in bytes."""
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
    """Yield (offset, line, record) for each line, except for an incomplete last one."""
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
                    return  # a last line of which not every byte reached the disk
                raise ConfigError(
                    f"{path}:{number}: this line is damaged, and others follow it; remove the line (its request will "
                    "be sent again)"
                ) from None
            yield offset, line, record
            offset += len(line)


def read_answers(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of the answers in a request log, for reports."""
    return (record for _, _, record in _records(path) if record["is"] == "answer")
