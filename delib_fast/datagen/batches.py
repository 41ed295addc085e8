"""The backend that submits requests in batches, for half the price. Nothing is paid for twice, however a run ends.

    plan (key, requests) in the log ─▶ create the batch ─▶ its id in the log ─▶ poll ─▶ every answer in the log ─▶ done

A run that was killed before it could write the id finds the batch by its key. A batch is only created again when the
endpoint has been asked twice and does not have it. Answers are collected into the log even if nothing asks for them.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import secrets as random_secrets
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from delib_fast.datagen.answers import Answer, BatchEntry, Charge, Request, request_entry
from delib_fast.datagen.backends import EndpointError, RequestRejected, Retry
from delib_fast.datagen.batch_apis import (
    AnthropicBatches,
    BatchApi,
    BatchState,
    OpenAIBatches,
    custom_id,
    read_results,
)
from delib_fast.datagen.dialects import params_of
from delib_fast.datagen.endpoints import Connection, base_url_of
from delib_fast.datagen.progress import Meter
from delib_fast.datagen.request_log import RequestLog
from delib_fast.datagen.settings import EndpointSettings
from delib_fast.datagen.spending import log_answer, most_of
from delib_fast.datagen.stopping import RequestsStopped
from delib_fast.redaction import redact

T = TypeVar("T")
_QUIET_S = 0.2  # a batch is submitted when no request has been added for this long
_ENDS_WITHIN_S = 26 * 3600.0  # both APIs end a batch after 24 hours
_NOT_CREATED = frozenset({"rate_limit", "http_503", "http_529"})  # failures after which a batch does not exist
_CONCURRENT_APPENDS = 256  # this many answers share one sync of the log


class BatchBackend:
    """Submits requests in batches, and collects the batches of earlier runs.

    Args:
        settings: the endpoint; `concurrency` is the maximum number of requests in unfinished batches.
        log: the plans, the ids and the answers are written to it.
    """

    resumable = True

    def __init__(self, settings: EndpointSettings, log: RequestLog, meter: Meter) -> None:
        self._connection = Connection(settings)
        api = AnthropicBatches if settings.api == "anthropic" else OpenAIBatches
        self._api: BatchApi = api(self._connection)
        self._settings, self._log, self._meter = settings, log, meter
        self._key = endpoint_key(settings)
        self._queue: list[Request] = []
        self._waiting: dict[str, asyncio.Future[Answer]] = {}  # by request id
        self._in_batches: dict[str, object] = {}  # for each request, the batch that it is waiting for
        self._tasks: set[asyncio.Task[None]] = set()
        self._gathering: asyncio.Task[None] | None = None
        self._resumed = False

    async def complete(self, request: Request) -> Answer:
        self._resume_earlier()
        if (known := self._log.get(request.id)) is not None:
            return known
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting[request.id] = future
        if request.id not in self._in_batches:
            self._queue.append(request)
            if self._gathering is None or self._gathering.done():
                self._gathering = asyncio.create_task(self._gather())
        try:
            return await future
        finally:
            self._waiting.pop(request.id, None)

    async def close(self) -> None:
        """Stop waiting for batches. Another run collects them."""
        tasks = [*self._tasks, *([self._gathering] if self._gathering else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._connection.close()

    # --- starting -------------------------------------------------------------------------------------------

    def _resume_earlier(self) -> None:
        """Start to collect the batches of earlier runs."""
        if self._resumed:
            return
        self._resumed = True
        for entry in list(self._log.batches.values()):
            if entry.endpoint == self._key:
                self._start(entry.ids, self._collect_earlier(entry))

    async def _gather(self) -> None:
        """Submit the queue in batches, each when it is full or when no request was added for a while."""
        while self._queue:
            size = 0
            while size < len(self._queue) < self._api.max_requests:
                size = len(self._queue)
                await asyncio.sleep(_QUIET_S)
            batch: list[Request] = []
            bytes_left = self._api.max_bytes
            while self._queue and len(batch) < self._api.max_requests and bytes_left > 0:
                request = self._queue.pop(0)
                if request.id in self._waiting:  # otherwise the run is stopping
                    batch.append(request)
                    bytes_left -= sum(2 * len(m["content"].encode()) + 200 for m in request.messages)
            if batch:
                self._start([request.id for request in batch], self._submit_and_collect(batch))

    def _start(self, ids: Iterable[str], work: Coroutine[Any, Any, None]) -> None:
        """Run `work` for these requests. When it ends, whatever the reason, none of them is left waiting."""
        batch = object()
        self._in_batches.update(dict.fromkeys(ids, batch))

        async def run() -> None:
            fault: BaseException = Retry("batch_incomplete", detail="the results do not contain the request")
            try:
                await work
            except asyncio.CancelledError:
                fault = RequestsStopped()
                raise
            except Exception as error:  # noqa: BLE001 (raised in each waiting request)
                fault = error
            finally:
                # A request of which the result was an error may be in another batch already.
                for request_id in [i for i, its_batch in self._in_batches.items() if its_batch is batch]:
                    self._settle(request_id, fault)

        task = asyncio.create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _settle(self, request_id: str, outcome: Answer | BaseException) -> None:
        """Give a request its answer, or its error. It can then be requested again."""
        self._in_batches.pop(request_id, None)
        future = self._waiting.get(request_id)
        if future is None or future.done():
            return
        if isinstance(outcome, BaseException):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)

    # --- submitting -----------------------------------------------------------------------------------------

    async def _submit_and_collect(self, requests: Sequence[Request]) -> None:
        entry = BatchEntry(
            key=random_secrets.token_hex(12),
            endpoint=self._key,
            model=requests[0].model,
            params=requests[0].params,
            requests=tuple(map(request_entry, requests)),
            at=time.time(),
            at_most=sum((most_of(self._settings, request) for request in requests), Charge()),
        )
        await self._log.plan_batch(entry, requests)
        batch_id = await self._submit(entry, requests)
        await self._log.batch_submitted(entry.key, batch_id)
        self._meter.print(
            f"batch {batch_id}: {len(requests)} requests submitted; the run may be stopped while they are processed"
        )
        await self._collect(entry, batch_id, requests)

    async def _submit(self, entry: BatchEntry, requests: Sequence[Request]) -> str:
        """Create a batch. After a failure that may have created it, look for it before it is created again."""
        created = False  # whether it may have been
        for attempt in range(1, self._settings.attempts + 1):
            if created and (found := await self._find(entry)) is not None:
                return found
            try:
                return await self._api.create(entry.key, requests)
            except RequestRejected:
                await self._log.batch_collected(entry.key, "rejected")
                raise
            except Retry as error:
                self._meter.retried(error.reason)
                fault = error
                created = created or error.reason not in _NOT_CREATED
                await asyncio.sleep(self._pause(attempt, error))
        raise EndpointError(f"a batch of {len(requests)} requests cannot be submitted: {fault}")

    async def _find(self, entry: BatchEntry) -> str | None:
        """Return the id of a planned batch if the endpoint has it. A request to create it may still be under way."""
        known = frozenset(b.batch_id for b in self._log.batches.values() if b.batch_id is not None)
        pause = self._settings.batch_poll_s
        age = max(0.0, time.time() - entry.at)  # the clock may have been set back
        for wait in (max(0.0, pause - age), pause):
            await asyncio.sleep(wait)
            if (found := await self._retried(partial(self._api.find, entry, known, pause))) is not None:
                return found
        return None

    # --- collecting -----------------------------------------------------------------------------------------

    async def _collect_earlier(self, entry: BatchEntry) -> None:
        batch_id = entry.batch_id
        if batch_id is None:
            with self._explained(entry):
                batch_id = await self._find(entry)
            if batch_id is None:
                await self._log.batch_collected(entry.key, "never created")
                raise Retry("batch_lost", detail="the batch was planned, but not created before the run ended")
            await self._log.batch_submitted(entry.key, batch_id)
        self._meter.print(f"batch {batch_id}: waiting for {len(entry.requests)} requests of an earlier run")
        await self._collect(entry, batch_id, self._log.requests_of(entry))

    async def _collect(self, entry: BatchEntry, batch_id: str, requests: Sequence[Request]) -> None:
        """Wait until a batch has ended, and write its answers to the log."""
        with self._explained(entry, batch_id):
            state = await self._ended(entry, batch_id)
            if state.fault is not None:
                await self._log.batch_collected(entry.key, "failed")
                raise Retry("batch_failed", detail=state.fault)
            missing = {custom_id(entry.key, request): request for request in requests}
            for path in state.files:
                await self._retried(partial(self._read, path, entry, missing))
        answered = sum(request.id in self._log for request in requests)
        await self._log.batch_collected(entry.key, f"{answered} of {len(requests)} answered")

    @contextlib.contextmanager
    def _explained(self, entry: BatchEntry, batch_id: str | None = None) -> Iterator[None]:
        """Add to an EndpointError which batch it is about, and how to continue without the batch."""
        try:
            yield
        except EndpointError as error:
            raise EndpointError(
                f"batch {batch_id or entry.key} of {len(entry.requests)} requests: {error}. If its results are lost, "
                f'and its requests are to be paid for again, append the line {{"is": "batch", "state": "collected", '
                f'"key": "{entry.key}"}} to {self._log.path}'
            ) from None

    async def _ended(self, entry: BatchEntry, batch_id: str) -> BatchState:
        """Poll a batch until it has ended."""
        while (state := await self._retried(lambda: self._api.state(batch_id))) is None:
            if time.time() > entry.at + _ENDS_WITHIN_S:
                raise EndpointError("it has not ended after 26 hours; run the same command again later")
            await asyncio.sleep(self._settings.batch_poll_s)
        return state

    async def _read(self, path: str, entry: BatchEntry, missing: dict[str, Request]) -> None:
        """Write the answers in a file of results to the log, and give them to the requests that wait for them.

        Args:
            missing: the requests without a result, by custom_id; those in the file are removed from it.
        """
        appending: list[asyncio.Task[None]] = []

        async def receive(line: Mapping[str, Any]) -> None:
            request = missing.pop(str(line.get("custom_id")), None)
            if request is None:  # of another batch, or the second result of a request
                return
            try:
                answer = self._api.outcome(line)
            except (Retry, RequestRejected) as error:
                self._settle(request.id, error)
                return
            appending.append(asyncio.create_task(self._keep(request, answer, entry)))
            if len(appending) >= _CONCURRENT_APPENDS:
                await asyncio.gather(*appending)
                appending.clear()

        try:
            await read_results(self._connection, path, len(entry.requests), receive)
        finally:
            await asyncio.gather(*appending)

    async def _keep(self, request: Request, answer: Answer, entry: BatchEntry) -> None:
        seconds = max(0.0, time.time() - entry.at)
        await log_answer(self._log, self._settings, request, answer, attempts=1, seconds=seconds)
        self._settle(request.id, answer)

    async def _retried(self, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Call until no Retry is raised, at most `attempts` times."""
        for attempt in range(1, self._settings.attempts + 1):
            try:
                return await call()
            except Retry as error:
                self._meter.retried(error.reason)
                fault = error
                await asyncio.sleep(self._pause(attempt, error))
            except RequestRejected as error:
                raise EndpointError(str(error)) from None
        raise EndpointError(f"no answer after {self._settings.attempts} attempts: {fault}")

    def _pause(self, attempt: int, error: Retry) -> float:
        if error.after_s is not None:
            return min(error.after_s, self._settings.longest_wait_s)
        return self._settings.backoff_s(attempt)


def endpoint_key(settings: EndpointSettings) -> str:
    """Identifies the endpoint of a batch: API, address, model and sampling parameters."""
    content = [settings.api, base_url_of(settings), settings.model, redact(params_of(settings))]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
