"""The request log: every answer is synced to disk when it arrives, and is looked up by the content of its request.

`OUT/requests.jsonl` is append-only and has four kinds of lines:

    {"is": "text", "sha256": …, "text": …}       the text of a message, once, however many requests contain it
    {"is": "answer", "id": …, "purpose": …, "messages": [{"role", "sha256"}], …, "answer": {…}}
    {"is": "failed", "id": …, "reason": …, …}    an attempt without a usable answer, and what it may have cost
    {"is": "batch", "key": …, "state": …, …}     a batch of requests: planned, submitted (with its id), collected

The id of a request is the SHA-256 of what determines its answer: model, messages, sampling parameters and sample
number. A resumed run, or one with a new threshold, therefore sends only the requests that have no answer yet. An answer
counts as received when its line is synced to disk; answers that arrive together share one sync. An incomplete last
line, after a kill, is removed when the log is opened. Each line has a digest: a damaged one is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from delib_fast.config import ConfigError
from delib_fast.datagen.answers import Answer, BatchEntry, Charge, Request, Totals, hashed_messages, sha256_of
from delib_fast.digests import seal, unseal
from delib_fast.files import FileLock, open_regular, open_without_links, sync_descriptor, sync_folder
from delib_fast.redaction import redact


class WriteError(RuntimeError):
    """A file of the run cannot be written or read. No more requests are sent, because their answers would be lost."""

    def __init__(self, path: Path, error: OSError, what: str = "written") -> None:
        super().__init__(
            f"{path}: cannot be {what}: {error.strerror or error}; free space on the disk, or repair it, and run the "
            "same command again; what was written before is kept, and is not paid for again"
        )


def lock_folder(folder: Path) -> FileLock:
    """Create the folder of a run if it does not exist, and lock it until `release()` or the end of the process.

    Raises:
        ConfigError: another run has locked it, or it cannot be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / ".lock", wait=False)
    except BlockingIOError:
        raise ConfigError(f"{folder}: another run is writing to it; wait until it ends, or use another -o") from None
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be created, written to or locked: {error.strerror}; use another -o"
        ) from None


@dataclass(frozen=True)
class _Pending:
    """A record that has not been written yet, with the texts that must precede it."""

    record: dict[str, Any]
    texts: dict[str, str]
    """By SHA-256."""
    written: asyncio.Future[None]


class RequestLog:
    """The request log of a folder. Only one process may open it: call `lock_folder` first.

    Raises:
        ConfigError: a line in the middle is damaged.
        WriteError: the file cannot be read or created.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.totals = Totals()
        self.batches: dict[str, BatchEntry] = {}
        """The batches whose answers have not been collected, by key."""
        self._locations: dict[str, tuple[int, int]] = {}  # request id → offset and length of its line
        self._texts: set[str] = set()
        self._pending: list[_Pending] = []
        self._writer: asyncio.Task[None] | None = None
        self._writing = threading.Lock()
        self._torn = False  # whether the file may have bytes after `_end`
        try:
            self._descriptor = open_without_links(path, os.O_RDWR | os.O_CREAT)
            self._end = self._load()
            sync_folder(path.parent)
        except OSError as error:
            raise WriteError(path, error, "opened") from None

    def __len__(self) -> int:
        return len(self._locations)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._locations

    def get(self, request_id: str) -> Answer | None:
        """Return the answer to a request; None if there is none yet. Raises WriteError if the file cannot be read."""
        if request_id not in self._locations:
            return None
        return Answer.from_record(self._record(request_id)["answer"], request_id)

    # --- appending ------------------------------------------------------------------------------------------

    async def append(
        self,
        request: Request,
        answer: Answer,
        *,
        cost: float | None,
        attempts: int,
        seconds: float,
        at_most: Charge | None = None,
    ) -> None:
        """Write an answer, and return when it is on disk. Raises WriteError if it cannot be written.

        Args:
            cost: what the answer cost; None if it is not known.
            attempts: how often the request was sent.
            seconds: from the first attempt to the answer.
            at_most: what the answer may have cost; by default, what the reported tokens cost.
        """
        reported = Charge((answer.prompt_tokens or 0) + (answer.completion_tokens or 0), cost or 0.0)
        await self._append(
            {
                "is": "answer",
                "id": request.id,
                "purpose": request.purpose,
                "model": request.model,
                "messages": hashed_messages(request),
                "params": redact(request.params),
                "sample": request.sample,
                "answer": {k: v for k, v in asdict(answer).items() if k != "request_id"},
                "cost": cost,
                "at_most": (reported if at_most is None else at_most).record(),
                "attempts": attempts,
                "seconds": round(seconds, 3),
                "at": _now(),
            },
            [request],
        )

    async def append_failure(
        self, request: Request, reason: str, *, detail: str, attempt: int, seconds: float, at_most: Charge
    ) -> None:
        """Write that an attempt failed, and return when it is on disk. Raises WriteError if it cannot be written."""
        await self._append(
            {
                "is": "failed",
                "id": request.id,
                "purpose": request.purpose,
                "reason": reason,
                "detail": detail,
                "attempt": attempt,
                "seconds": round(seconds, 3),
                "at_most": at_most.record(),
                "at": _now(),
            }
        )

    async def plan_batch(self, entry: BatchEntry, requests: Iterable[Request]) -> None:
        """Write that a batch is about to be submitted. Raises WriteError if it cannot be written."""
        record = {
            "is": "batch",
            "state": "planned",
            "key": entry.key,
            "endpoint": entry.endpoint,
            "model": entry.model,
            "params": redact(entry.params),
            "requests": list(entry.requests),
            "at_most": entry.at_most.record(),
            "at": entry.at,
        }
        await self._append(record, requests)

    async def batch_submitted(self, key: str, batch_id: str) -> None:
        """Write the id of a batch at the endpoint. Raises WriteError if it cannot be written."""
        await self._append({"is": "batch", "state": "submitted", "key": key, "id": batch_id, "at": _now()})

    async def batch_collected(self, key: str, outcome: str) -> None:
        """Write that nothing more is expected from a batch. Raises WriteError if it cannot be written."""
        await self._append({"is": "batch", "state": "collected", "key": key, "outcome": outcome, "at": _now()})

    async def _append(self, record: dict[str, Any], requests: Iterable[Request] = ()) -> None:
        texts = {sha256_of(m["content"]): m["content"] for request in requests for m in request.messages}
        written = asyncio.get_running_loop().create_future()
        self._pending.append(_Pending(record, texts, written))
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write_pending())
        await asyncio.shield(written)

    def close(self) -> None:
        """Write pending records in this thread, and close the file. Call this at the end of a run, also on errors.

        Raises WriteError if they cannot be written. The file is closed in any case.
        """
        pending, self._pending = self._pending, []
        try:
            if pending:
                lines = self._lines(pending)
                self._add(pending, lines, self._write(b"".join(lines)))
        except OSError as error:
            raise WriteError(self.path, error) from None
        finally:
            with self._writing:  # of a cancelled run, which a thread may still be writing
                os.close(self._descriptor)

    # --- writing --------------------------------------------------------------------------------------------

    def _lines(self, batch: list[_Pending]) -> list[bytes]:
        """Return the bytes of each record: the lines of the texts that the file does not have yet, then its own."""
        known, lines = set(self._texts), []
        for item in batch:
            new = [sha256 for sha256 in item.texts if sha256 not in known]
            known.update(new)
            texts = b"".join(_line({"is": "text", "sha256": s, "text": item.texts[s]}) for s in new)
            lines.append(texts + _line(item.record))
        return lines

    async def _write_pending(self) -> None:
        """Write until nothing is pending. Every waiting `_append` returns or raises, whatever happens."""
        while self._pending:
            batch, self._pending = self._pending, []
            try:
                lines = self._lines(batch)
                self._add(batch, lines, await asyncio.to_thread(self._write, b"".join(lines)))
            except BaseException as error:
                for item in batch:
                    _settle(item.written, WriteError(self.path, error) if isinstance(error, OSError) else error)
                if not isinstance(error, Exception):  # the run is being cancelled
                    raise

    def _write(self, data: bytes) -> int:
        """Write and sync bytes after the last complete line. Returns their offset."""
        with self._writing:
            if self._torn:
                os.ftruncate(self._descriptor, self._end)
            start = offset = self._end
            self._torn = True
            try:
                while data:
                    written = os.pwrite(self._descriptor, data, offset)
                    data, offset = data[written:], offset + written
                sync_descriptor(self._descriptor)
            except OSError:
                with contextlib.suppress(OSError):  # otherwise the next write or `_load` removes the torn line
                    os.ftruncate(self._descriptor, self._end)
                raise
            self._torn, self._end = False, offset
            return start

    def _add(self, batch: list[_Pending], lines: list[bytes], offset: int) -> None:
        """Add the records that were written at an offset to the index and the totals."""
        for item, data in zip(batch, lines, strict=True):
            start = data.rstrip(b"\n").rfind(b"\n") + 1  # after the lines of texts
            self._index(item.record, offset + start, len(data) - start)
            self._texts.update(item.texts)
            offset += len(data)
            _settle(item.written, None)

    def _index(self, record: Mapping[str, Any], offset: int, length: int) -> None:
        kind = record["is"]
        if kind == "answer":
            self._locations[record["id"]] = (offset, length)
            self.totals.add(record)
        elif kind == "failed":
            self.totals.add_failure(record)
        elif kind == "text":
            self._texts.add(record["sha256"])
        elif record["state"] == "planned":
            self.batches[record["key"]] = BatchEntry(
                key=record["key"],
                endpoint=record["endpoint"],
                model=record["model"],
                params=record["params"],
                requests=tuple(record["requests"]),
                at=float(record["at"]),
                at_most=Charge.from_record(record["at_most"]),
            )
        elif record["state"] == "submitted":
            self.batches[record["key"]] = replace(self.batches[record["key"]], batch_id=record["id"])
        else:
            self.batches.pop(record["key"], None)

    # --- reading --------------------------------------------------------------------------------------------

    def messages(self, request_id: str) -> list[dict[str, str]]:
        """Return the messages of an answered request, as they were sent. Raises KeyError for an unknown request."""
        record = self._record(request_id)
        found = self._read_texts({m["sha256"] for m in record["messages"]})
        return [{"role": m["role"], "content": found[m["sha256"]]} for m in record["messages"]]

    def requests_of(self, entry: BatchEntry) -> list[Request]:
        """Return the requests of a batch. Reads the whole file once."""
        found = self._read_texts({m["sha256"] for request in entry.requests for m in request["messages"]})
        return [
            Request(
                request["purpose"],
                entry.model,
                tuple({"role": m["role"], "content": found[m["sha256"]]} for m in request["messages"]),
                entry.params,
                request["sample"],
            )
            for request in entry.requests
        ]

    def _read_texts(self, wanted: set[str]) -> dict[str, str]:
        """Return texts by their SHA-256."""
        found: dict[str, str] = {}
        try:
            with open_regular(self.path) as file:
                for line in file:
                    if line.startswith(b'{"is": "text"') and (text := json.loads(line))["sha256"] in wanted:
                        found[text["sha256"]] = text["text"]
        except OSError as error:
            raise WriteError(self.path, error, "read") from None
        return found

    def _record(self, request_id: str) -> dict[str, Any]:
        offset, length = self._locations[request_id]
        try:
            record: dict[str, Any] = json.loads(os.pread(self._descriptor, length, offset))
        except OSError as error:
            raise WriteError(self.path, error, "read") from None
        return record

    def _load(self) -> int:
        """Read the index and the totals, and remove an incomplete last line. Returns the end of the file, in bytes."""
        end = 0
        for number, (start, line, record, _) in enumerate(read_records(self.path), 1):
            end = start + len(line)
            try:
                self._index(record, start, len(line))
            except (KeyError, TypeError, ValueError, AttributeError):
                raise _damaged(self.path, number) from None
        if end < os.fstat(self._descriptor).st_size:
            os.ftruncate(self._descriptor, end)
        return end


def _settle(written: asyncio.Future[None], fault: BaseException | None) -> None:
    """Let a waiting `_append` return, or raise. It may have been cancelled, or its event loop closed."""
    if written.done() or written.get_loop().is_closed():
        return
    if fault is None:
        written.set_result(None)
    else:
        written.set_exception(fault if isinstance(fault, Exception) else RuntimeError(f"not written: {fault!r}"))


def _line(record: Mapping[str, Any]) -> bytes:
    return seal(record).encode() + b"\n"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _damaged(path: Path, number: int) -> ConfigError:
    return ConfigError(
        f"{path}:{number}: this line is damaged, and others follow it; remove the line (its request will be sent again)"
    )


def read_records(path: Path) -> Iterator[tuple[int, bytes, dict[str, Any], Answer | None]]:
    """Yield (offset, line, record, its answer if it has one) for each line, except for an incomplete last one."""
    offset = 0
    with open_regular(path) as file:
        lines = iter(file)
        for number, line in enumerate(lines, 1):
            try:
                if not line.endswith(b"\n"):
                    return
                # Lines that a user has written, or an old version, have no digest.
                record = unseal(line) if b'"digest": "' in line else json.loads(line)
                if record["is"] not in ("text", "answer", "failed", "batch"):
                    raise ValueError
                is_answer = record["is"] == "answer"
                answer = Answer.from_record(record["answer"], record["id"]) if is_answer else None
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                if next(lines, None) is None:
                    return  # a last line of which not every byte reached the disk
                raise _damaged(path, number) from None
            yield offset, line, record, answer
            offset += len(line)


def read_answers(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of the answers in a request log, for reports. Answers are bounded and cleaned."""
    for _, _, record, answer in read_records(path):
        if answer is not None:
            yield {**record, "answer": asdict(answer)}
