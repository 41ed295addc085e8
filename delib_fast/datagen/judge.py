"""Judges: models that rate generated rows (data generation), or return one of a few verdicts (evaluations).

A row is rated k times on each axis, with the spec in the context:

    score[axis] = min over the k votes of vote[axis];   a row is kept ⇔ score[axis] ≥ threshold[axis] on every axis
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from delib_fast.datagen.answers import Answer, clean_text
from delib_fast.datagen.backends import EndpointError, NoAnswer, describe
from delib_fast.datagen.client import Client, for_each
from delib_fast.datagen.endpoints import EndpointBackend
from delib_fast.datagen.parsing import MalformedAnswer, parse_scores
from delib_fast.datagen.progress import Meter
from delib_fast.datagen.prompt_files import quoted
from delib_fast.datagen.request_log import RequestLog, WriteError, lock_folder
from delib_fast.datagen.session import Session
from delib_fast.datagen.settings import AXES, Axis, DeliberateSettings, EndpointSettings

_VERDICT = re.compile(r"<answer>\s*(\w+)\s*</answer>", re.IGNORECASE)
_VERDICT_ATTEMPTS = 2
_SAMPLES_PER_VOTE = 1000  # so that a retried vote never repeats another vote's request


@dataclass
class Judgement:
    """The ratings of one row."""

    votes: list[dict[str, Any]] = field(default_factory=list)
    """For each vote, a score from 1 to 10 on each axis, and the judge's reason under `why`."""
    request_ids: list[str] = field(default_factory=list)

    @property
    def scores(self) -> dict[str, float]:
        """The minimum over the votes on each axis, and under "min" the minimum over all axes."""
        by_axis: dict[str, float] = {axis: min(vote[axis] for vote in self.votes) for axis in AXES}
        return {**by_axis, "min": min(by_axis.values())}

    def below(self, thresholds: dict[Axis, float]) -> list[Axis]:
        """Return the axes on which the score is below the threshold."""
        scores = self.scores
        return [axis for axis in AXES if scores[axis] < thresholds[axis]]


async def judge_row(
    session: Session, settings: DeliberateSettings, *, spec_text: str, conversation: str, cot: str, response: str
) -> Judgement:
    """Request the votes on a row; with `stop_early` one after another, until a vote is below the threshold.

    Raises:
        NoAnswer: a vote could not be parsed in `list_attempts` attempts (reason `malformed_judge`). Such a row has no
            score and is dropped under that reason.
    """
    chat = session.prompts.chat(
        "judge",
        spec=spec_text,
        style_rule=session.prompts.fragment(f"judge_style_{settings.style}"),
        conversation=quoted("conversation", conversation),
        cot=quoted("deliberation", cot),
        response=quoted("response", response),
    )

    async def vote(number: int) -> tuple[dict[str, Any], list[str]]:
        (scores, why), request_ids = await session.ask_with_retry(
            session.judge,
            chat,
            lambda answer: parse_scores(answer.text),
            purpose="judge",
            first_sample=number * _SAMPLES_PER_VOTE,
        )
        return {**{str(axis): score for axis, score in scores.items()}, "why": clean_text(why)}, request_ids

    judgement = Judgement()
    if not settings.stop_early:  # the votes do not depend on each other: with `batch`, they are in one batch
        found = await asyncio.gather(*map(vote, range(settings.judge_votes)), return_exceptions=True)
        for result in found:
            if not isinstance(result, BaseException):
                judgement.votes.append(result[0])
                judgement.request_ids += result[1]
        for result in found:
            if isinstance(result, BaseException):
                raise _with_earlier(result, judgement)
        return judgement
    for number in range(settings.judge_votes):
        try:
            scores, request_ids = await vote(number)
        except NoAnswer as error:
            raise _with_earlier(error, judgement) from None
        judgement.votes.append(scores)
        judgement.request_ids += request_ids
        if judgement.below(settings.thresholds()):
            break
    return judgement


def _with_earlier(error: BaseException, judgement: Judgement) -> BaseException:
    """The error of a vote, with the requests of the other votes."""
    if isinstance(error, NoAnswer):
        error.request_ids = [*judgement.request_ids, *error.request_ids]
    return error


class JudgeError(RuntimeError):
    """The judge cannot be reached, or does not answer in the requested form."""


def request_verdicts(
    endpoint: EndpointSettings, prompts: Sequence[str], allowed: Sequence[str], *, folder: Path | None = None
) -> list[str | None]:
    """Send each prompt to a judge, and return one verdict per prompt; None where it cannot be read. No key is required.

    Args:
        endpoint: the model, and its concurrency limit.
        prompts: complete user messages.
        allowed: the possible verdicts, in lower case. The last `<answer>VERDICT</answer>` of an answer counts. After an
            answer without a verdict, the judge is asked once more, with what is missing in the prompt.
        folder: where the request log keeps every answer, so that none is requested (and paid for) twice; None for none.
    Raises:
        JudgeError: the endpoint does not answer after its retries, or no verdict at all can be read.
        ConfigError: the folder cannot be used.
    """
    try:
        with contextlib.ExitStack() as stack:
            log = None
            if folder is not None:
                stack.callback(lock_folder(folder).release)
                log = RequestLog(folder / "requests.jsonl")
                stack.callback(log.close)
            return asyncio.run(_request_verdicts(endpoint, prompts, allowed, log))
    except (EndpointError, NoAnswer, WriteError) as error:
        where = describe(endpoint.base_url or "the endpoint")
        raise JudgeError(f"judge {endpoint.model!r} at {where}: {error}") from None


async def _request_verdicts(
    endpoint: EndpointSettings, prompts: Sequence[str], allowed: Sequence[str], log: RequestLog | None
) -> list[str | None]:
    client = Client(log, Meter(), make_backend=lambda settings: EndpointBackend(settings, require_key=False))
    judge = client.endpoint(endpoint)
    verdicts: dict[int, str] = {}
    unread: list[NoAnswer] = []

    async def request_one(index: int) -> None:
        chat = ({"role": "user", "content": prompts[index]},)
        try:
            verdicts[index], _ = await judge.ask_with_retry(
                chat, _verdict_parser(allowed), purpose="verdict", attempts=_VERDICT_ATTEMPTS
            )
        except NoAnswer as error:
            unread.append(error)

    try:
        await for_each(range(len(prompts)), request_one, client, concurrency=endpoint.concurrency)
    except asyncio.CancelledError:  # Ctrl-C: do not wait for the answers in flight
        client.cancel_in_flight()
        raise
    finally:
        await client.close()
    if unread and not verdicts:
        raise unread[0]
    return [verdicts.get(index) for index in range(len(prompts))]


def _verdict_parser(allowed: Sequence[str]) -> Callable[[Answer], str]:
    def parse(answer: Answer) -> str:
        texts: list[str] = _VERDICT.findall(answer.text)
        found = [verdict for text in texts if (verdict := text.lower()) in allowed]
        if not found:
            raise MalformedAnswer(f"it has no <answer>…</answer> with one of {', '.join(allowed)}")
        return found[-1]

    return parse
