"""The client: its concurrency limit, pauses, stops and costs."""

from __future__ import annotations

import asyncio
import itertools
import time
from pathlib import Path
from typing import Any

import pytest
from generation_runs import run_deliberate, settings_for
from scripted_model import ScriptedModel, status

from delib_fast.config import ConfigError
from delib_fast.config.load import load
from delib_fast.datagen.backends import EndpointError, NoAnswer
from delib_fast.datagen.client import Client, for_each
from delib_fast.datagen.progress import Meter
from delib_fast.datagen.request_log import Answer, RequestLog
from delib_fast.datagen.settings import SETTINGS_FILE, DeliberateSettings, EndpointSettings
from delib_fast.datagen.spec import Spec
from delib_fast.datagen.stopping import BudgetSpent


def ask_all(model: ScriptedModel, folder: Path, texts: list[str], **changes: Any) -> tuple[list[Any], Client]:
    """Request an answer to each text. Returns answers and exceptions in the order of the texts."""
    settings = settings_for(model, generator=changes).generator
    found: dict[int, Any] = {}

    async def main() -> Client:
        log = RequestLog(folder / "requests.jsonl")
        client = Client(log, Meter(log))
        endpoint = client.endpoint(settings)

        async def one(item: tuple[int, str]) -> None:
            try:
                found[item[0]] = await endpoint.ask(({"role": "user", "content": item[1]},), purpose="p")
            except NoAnswer as error:
                found[item[0]] = error

        try:
            async with client.running():
                await for_each(list(enumerate(texts)), one, client, concurrency=64)
        finally:
            log.close()
        return client

    client = asyncio.run(main())
    return [found.get(i) for i in range(len(texts))], client


@pytest.fixture(autouse=True)
def _plain_answers(model: ScriptedModel) -> None:
    model.answer = lambda purpose, text: f"an answer to {text}"


def test_concurrency_limits_the_requests_in_flight(model: ScriptedModel, tmp_path: Path) -> None:
    model.delay_s = 0.03
    answers, _ = ask_all(model, tmp_path, [f"{i}" for i in range(24)], concurrency=3)
    assert [a.text for a in answers] == [f"an answer to {i}" for i in range(24)]
    assert model.most_concurrent == 3


def test_equal_requests_are_sent_once(model: ScriptedModel, tmp_path: Path) -> None:
    model.delay_s = 0.05
    answers, client = ask_all(model, tmp_path, ["same"] * 8 + ["other"])
    assert len(model.received) == 2
    assert {a.text for a in answers} == {"an answer to same", "an answer to other"}
    assert client.meter.answers == 2


@pytest.mark.parametrize("header", [{"Retry_After": "0.6"}, {"retry_after_ms": "600"}])
def test_retry_after_pauses_the_whole_endpoint(header: dict[str, str], model: ScriptedModel, tmp_path: Path) -> None:
    """After a 429, no request is sent until the pause that the endpoint requested is over."""
    limited_at: list[float] = []

    def fault(key, attempt, purpose, request):
        if not limited_at:
            limited_at.append(time.monotonic())
            return status(429, **header)
        return None

    model.fault, model.delay_s = fault, 0.02
    answers, client = ask_all(model, tmp_path, [f"{i}" for i in range(12)], concurrency=2)
    assert all(isinstance(a, Answer) for a in answers)
    # Of the other 11, those that were on their way before the client saw the 429 may arrive during the pause.
    assert sum(limited_at[0] < at < limited_at[0] + 0.6 for _, at, _ in model.received) <= 4
    assert client.meter.retries == {"rate_limit": 1}


def test_a_pause_above_longest_wait_s_stops_the_run(model: ScriptedModel, tmp_path: Path) -> None:
    model.fault = lambda key, attempt, purpose, request: status(429, Retry_After="7200")
    with pytest.raises(EndpointError, match="pause of 7200 s"):
        ask_all(model, tmp_path, ["a"])


def test_the_backoff_doubles_with_each_attempt(model: ScriptedModel, tmp_path: Path) -> None:
    model.fault = lambda key, attempt, purpose, request: status(500) if attempt < 4 else None
    ask_all(model, tmp_path, ["a"], first_backoff_s=0.1, attempts=4)
    at = [at for _, at, _ in model.received]
    gaps = [b - a for a, b in itertools.pairwise(at)]
    for gap, low in zip(gaps, (0.05, 0.1, 0.2), strict=True):
        assert low <= gap


@pytest.mark.parametrize(
    ("code", "words"), [(401, "OPENAI_API_KEY"), (403, "rejects the key"), (404, "no model 'scripted'")]
)
def test_permanent_error_stops_the_run_immediately(code: int, words: str, model: ScriptedModel, tmp_path: Path) -> None:
    model.fault = lambda key, attempt, purpose, request: status(code)
    with pytest.raises(EndpointError, match=words):
        ask_all(model, tmp_path, [f"{i}" for i in range(20)], concurrency=1)
    assert len(model.received) == 1


def test_exhausted_quota_is_not_a_rate_limit(model: ScriptedModel, tmp_path: Path) -> None:
    def fault(key, attempt, purpose, request):
        response = status(429)
        response.set_data('{"error": {"message": "none left", "code": "insufficient_quota"}}')
        return response

    model.fault = fault
    with pytest.raises(EndpointError, match="no quota left"):
        ask_all(model, tmp_path, ["a"])
    assert len(model.received) == 1


def test_endpoint_where_every_request_fails_stops_the_run(model: ScriptedModel, tmp_path: Path) -> None:
    model.fault = lambda key, attempt, purpose, request: status(500)
    with pytest.raises(EndpointError, match="does not answer"):
        ask_all(model, tmp_path, [f"{i}" for i in range(100)], concurrency=4, attempts=2)
    assert len(model.received) <= 64 * 2


def test_max_cost_stops_the_run(model: ScriptedModel, spec: Spec, prompts_file: Path, tmp_path: Path) -> None:
    model.answer = lambda purpose, text: None
    settings = settings_for(model, max_cost=0.03, generator={"max_tokens": 2000})
    with pytest.raises(BudgetSpent):
        asyncio.run(run_deliberate(tmp_path / "out", spec, settings, prompts_file))
    log = RequestLog(tmp_path / "out" / "requests.jsonl")
    # Near the limit, a request is only sent if its longest possible answer still fits.
    assert 0.03 - (0.005 + 2 * 0.002) < log.totals.cost <= 0.03
    expected = (log.totals.prompt_tokens * 1.0 + log.totals.completion_tokens * 2.0) / 1e6
    assert log.totals.cost == pytest.approx(expected)
    settings = settings_for(model, generator={"max_tokens": 2000})
    summary = asyncio.run(run_deliberate(tmp_path / "out", spec, settings, prompts_file))
    assert summary["rows"] == 12
    assert model.paid_twice() == []


def test_missing_token_counts_are_counted_not_estimated(model: ScriptedModel, tmp_path: Path) -> None:
    from werkzeug import Response

    body = '{"choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "hi"}}]}'
    model.fault = lambda key, attempt, purpose, request: Response(body, content_type="application/json")
    (answer,), client = ask_all(model, tmp_path, ["a"])
    assert (answer.text, answer.completion_tokens) == ("hi", None)
    assert client.log.totals.without_usage == 1


def test_key_is_read_only_from_the_environment(
    model: ScriptedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-1234567")
    ask_all(model, tmp_path, ["a"], api_key_env="MY_KEY")
    assert model.authorization == {"Bearer sk-1234567"}
    remote = EndpointSettings(model="m", base_url="https://models.example/v1", api_key_env="NOT_SET_ANYWHERE")
    log = RequestLog(tmp_path / "r.jsonl")
    with pytest.raises(ConfigError, match="set the environment variable NOT_SET_ANYWHERE"):
        Client(log, Meter()).endpoint(remote)
    for bad in ({"api_key": "sk-1"}, {"base_url": "https://me:sk-1@models.example/v1"}, {"extra": {"messages": []}}):
        with pytest.raises(ConfigError):
            load(DeliberateSettings, None, SETTINGS_FILE, [f"generator={bad}".replace("'", '"')])
