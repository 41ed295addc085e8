"""Replies of the current model from a server, such as vLLM, that serves the folder that a round exported.

The name of the model at the server is its folder, which is what `vllm serve FOLDER` calls it. So a server that still
has the model of the round before does not know the name, and the command stops with what to serve.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

from delib_fast.config import ConfigError
from delib_fast.datagen.answers import Answer
from delib_fast.datagen.backends import EndpointError, NoAnswer
from delib_fast.datagen.client import Client, for_each
from delib_fast.datagen.parsing import split_answer
from delib_fast.datagen.progress import Meter
from delib_fast.datagen.prompt_files import Chat
from delib_fast.datagen.request_log import RequestLog
from delib_fast.datagen.settings import EndpointSettings
from delib_fast.datagen.user_prompts import UserPrompt
from delib_fast.evals.moments import Moment
from delib_fast.evals.sampling import Reply
from delib_fast.rounds.sampling import Drawn
from delib_fast.rounds.settings import SampleConfig

SERVED_LOG = "samples_requests.jsonl"
_SAMPLES_PER_DRAW = 1_000_000  # held-out replies and those of each round are independent requests


def draw_from_server(
    moment: Moment,
    prompts: Sequence[UserPrompt],
    settings: SampleConfig,
    *,
    k: int,
    draw: int,
    system_prompt: str | None,
    out: Path,
) -> list[Drawn]:
    """Request k replies to each prompt. Answers in the request log of the folder are not requested again.

    Args:
        moment: the current model.
        draw: distinguishes the draws of one model: 0 for held-out prompts, else the round.
        system_prompt: prepended to prompts without a system message, as in training.
        out: the folder with the log, which must be locked.
    Raises:
        EndpointError: the server cannot be reached, or does not serve this model.
        ConfigError: the model was exported as an adapter alone, which has no folder of its own.
    """
    assert settings.endpoint is not None
    if moment.adapter is not None:
        raise ConfigError(
            f"sample.endpoint: {moment.adapter} is an adapter without a merged model, which cannot be served"
        )
    served = served_settings(settings, moment)
    log = RequestLog(out / SERVED_LOG)
    meter = Meter(log)
    try:
        return asyncio.run(_draw(served, prompts, k, draw * _SAMPLES_PER_DRAW, system_prompt, log, meter))
    except EndpointError as error:
        raise EndpointError(f"{error}. The model to sample from is {served.model}: serve it under this name") from None
    finally:
        meter.stop()
        log.close()


def served_settings(settings: SampleConfig, moment: Moment) -> EndpointSettings:
    """The endpoint with the name of the current model and the sampling parameters of `sample:`."""
    assert settings.endpoint is not None
    return settings.endpoint.model_copy(
        update={
            "model": os.path.abspath(str(moment.model.path)),
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "max_tokens": settings.max_new_tokens,
        }
    )


async def _draw(
    served: EndpointSettings,
    prompts: Sequence[UserPrompt],
    k: int,
    first_sample: int,
    system_prompt: str | None,
    log: RequestLog,
    meter: Meter,
) -> list[Drawn]:
    client = Client(log, meter)
    jobs = [(prompt, number) for prompt in prompts for number in range(k)]
    found: dict[int, Reply] = {}
    async with client.running():
        endpoint = client.endpoint(served)
        meter.start("sampling", len(jobs))

        async def ask(index: int) -> None:
            prompt, number = jobs[index]
            try:
                answer = await endpoint.ask(
                    _chat(prompt, system_prompt), purpose="sample", sample=first_sample + number
                )
                found[index] = reply_of(answer)
            except NoAnswer as error:
                meter.drop(error.reason, str(error))
                found[index] = Reply(None, "", "none", finished=True, tokens=0)
            meter.advance()

        await for_each(range(len(jobs)), ask, client, concurrency=2 * served.concurrency)
    return [Drawn(prompt, number, found[index]) for index, (prompt, number) in enumerate(jobs)]


def _chat(prompt: UserPrompt, system_prompt: str | None) -> Chat:
    turns = prompt.turns
    if system_prompt and turns[0]["role"] != "system":
        turns = ({"role": "system", "content": system_prompt}, *turns)
    return turns


def reply_of(answer: Answer) -> Reply:
    """An answer of the server as a reply: its chain of thought is its reasoning, or a think block in its text."""
    parts = split_answer(answer, "reasoning")
    tags = {"truncated": "unclosed", "leaked_scaffolding": "stray"}.get(parts.fault or "")
    if tags is None:
        tags = "closed" if parts.cot else "none"
    tokens = answer.completion_tokens or 0
    return Reply(parts.cot or None, parts.response or "", tags, not answer.truncated, tokens)  # type: ignore[arg-type]
