"""The client for all models of a run. It sends only those requests that have no answer in the request log yet.

client = Client(log, meter)
endpoint = client.endpoint(settings.generator)
answer = await endpoint.ask(chat, purpose="generate", sample=0)
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import replace
from typing import Any, TypeVar

from delib_fast.datagen.answers import Answer, BatchEntry, Charge, Request, Totals
from delib_fast.datagen.backends import Backend, EndpointError, NoAnswer, RequestRejected, Retry
from delib_fast.datagen.batches import BatchBackend, endpoint_key
from delib_fast.datagen.dialects import params_of
from delib_fast.datagen.endpoints import EndpointBackend
from delib_fast.datagen.parsing import MalformedAnswer
from delib_fast.datagen.progress import Meter
from delib_fast.datagen.prompt_files import Chat
from delib_fast.datagen.request_log import RequestLog, WriteError
from delib_fast.datagen.settings import EndpointSettings
from delib_fast.datagen.spending import Budget, YieldCheck, log_answer, most_of
from delib_fast.datagen.stopping import Interrupted, RequestsStopped, StopFlag

T = TypeVar("T")
_MAX_FAILURES_IN_A_ROW = 10  # after this many failed requests without an answer in between, the endpoint counts as down


class Client:
    """The endpoints of a run.

    Args:
        log: stores every answer; None to store none.
        meter: counts requests and answers, and shows progress.
        max_cost, max_paid_tokens: the run stops before the answers in the log can cost more, or have more tokens.
        yield_check: stops the run if too few of the answers that it pays for are usable.
        make_backend: creates the backend of an endpoint; by default according to the endpoint's settings.
    """

    def __init__(
        self,
        log: RequestLog | None,
        meter: Meter,
        *,
        max_cost: float | None = None,
        max_paid_tokens: int | None = None,
        yield_check: YieldCheck | None = None,
        make_backend: Callable[[EndpointSettings], Backend] | None = None,
    ) -> None:
        self.log = log
        self.meter = meter
        self.stop = StopFlag()
        self.yield_check = yield_check
        self.in_flight: dict[str, asyncio.Task[Answer]] = {}
        self.earlier_batches = dict(log.batches) if log is not None else {}
        """The batches that an earlier run has planned or submitted, and not collected."""
        self._earlier = {i: key for key, batch in self.earlier_batches.items() for i in batch.ids}
        self.budget = Budget(log.totals if log is not None else Totals(), max_cost, max_paid_tokens, self._committed)
        self._endpoints: list[Endpoint] = []
        self._make_backend = make_backend or (lambda settings: _backend_of(settings, log, meter))

    def endpoint(self, settings: EndpointSettings) -> Endpoint:
        """Return the endpoint of these settings. Equal settings share one endpoint and its concurrency limit."""
        found = next((e for e in self._endpoints if e.settings == settings), None)
        if found is None:
            found = Endpoint(self, settings, self._make_backend(settings))
            self._endpoints.append(found)
        return found

    def earlier_batch(self, request: Request) -> BatchEntry | None:
        """Return the batch of an earlier run that contains a request, if it has not been collected."""
        key = self._earlier.get(request.id)
        return self.log.batches.get(key) if key is not None and self.log is not None else None

    def _committed(self) -> Charge:
        open_batches = self.log.batches if self.log is not None else {}
        return sum((b.at_most for key, b in self.earlier_batches.items() if key in open_batches), Charge())

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Stop the run on SIGINT or SIGTERM while the block runs. After it, wait for requests in flight, and close.

        If the block raises RequestsStopped, the cause of the stop is raised instead.
        """
        loop = asyncio.get_running_loop()
        for sig in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(NotImplementedError, ValueError, RuntimeError):
                loop.add_signal_handler(sig, self._on_signal)
        try:
            yield
        except RequestsStopped:
            raise (self.stop.cause or Interrupted()) from None
        finally:
            await self.close()
            for sig in (signal.SIGINT, signal.SIGTERM):
                with contextlib.suppress(NotImplementedError, ValueError, RuntimeError):
                    loop.remove_signal_handler(sig)

    def cancel_in_flight(self) -> None:
        """Cancel the requests in flight, and lose their answers."""
        for task in self.in_flight.values():
            task.cancel()

    async def close(self) -> None:
        """Wait for the requests in flight and close every connection."""
        while self.in_flight:
            await asyncio.wait(self.in_flight.values())
        # An error of a connection that is no longer needed must not replace the error that ended the run.
        await asyncio.gather(*(endpoint.close() for endpoint in self._endpoints), return_exceptions=True)

    def _on_signal(self) -> None:
        if self.stop.cause is None:
            self.stop.set(Interrupted())
            waiting = sum(e.in_flight for e in self._endpoints if not e.resumable)
            if any(e.in_flight for e in self._endpoints if e.resumable):
                self.meter.print("stopping: the same command collects the answers of the batches")
            if waiting:
                self.meter.print(
                    f"stopping: waiting for {waiting} answers, which will be kept; press Ctrl-C again to discard them"
                )
        else:
            self.cancel_in_flight()


class Endpoint:
    """One model, with its concurrency limit, retries and pauses."""

    def __init__(self, client: Client, settings: EndpointSettings, backend: Backend) -> None:
        self.settings = settings
        self._client, self._backend = client, backend
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._paused_until = 0.0  # monotonic time until which the endpoint has requested a pause
        self._last_answer = 0.0
        self._failures = 0  # requests given up since the last answer
        self._params = params_of(settings)
        self._longest = 0  # completion tokens of the longest answer
        self.resumable = backend.resumable
        self.in_flight = 0

    async def ask(self, chat: Chat, *, purpose: str, sample: int = 0) -> Answer:
        """Return the answer to a chat, from the log if it has one. Equal requests are sent once.

        Args:
            chat: the messages.
            purpose: what the answer is for, e.g. "judge"; it does not distinguish requests.
            sample: requests that differ only in this number are answered independently.
        Raises:
            NoAnswer: this request cannot be answered now.
            RequestsStopped: the run is stopping.
        """
        client = self._client
        request = Request(purpose, self.settings.model, chat, self._params, sample)
        try:
            known = client.log.get(request.id) if client.log is not None else None
        except WriteError as error:
            client.stop.set(error)
            raise RequestsStopped from None
        if known is not None:
            client.meter.reused += 1
            return known
        task = client.in_flight.get(request.id)
        if task is None:
            client.stop.check()
            task = client.in_flight[request.id] = asyncio.create_task(self._send(request))
            task.add_done_callback(lambda _: client.in_flight.pop(request.id, None))
        try:
            return await asyncio.shield(task)
        except NoAnswer as error:
            error.request_ids = [request.id]
            raise
        except asyncio.CancelledError:
            if task.cancelled():
                raise RequestsStopped from None
            raise

    async def ask_with_retry(
        self, chat: Chat, parse: Callable[[Answer], T], *, purpose: str, attempts: int, first_sample: int = 0
    ) -> tuple[T, list[str]]:
        """Ask until `parse` accepts an answer. After each MalformedAnswer, ask for another sample.

        At temperature 0, another sample would be the same answer: the request then also contains the answer that could
        not be read, and why.

        Returns:
            The parsed answer, and the ids of all requests that were needed.
        Raises:
            NoAnswer: the last of `attempts` answers was malformed too; the reason is `malformed_<purpose>`.
        """
        request_ids: list[str] = []
        failed = NoAnswer(f"malformed_{purpose}")
        sent = chat
        for attempt in range(attempts):
            try:
                answer = await self.ask(sent, purpose=purpose, sample=first_sample + attempt)
            except NoAnswer as error:
                error.request_ids = [*request_ids, *error.request_ids]
                raise
            request_ids.append(answer.request_id)
            try:
                return parse(answer), request_ids
            except MalformedAnswer as error:
                failed = NoAnswer(f"malformed_{purpose}", f"{purpose}: {error}", text=answer.text)
                if self.settings.temperature == 0:
                    sent = (*chat, *_correction(answer, error))
        failed.request_ids = request_ids
        raise failed

    async def close(self) -> None:
        await self._backend.close()

    async def _send(self, request: Request) -> Answer:
        client, settings = self._client, self.settings
        start = time.monotonic()
        for attempt in range(1, settings.attempts + 1):
            fault = None if client.yield_check is None else client.yield_check.fault()
            if fault is not None:
                client.stop.set(fault)
                raise RequestsStopped
            charge = self._charge(request)
            async with client.budget.hold(charge, client.stop):
                try:
                    answer = await self._attempt(request)
                except RequestRejected as error:
                    await self._record_failure(request, "rejected", error, attempt, start, Charge())
                    raise NoAnswer("refused_by_endpoint", str(error)) from None
                except EndpointError as error:
                    client.stop.set(error)
                    raise RequestsStopped from None
                except Retry as error:
                    failure, paid = error, charge if error.may_be_paid else Charge()
                    wait_s = self._wait_of(attempt, error)  # before the write: others must not be sent meanwhile
                    await self._record_failure(request, error.reason, error, attempt, start, paid)
                else:
                    self._last_answer, self._failures = time.monotonic(), 0
                    return await self._keep(request, answer, attempt, time.monotonic() - start)
            client.meter.retried(failure.reason)
            client.stop.check()
            if attempt == settings.attempts:
                self._give_up(failure, start)
            await client.stop.sleep(wait_s)
        raise AssertionError("the last attempt returns or raises")

    def _charge(self, request: Request) -> Charge:
        """What an attempt of a request can cost at most, beyond what earlier runs have committed to."""
        batch = self._client.earlier_batch(request)
        if batch is None:
            return most_of(self.settings, request, self._longest)
        if not self.settings.batch or batch.endpoint != endpoint_key(self.settings):
            self._client.stop.set(
                EndpointError(
                    f"batch {batch.batch_id or batch.key} of an earlier run contains requests that would be sent, and "
                    "paid for, again: run with the same batch: true, api, base_url and settings as then to collect it"
                )
            )
            raise RequestsStopped
        return Charge()

    async def _attempt(self, request: Request) -> Answer:
        stop = self._client.stop
        async with self._slots:
            stop.check()
            while (pause := self._paused_until - time.monotonic()) > 0:
                await stop.sleep(pause)
            self.in_flight += 1
            try:
                answer = self._backend.complete(request)
                return await (stop.wait_for(answer) if self.resumable else answer)
            finally:
                self.in_flight -= 1

    def _wait_of(self, attempt: int, error: Retry) -> float:
        """Return the seconds to wait after a failed attempt, and pause the endpoint if it requests a pause.

        A pause that is too long stops the run.
        """
        settings = self.settings
        wait = settings.backoff_s(attempt) * random.uniform(0.5, 1.0)
        if error.after_s is not None:
            wait = error.after_s * random.uniform(1.0, 1.05)
        if error.after_s is not None and error.after_s > settings.longest_wait_s:
            self._client.stop.set(
                EndpointError(
                    f"the endpoint requests a pause of {error.after_s:.0f} s ({error}), more than longest_wait_s "
                    f"({settings.longest_wait_s:g}); run the same command again after it"
                )
            )
        elif error.after_s is not None or error.reason == "rate_limit":  # the limit applies to the whole endpoint
            self._paused_until = max(self._paused_until, time.monotonic() + wait)
        return wait

    def _give_up(self, error: Retry, start: float) -> None:
        """Raise NoAnswer; or stop the run, if the endpoint has not answered anything in the meantime and seems down."""
        if self._last_answer <= start:  # otherwise only this request fails
            self._failures += 1
            if error.reason == "connection" or self._failures >= _MAX_FAILURES_IN_A_ROW:
                where = self.settings.base_url or self.settings.model
                self._client.stop.set(
                    EndpointError(f"{where} does not answer ({error}) after {self.settings.attempts} attempts")
                )
                raise RequestsStopped
        raise NoAnswer("no_answer", str(error))

    async def _keep(self, request: Request, answer: Answer, attempts: int, seconds: float) -> Answer:
        """Append the answer to the log, and count it."""
        client = self._client
        answer = replace(answer, request_id=request.id)
        if client.log is not None:  # which has the answers of a batch already
            await self._write(
                log_answer(client.log, self.settings, request, answer, attempts=attempts, seconds=seconds)
            )
        self._longest = max(self._longest, answer.completion_tokens or 0)
        client.meter.received(answer)
        return answer

    async def _record_failure(
        self, request: Request, reason: str, error: Exception, attempt: int, start: float, charge: Charge
    ) -> None:
        """Append a failed attempt to the log."""
        if self._client.log is not None:
            seconds = time.monotonic() - start
            await self._write(
                self._client.log.append_failure(
                    request, reason, detail=str(error), attempt=attempt, seconds=seconds, at_most=charge
                )
            )

    async def _write(self, append: Awaitable[None]) -> None:
        """Wait until a record is on disk. If it cannot be written, stop the run."""
        try:
            await append
        except WriteError as error:
            self._client.stop.set(error)
            raise RequestsStopped from None


def _correction(answer: Answer, fault: MalformedAnswer) -> Chat:
    """The turns that request an answer again which could not be read."""
    text = f"Your answer cannot be used: {fault}. Answer the request again, in the form that it asks for."
    return (
        {"role": "assistant", "content": answer.text.strip() or "(no answer)"},
        {"role": "user", "content": text},
    )


def _backend_of(settings: EndpointSettings, log: RequestLog | None, meter: Meter) -> Backend:
    if settings.backend == "transformers":
        from delib_fast.datagen.in_process import TransformersBackend  # imports torch

        return TransformersBackend(settings)
    if settings.batch:
        if log is None:
            raise ValueError("batch needs a request log")
        return BatchBackend(settings, log, meter)
    return EndpointBackend(settings)


async def for_each(
    items: Iterable[T], work: Callable[[T], Awaitable[Any]], client: Client, *, concurrency: int
) -> None:
    """Await `work(item)` for every item, at most `concurrency` at a time.

    If the run stops, no more work is started, and the work in progress ends first.

    Raises:
        BaseException: the cause of the stop, or the first exception that `work` raised.
    """
    remaining = iter(items)

    async def worker() -> None:
        for item in remaining:
            if client.stop.cause is not None:
                return
            try:
                await work(item)
            except RequestsStopped:
                return
            except Exception as error:  # noqa: BLE001 (kept as the cause, raised below)
                client.stop.set(error)
                return

    await asyncio.gather(*(worker() for _ in range(concurrency)))
    if client.stop.cause is not None:
        raise client.stop.cause
