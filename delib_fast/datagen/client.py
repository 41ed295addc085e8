"""One client for all models: asks the ledger first, then the endpoint; limits, retries, stops cleanly.

client = Client(ledger, meter, secrets)
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
from typing import Any, TypeVar

from delib_fast.datagen.backends import Backend, EndpointError, OpenAIBackend, Refused, Retry, Secrets
from delib_fast.datagen.progress import Meter
from delib_fast.datagen.prompt_files import Chat
from delib_fast.datagen.request_log import Answer, LedgerError, Request, RequestLedger
from delib_fast.datagen.settings import EndpointSettings

_GIVE_UPS_IN_A_ROW = 10  # so many requests given up with no answer between them: the endpoint is not working


class Stopped(Exception):  # noqa: N818 (it is no error)
    """Nothing more is sent: the run was interrupted, has spent its budget, or has lost its endpoint."""


class NoAnswer(Exception):  # noqa: N818
    """This request got no answer in this run; the others go on. `reason` is counted."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(detail or reason)
        self.reason = reason


class Stop:
    """Says once, to everybody, that nothing more is to be sent, and why."""

    def __init__(self) -> None:
        self.cause: BaseException | None = None
        self._event = asyncio.Event()

    def set(self, cause: BaseException) -> None:
        if self.cause is None:
            self.cause = cause
            self._event.set()

    def check(self) -> None:
        if self.cause is not None:
            raise Stopped

    async def sleep(self, seconds: float) -> None:
        """Sleep, but wake and raise Stopped if the run stops meanwhile."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._event.wait(), seconds)
        self.check()


class Interrupted(Exception):  # noqa: N818
    """Ctrl-C or SIGTERM."""


class BudgetSpent(Exception):  # noqa: N818
    """max_cost is reached."""


class Client:
    """The endpoints of a run, over one ledger."""

    def __init__(
        self,
        ledger: RequestLedger,
        meter: Meter,
        secrets: Secrets,
        *,
        max_cost: float | None = None,
        backends: Callable[[EndpointSettings], Backend] | None = None,
    ) -> None:
        self.ledger = ledger
        self.meter = meter
        self.stop = Stop()
        self.max_cost = max_cost
        self.flying: dict[str, asyncio.Task[Answer]] = {}
        self._endpoints: list[Endpoint] = []
        self._make = backends or (lambda settings: make_backend(settings, secrets))

    def endpoint(self, settings: EndpointSettings) -> Endpoint:
        """The endpoint of these settings; equal settings share one, and so its concurrency limit."""
        found = next((e for e in self._endpoints if e.settings == settings), None)
        if found is None:
            found = Endpoint(self, settings, self._make(settings))
            self._endpoints.append(found)
        return found

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Around a run: signals stop it, requests in flight are waited for, then every connection is closed."""
        loop = asyncio.get_running_loop()
        for sig in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(NotImplementedError, ValueError, RuntimeError):
                loop.add_signal_handler(sig, self._on_signal)
        try:
            yield
        finally:
            while self.flying:
                await asyncio.wait(self.flying.values())
            for endpoint in self._endpoints:
                await endpoint.close()
            for sig in (signal.SIGINT, signal.SIGTERM):
                with contextlib.suppress(NotImplementedError, ValueError, RuntimeError):
                    loop.remove_signal_handler(sig)

    def _on_signal(self) -> None:
        if self.stop.cause is None:
            self.stop.set(Interrupted())
            if self.meter.in_flight:
                self.meter.say(
                    f"stopping: {self.meter.in_flight} answers are on their way and will be kept; press "
                    "Ctrl-C again to leave them"
                )
        else:
            for task in self.flying.values():
                task.cancel()


class Endpoint:
    """One model with its concurrency limit, its retries and its pauses."""

    def __init__(self, client: Client, settings: EndpointSettings, backend: Backend) -> None:
        self.settings = settings
        self._client, self._backend = client, backend
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._open_at = 0.0  # nothing is sent before: the endpoint has asked for a pause
        self._last_answer = 0.0
        self._given_up = 0
        self._params: dict[str, Any] = {
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            str(settings.token_limit_name): settings.max_tokens,
            **settings.extra,
        }

    async def ask(self, chat: Chat, *, purpose: str, sample: int = 0) -> Answer:
        """The answer to a chat, from the ledger if it is there. Equal requests are sent once.

        Raises:
            NoAnswer: this one can't be had now. Stopped: the run is ending. LedgerError: the disk is full.
        """
        request = Request(purpose, self.settings.model, chat, self._params, sample)
        known = self._client.ledger.get(request.id)
        if known is not None:
            self._client.meter.reused += 1
            return known
        flying = self._client.flying
        task = flying.get(request.id)
        if task is None:
            self._client.stop.check()
            task = flying[request.id] = asyncio.create_task(self._send(request))
            task.add_done_callback(lambda _: flying.pop(request.id, None))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise Stopped from None
            raise

    async def close(self) -> None:
        await self._backend.close()

    async def _send(self, request: Request) -> Answer:
        client, settings = self._client, self.settings
        began = time.monotonic()
        for attempt in range(1, settings.attempts + 1):
            try:
                answer = await self._attempt(request)
            except Refused as error:
                raise NoAnswer("refused_by_endpoint", str(error)) from None
            except EndpointError as error:
                client.stop.set(error)
                raise Stopped from None
            except Retry as error:
                client.meter.retried(error.reason)
                await self._before_next(attempt, error, began)
            else:
                self._last_answer, self._given_up = time.monotonic(), 0
                return await self._keep(request, answer, attempt, time.monotonic() - began)
        raise AssertionError("the last attempt returns or raises")

    async def _attempt(self, request: Request) -> Answer:
        async with self._slots:
            self._client.stop.check()
            while (pause := self._open_at - time.monotonic()) > 0:
                await self._client.stop.sleep(pause)
            self._client.meter.in_flight += 1
            try:
                return await self._backend.complete(request)
            finally:
                self._client.meter.in_flight -= 1

    async def _before_next(self, attempt: int, error: Retry, began: float) -> None:
        """Wait as the endpoint asks or as the backoff says; after the last attempt, give up."""
        stop, settings = self._client.stop, self.settings
        stop.check()
        if error.after_s is not None and error.after_s > settings.longest_wait_s:
            stop.set(
                EndpointError(
                    f"the endpoint asks for a pause of {error.after_s:.0f} s ({error}), more than "
                    f"longest_wait_s ({settings.longest_wait_s:g}); give the same command again then"
                )
            )
            raise Stopped
        if attempt == settings.attempts:
            self._give_up(error, began)
        backoff = min(settings.longest_wait_s, settings.first_backoff_s * 2 ** (attempt - 1))
        wait = backoff * random.uniform(0.5, 1.0)
        if error.after_s is not None:
            wait = error.after_s * random.uniform(1.0, 1.05)
        if error.after_s is not None or error.reason == "rate_limit":
            self._open_at = max(self._open_at, time.monotonic() + wait)  # it speaks for the whole endpoint
        await stop.sleep(wait)

    def _give_up(self, error: Retry, began: float) -> None:
        alone = self._last_answer > began  # others were answered meanwhile: it is this request's own fault
        if not alone:
            self._given_up += 1
            if error.reason == "connection" or self._given_up >= _GIVE_UPS_IN_A_ROW:
                where = self.settings.base_url or self.settings.model
                self._client.stop.set(
                    EndpointError(
                        f"{where} does not answer ({error}) after {self.settings.attempts} "
                        "attempts; what was answered is kept"
                    )
                )
                raise Stopped
        raise NoAnswer("no_answer", str(error))

    async def _keep(self, request: Request, answer: Answer, attempts: int, seconds: float) -> Answer:
        client = self._client
        try:
            kept = await client.ledger.append(
                request, answer, cost=self._cost(answer), attempts=attempts, seconds=seconds
            )
        except LedgerError as error:
            client.stop.set(error)
            raise Stopped from None
        client.meter.received(answer)
        if client.max_cost is not None and (client.ledger.totals.cost or 0.0) >= client.max_cost:
            client.stop.set(BudgetSpent())
        return kept

    def _cost(self, answer: Answer) -> float | None:
        if self.settings.price_in is None or self.settings.price_out is None:
            return None
        return (
            (answer.prompt_tokens or 0) * self.settings.price_in
            + (answer.completion_tokens or 0) * self.settings.price_out
        ) / 1e6


def make_backend(settings: EndpointSettings, secrets: Secrets) -> Backend:
    if settings.backend == "transformers":
        from delib_fast.datagen.in_process import TransformersBackend

        return TransformersBackend(settings)
    return OpenAIBackend(settings, secrets)


T = TypeVar("T")


async def for_each(items: Iterable[T], work: Callable[[T], Awaitable[Any]], client: Client, *, at_once: int) -> None:
    """Do `work` on every item, `at_once` at a time. If the run stops, what is in flight still ends first.

    Raises: the cause of the stop, or what `work` raised first.
    """
    left = iter(items)

    async def worker() -> None:
        for item in left:
            if client.stop.cause is not None:
                return
            try:
                await work(item)
            except Stopped:
                return
            except Exception as error:  # noqa: BLE001 (kept as the cause, raised below)
                client.stop.set(error)
                return

    await asyncio.gather(*(worker() for _ in range(at_once)))
    if client.stop.cause is not None:
        raise client.stop.cause
