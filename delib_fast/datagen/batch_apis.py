"""The batch endpoints of OpenAI and Anthropic, which cost half the price of single requests.

Both take a list of requests, each with a `custom_id`, and return a file of results within 24 hours. A batch is found
again by its key: OpenAI stores it in the batch's metadata, and with Anthropic it is the beginning of every custom_id.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from delib_fast.datagen.answers import Answer, BatchEntry, Request
from delib_fast.datagen.backends import EndpointError, RequestRejected, Retry, describe
from delib_fast.datagen.dialects import decode
from delib_fast.datagen.endpoints import Connection

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}")
_METADATA = "delib_fast_batch"
_CLOCKS_DIFFER_S = 26 * 3600.0  # a batch that was created earlier than this before its plan is another one
_MOST_PAGES = 1000
_S_PER_LINE = 0.05  # added to the deadline of a file, for each of its lines

Receive = Callable[[Mapping[str, Any]], Awaitable[None]]


@dataclass(frozen=True)
class BatchState:
    """A batch that has ended."""

    files: tuple[str, ...] = ()
    """Paths of the files of results."""
    fault: str | None = None
    """Why none of its requests was processed."""


class BatchApi(Protocol):
    """The batches of one endpoint. Every method raises Retry, RequestRejected or EndpointError."""

    max_requests: int
    max_bytes: int

    async def create(self, key: str, requests: Sequence[Request]) -> str:
        """Submit a batch. Returns its id."""

    async def find(self, entry: BatchEntry, known: frozenset[str], pause_s: float) -> str | None:
        """Return the id of a batch that was planned, if it was created. `known`: ids of other batches."""

    async def state(self, batch_id: str) -> BatchState | None:
        """Return the state of a batch if it has ended, otherwise None."""

    def outcome(self, line: Mapping[str, Any]) -> Answer:
        """Return the answer in a line of results. Raises Retry or RequestRejected if the request failed."""


def custom_id(key: str, request: Request) -> str:
    """Return the id of a request in a batch: at most 64 letters, digits and underscores."""
    return f"{key}_{request.id}"


async def read_results(connection: Connection, path: str, count: int, receive: Receive) -> None:
    """Pass each line of a file of results to `receive`. Lines that are not JSON objects are skipped.

    Args:
        count: number of requests in the batch; the file cannot have many more lines.
    """

    async def one(line: bytes) -> None:
        if line.strip():
            try:
                record = decode(line)
            except Retry:
                return
            await receive(record)

    deadline = connection.settings.timeout_s + _S_PER_LINE * count
    reply = await connection.http.lines(path, one, max_lines=2 * count + 16, deadline_s=deadline)
    if reply.status >= 400:
        raise connection.status_error(reply, path)


class OpenAIBatches:
    """OpenAI's Batch API: upload a file of requests, create a batch, poll it, read its files of results."""

    max_requests, max_bytes = 50_000, 100 * 2**20

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def create(self, key: str, requests: Sequence[Request]) -> str:
        lines = (
            {
                "custom_id": custom_id(key, request),
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": self._connection.dialect.body(request),
            }
            for request in requests
        )
        content = "".join(json.dumps(line) + "\n" for line in lines).encode()
        uploaded = await self._connection.json(
            "POST",
            "files",
            data={"purpose": "batch"},
            files={"file": (f"{key}.jsonl", content, "application/jsonl")},
        )
        created = await self._connection.json(
            "POST",
            "batches",
            json={
                "input_file_id": _id(uploaded.get("id")),
                "endpoint": "/v1/chat/completions",
                "completion_window": "24h",
                "metadata": {_METADATA: key},
            },
            headers={"Idempotency-Key": key},
        )
        return _id(created.get("id"))

    async def find(self, entry: BatchEntry, known: frozenset[str], pause_s: float) -> str | None:
        async for batch in _listed(self._connection, "batches", "after"):
            created = batch.get("created_at")
            if isinstance(created, int | float) and created < entry.at - _CLOCKS_DIFFER_S:
                return None
            metadata = batch.get("metadata")
            if isinstance(metadata, dict) and metadata.get(_METADATA) == entry.key:
                return _id(batch.get("id"))
        return None

    async def state(self, batch_id: str) -> BatchState | None:
        batch = await self._connection.json("GET", f"batches/{batch_id}")
        status = batch.get("status")
        if status == "failed":
            return BatchState(fault=describe(_first_error(batch.get("errors"))))
        if status not in ("completed", "expired", "cancelled"):
            return None
        names = [batch.get("output_file_id"), batch.get("error_file_id")]
        return BatchState(files=tuple(f"files/{_id(name)}/content" for name in names if name))

    def outcome(self, line: Mapping[str, Any]) -> Answer:
        response, error = line.get("response"), line.get("error")
        if isinstance(response, dict) and isinstance(body := response.get("body"), dict):
            status = response.get("status_code")
            if status == 200:
                return self._connection.parse(body, "batches")
            if isinstance(status, int) and 400 <= status < 500 and status not in (408, 409, 425, 429):
                raise RequestRejected(f"HTTP {status}: {describe(json.dumps(body))}")
        raise Retry("batch_error", detail=describe(json.dumps(error)))


class AnthropicBatches:
    """Anthropic's Message Batches: create a batch, poll it, read its results."""

    max_requests, max_bytes = 100_000, 128 * 2**20

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def create(self, key: str, requests: Sequence[Request]) -> str:
        body = {
            "requests": [
                {"custom_id": custom_id(key, request), "params": self._connection.dialect.body(request)}
                for request in requests
            ]
        }
        created = await self._connection.json("POST", "messages/batches", json=body, headers={"Idempotency-Key": key})
        return _id(created.get("id"))

    async def find(self, entry: BatchEntry, known: frozenset[str], pause_s: float) -> str | None:
        """A list does not show the custom_ids, so every batch that may be the one is waited for and read."""
        async for batch in _listed(self._connection, "messages/batches", "after_id"):
            if _timestamp(batch.get("created_at")) < entry.at - _CLOCKS_DIFFER_S:
                return None
            counts = batch.get("request_counts")
            numbers = counts.values() if isinstance(counts, dict) else ()
            if sum(n for n in numbers if isinstance(n, int)) != len(entry.requests) or batch.get("id") in known:
                continue
            batch_id = _id(batch.get("id"))
            while (state := await self.state(batch_id)) is None:
                await asyncio.sleep(pause_s)
            if await self._has(state, entry):
                return batch_id
        return None

    async def _has(self, state: BatchState, entry: BatchEntry) -> bool:
        """Whether the results of a batch are those of an entry."""
        found: list[str] = []

        async def receive(line: Mapping[str, Any]) -> None:
            found.append(str(line.get("custom_id")))

        for path in state.files:
            await read_results(self._connection, path, len(entry.requests), receive)
        return any(name.startswith(f"{entry.key}_") for name in found)

    async def state(self, batch_id: str) -> BatchState | None:
        batch = await self._connection.json("GET", f"messages/batches/{batch_id}")
        # The address in results_url is not used: the key is sent to the configured origin only.
        ended = batch.get("processing_status") == "ended"
        return BatchState(files=(f"messages/batches/{batch_id}/results",)) if ended else None

    def outcome(self, line: Mapping[str, Any]) -> Answer:
        result = line.get("result")
        result = result if isinstance(result, dict) else {}
        message, error = result.get("message"), result.get("error")
        if result.get("type") == "succeeded" and isinstance(message, dict):
            return self._connection.parse(message, "messages/batches")
        inner = error.get("error", error) if isinstance(error, dict) else {}
        detail = describe(json.dumps(inner))
        if isinstance(inner, dict) and inner.get("type") in ("invalid_request_error", "request_too_large"):
            raise RequestRejected(detail)
        raise Retry(
            f"batch_{result['type']}" if result.get("type") in ("canceled", "expired") else "batch_error", detail=detail
        )


async def _listed(connection: Connection, path: str, cursor_name: str) -> AsyncIterator[dict[str, Any]]:
    """Yield the batches of an account, the latest first."""
    cursors: set[str] = set()
    params: dict[str, Any] = {"limit": 100}
    for _ in range(_MOST_PAGES):
        page = await connection.json("GET", path, params=params)
        data = page.get("data")
        batches = [b for b in data if isinstance(b, dict)] if isinstance(data, list) else []
        for batch in batches:
            yield batch
        cursor = page.get("last_id") or (batches[-1].get("id") if batches else None)
        if not page.get("has_more") or not isinstance(cursor, str) or cursor in cursors:
            return
        cursors.add(cursor)
        params = {"limit": 100, cursor_name: cursor}


def _id(value: Any) -> str:
    """An id that an endpoint chose, which becomes a part of a path."""
    if not isinstance(value, str) or not _ID.fullmatch(value):
        shown = describe(str(value))[:60]
        raise EndpointError(f"the endpoint sent {shown!r} as the id of a batch or file; it is not a valid id")
    return value


def _timestamp(value: Any) -> float:
    """Seconds since the epoch; infinity if the value is not a time."""
    try:
        return datetime.fromisoformat(value).timestamp()
    except (TypeError, ValueError, OverflowError):
        return float("inf")


def _first_error(errors: Any) -> str:
    data = errors.get("data") if isinstance(errors, dict) else None
    first = data[0] if isinstance(data, list) and data and isinstance(data[0], dict) else {}
    return str(first.get("message") or first.get("code") or "the endpoint does not say why")
