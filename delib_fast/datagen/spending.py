"""What a run may spend: a bound on its cost, and a check that what it pays for is usable."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

from delib_fast.datagen.answers import Answer, Charge, Request, Totals
from delib_fast.datagen.progress import Meter, Share, money
from delib_fast.datagen.request_log import RequestLog
from delib_fast.datagen.settings import EndpointSettings
from delib_fast.datagen.stopping import BudgetSpent, LowYield, RequestsStopped, StopFlag

_BATCH_PRICE = 0.5  # of OpenAI's and Anthropic's batches, relative to single requests
_TOKENS_PER_MESSAGE = 32  # at most, for the chat template


def cost_of(settings: EndpointSettings, answer: Answer) -> float | None:
    """The cost of an answer; None if the prices, or its tokens, are not known."""
    if settings.price_in is None or settings.price_out is None:
        return None
    if answer.prompt_tokens is None or answer.completion_tokens is None:
        return None
    return _price(settings, answer.prompt_tokens, answer.completion_tokens).cost


def most_of(settings: EndpointSettings, request: Request, longest: int = 0) -> Charge:
    """The most that an attempt of a request can cost: a token has at least one byte, an answer at most max_tokens.

    Args:
        longest: completion tokens of the longest answer so far, in case the endpoint ignores max_tokens.
    """
    prompt = sum(len(m["content"].encode()) + _TOKENS_PER_MESSAGE for m in request.messages)
    return _price(settings, prompt, max(settings.max_tokens, longest))


def at_most(settings: EndpointSettings, request: Request, answer: Answer) -> Charge:
    """The most that an answer can have cost: what its reported tokens cost, if they are reported, and plausible."""
    prompt, completion = answer.prompt_tokens, answer.completion_tokens
    if not prompt or completion is None or (completion == 0 and (answer.text or answer.reasoning)):
        return most_of(settings, request)
    return _price(settings, prompt, completion)


async def log_answer(
    log: RequestLog, settings: EndpointSettings, request: Request, answer: Answer, *, attempts: int, seconds: float
) -> None:
    """Append an answer to the log with what it cost, unless the log has one. Raises WriteError; see `append`."""
    if request.id not in log:
        cost, most = cost_of(settings, answer), at_most(settings, request, answer)
        await log.append(request, answer, cost=cost, attempts=attempts, seconds=seconds, at_most=most)


def _price(settings: EndpointSettings, prompt_tokens: int, completion_tokens: int) -> Charge:
    cost = (prompt_tokens * (settings.price_in or 0.0) + completion_tokens * (settings.price_out or 0.0)) / 1e6
    return Charge(prompt_tokens + completion_tokens, cost * (_BATCH_PRICE if settings.batch else 1.0))


class Budget:
    """Holds back requests so that a run never pays more than its limits: paid + in flight ≤ limit.

    Args:
        totals: of the request log.
        max_cost, max_tokens: the limits; None for no limit.
        committed: what the batches of earlier runs that have not been collected may still cost.
    """

    def __init__(
        self, totals: Totals, max_cost: float | None, max_tokens: int | None, committed: Callable[[], Charge]
    ) -> None:
        self.max_cost, self.max_tokens = max_cost, max_tokens
        self._totals, self._committed = totals, committed
        self._held: list[Charge] = []
        self._changed = asyncio.Event()

    @contextlib.asynccontextmanager
    async def hold(self, charge: Charge, stop: StopFlag) -> AsyncIterator[None]:
        """Reserve a part of the budget while the block runs. Waits until others release theirs if too little is left.

        Stops the run, and raises RequestsStopped, if the budget is too small even then.
        """
        if self.max_cost is None and self.max_tokens is None:
            yield
            return
        while not self._fits(charge):
            stop.check()
            if not self._held:
                stop.set(BudgetSpent(self._spent(charge)))
                raise RequestsStopped
            await self._changed.wait()
        self._held.append(charge)
        try:
            yield
        finally:
            self._held.remove(charge)
            self._changed.set()
            self._changed = asyncio.Event()

    def _fits(self, charge: Charge) -> bool:
        needed = sum([*self._held, charge], self._totals.at_most + self._committed())
        too_expensive = self.max_cost is not None and needed.cost > self.max_cost
        return not too_expensive and (self.max_tokens is None or needed.tokens <= self.max_tokens)

    def _spent(self, charge: Charge) -> str:
        used = self._totals.at_most + self._committed()
        if self.max_cost is not None and (used + charge).cost > self.max_cost:
            return (
                f"max_cost ({self.max_cost:g}) does not cover another request: the answers in the folder cost "
                f"{money(used.cost)} at most, and the next request costs {money(charge.cost)} at most"
            )
        return (
            f"max_paid_tokens ({self.max_tokens:,}) does not cover another request: the answers in the folder have "
            f"{used.tokens:,} tokens at most, and the next request has {charge.tokens:,} tokens at most"
        )


class YieldCheck:
    """Stops a run that pays for what it cannot use.

    Samples or documents, and the lists and judgements of each purpose, are checked separately.

    Args:
        meter: counts them, and those that are usable.
        totals: of the request log.
        after: their number at the first check. Later checks are made whenever their number has doubled, so that at
            most as much is wasted as was spent before.
        least: the smallest share of usable ones since the last check.
    """

    def __init__(self, meter: Meter, totals: Totals, after: int, least: float) -> None:
        self._meter, self._totals, self._after, self._least = meter, totals, after, least
        self._checked: dict[str, Share] = {}  # the numbers at the last check

    def fault(self) -> LowYield | None:
        """Return the cause to stop before another request is paid for, or None."""
        for what, share in self._meter.shares.items():
            last = self._checked.get(what, Share())
            if share.total < (2 * last.total or self._after):
                continue
            self._checked[what] = replace(share)
            total, usable = share.total - last.total, share.usable - last.usable
            if usable < self._least * total:
                return self._fault(what, total, usable)
        return None

    def _fault(self, what: str, total: int, usable: int) -> LowYield:
        return LowYield(
            f"only {usable} of the last {total} {what} are usable, less than least_yield ({self._least:g}). Dropped: "
            f"{self._meter.drop_reasons() or 'nothing yet'}. The first: {self._meter.first_drop or 'none'}. So far, "
            f"{self.figures()}. Change the prompt files, the model or the thresholds; or set least_yield to 0 to "
            "continue"
        )

    def figures(self) -> str:
        """Summarize what was paid for what is kept."""
        paid, kept = self._totals.prompt_tokens + self._totals.completion_tokens, self._meter.kept_tokens
        text = f"{self._totals.answers:,} answers with {paid:,} tokens were paid for {kept:,} usable tokens"
        if kept:
            text += f", {paid / kept:,.1f} for each"
            if self._totals.cost is not None:
                text += f"; a million usable tokens cost {money(1e6 * self._totals.cost / kept)}"
        return text
