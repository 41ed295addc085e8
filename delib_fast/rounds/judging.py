"""The judge: it rates each reply k times, with the spec in its context. The minimum counts.

    score = min over the k ratings and their axes

What the judge sees of a reply is a type. `ResponseView` has no field for a chain of thought, so that with
`sees: response` no code between here and the request can pass one on; `cot_scan.py` checks the request log.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from delib_fast.datagen.answers import Answer, clean_text
from delib_fast.datagen.backends import EndpointError, NoAnswer
from delib_fast.datagen.client import Client, Endpoint, for_each
from delib_fast.datagen.parsing import MalformedAnswer, parse_scores
from delib_fast.datagen.progress import Meter
from delib_fast.datagen.prompt_files import Chat, PromptFiles, quoted
from delib_fast.datagen.request_log import RequestLog
from delib_fast.datagen.settings import AXES, Axis
from delib_fast.datagen.spec import Spec
from delib_fast.datagen.spending import YieldCheck
from delib_fast.datagen.user_prompts import UserPrompt
from delib_fast.rounds.settings import JudgeConfig

PURPOSE = "judge"
_ATTEMPTS = 4  # requests of one rating, until it can be read
_SAMPLES_PER_RATING = 1000  # so that a retried rating never repeats another rating's request
_PROBE, _LEAST_YIELD = 100, 0.01  # stop paying if hardly any of the first ratings can be read


@dataclass(frozen=True)
class ResponseView:
    """What a judge with `sees: response` sees of a reply."""

    conversation: str
    response: str


@dataclass(frozen=True)
class ReplyView:
    """What a judge with `sees: all` sees of a reply."""

    conversation: str
    cot: str
    response: str


View = ResponseView | ReplyView


def view_of(prompt: UserPrompt, cot: str | None, response: str, settings: JudgeConfig) -> View:
    """What the judge sees of a reply."""
    if settings.sees == "response":
        return ResponseView(prompt.conversation, response)
    return ReplyView(prompt.conversation, cot or "", response)


@dataclass
class Rating:
    """The ratings of one reply."""

    votes: list[dict[str, Any]] = field(default_factory=list)
    """For each rating, a score from 1 to 10 on each axis, and the judge's reason under `why`."""
    request_ids: list[str] = field(default_factory=list)
    fault: str | None = None
    """Why there is no rating: `malformed_judge`, `no_answer` or `refused_by_endpoint`."""

    @property
    def scores(self) -> dict[str, float]:
        """The minimum over the ratings on each axis, and under "min" the minimum over all axes."""
        axes = [axis for axis in AXES if all(axis in vote for vote in self.votes)]
        by_axis: dict[str, float] = {axis: min(vote[axis] for vote in self.votes) for axis in axes}
        return {**by_axis, "min": min(by_axis.values())}

    @property
    def score(self) -> float:
        """The minimum over all ratings and axes."""
        return self.scores["min"]


@dataclass(frozen=True)
class JudgeRequests:
    """The chats of a judge.

    Args:
        settings: the judge.
        spec: the spec, which is in every request.
        prompts: the prompt files.
    """

    settings: JudgeConfig
    spec: Spec
    prompts: PromptFiles

    @staticmethod
    def of(settings: JudgeConfig, spec: Spec, *, model_name: str, provider_name: str) -> JudgeRequests:
        """Read the prompt files. Raises ConfigError if one is not valid."""
        files = PromptFiles(settings.prompts, model_name=model_name, provider_name=provider_name)
        return JudgeRequests(settings, spec, files)

    @property
    def axes(self) -> tuple[Axis, ...]:
        """What is rated. Without the chain of thought, the reasoning is not."""
        return AXES if self.settings.sees == "all" else ("compliance", "helpfulness")

    @property
    def templates(self) -> list[str]:
        """The texts of the prompt files in use, which are in every request."""
        return [text for name in self.versions for _, text in self.prompts[name].turns]

    @property
    def versions(self) -> dict[str, str]:
        """The version of each prompt file in use."""
        names = ("judge", f"judge_style_{self.settings.style}") if self.settings.sees == "all" else ("judge_response",)
        return self.prompts.versions(*names)

    def chat(self, view: View) -> Chat:
        """The request to rate a reply."""
        shared = {
            "spec": self.spec.text,
            "conversation": quoted("conversation", view.conversation),
            "response": quoted("response", view.response),
        }
        if isinstance(view, ResponseView):
            return self.prompts.chat("judge_response", **shared)
        style_rule = self.prompts.fragment(f"judge_style_{self.settings.style}")
        return self.prompts.chat("judge", **shared, cot=quoted("deliberation", view.cot), style_rule=style_rule)


def rate(requests: JudgeRequests, views: Sequence[View], log: RequestLog, *, what: str) -> list[Rating]:
    """Rate every reply. Ratings that are in the request log are not requested again.

    Args:
        what: what is rated, e.g. "round 1".
    Returns:
        One rating per view, in order. One that could not be read, or got no answer, has a fault.
    Raises:
        EndpointError: the judge cannot be reached, or none of its ratings can be read.
        WriteError, BudgetSpent, LowYield, Interrupted: as for `delib-fast deliberate`.
        ConfigError: the request log is damaged, or the endpoint is not configured.
    """
    if not views:
        return []
    meter = Meter(log)
    try:
        return asyncio.run(_rate(requests, views, log, meter, what))
    finally:
        meter.stop()


async def _rate(
    requests: JudgeRequests, views: Sequence[View], log: RequestLog, meter: Meter, what: str
) -> list[Rating]:
    settings = requests.settings
    client = Client(
        log,
        meter,
        max_cost=settings.max_cost,
        max_paid_tokens=settings.max_paid_tokens,
        yield_check=YieldCheck(meter, log.totals, _PROBE, _LEAST_YIELD),
    )
    ratings: dict[int, Rating] = {}
    async with client.running():
        judge = client.endpoint(settings.endpoint)
        meter.start(f"judging {what}", len(views))

        async def rate_one(index: int) -> None:
            ratings[index] = await _rate_one(requests, judge, views[index], meter)
            meter.advance()

        await for_each(range(len(views)), rate_one, client, concurrency=2 * settings.endpoint.concurrency)
    unread = [ratings[i] for i in range(len(views)) if ratings[i].fault is not None]
    if len(unread) == len(views):
        raise EndpointError(
            f"{settings.endpoint.model!r} could rate none of {len(views)} replies ({what}; the first: "
            f"{meter.first_drop}); check the model under judge.endpoint, and the prompt files"
        )
    return [ratings[i] for i in range(len(views))]


async def _rate_one(requests: JudgeRequests, judge: Endpoint, view: View, meter: Meter) -> Rating:
    chat, axes = requests.chat(view), requests.axes

    def parse(answer: Answer) -> tuple[dict[Axis, float], str]:
        if answer.truncated:
            raise MalformedAnswer("the answer was cut off at the token limit")
        return parse_scores(answer.text, axes)

    async def vote(number: int) -> tuple[dict[str, Any], list[str]]:
        try:
            (scores, why), request_ids = await judge.ask_with_retry(
                chat, parse, purpose=PURPOSE, attempts=_ATTEMPTS, first_sample=number * _SAMPLES_PER_RATING
            )
        except NoAnswer:
            meter.share("ratings", False)
            raise
        meter.share("ratings", True)
        return {**{str(axis): score for axis, score in scores.items()}, "why": clean_text(why)}, request_ids

    rating = Rating()
    found = await asyncio.gather(*map(vote, range(requests.settings.ratings)), return_exceptions=True)
    for result in found:
        if isinstance(result, NoAnswer):
            rating.request_ids += result.request_ids
            if rating.fault is None:
                rating.fault = result.reason
                meter.drop(result.reason, str(result))
        elif isinstance(result, BaseException):
            raise result
        else:
            rating.votes.append(result[0])
            rating.request_ids += result[1]
    return rating
