"""Anthropic's Messages API, and what both APIs report as errors."""

from __future__ import annotations

import asyncio
import base64
import json
from pathlib import Path
from typing import Any

import pytest
from batch_servers import AnthropicBatchServer
from generation_runs import read_rows, run_deliberate, settings_for
from pytest_httpserver import HTTPServer
from scripted_model import ScriptedModel
from werkzeug import Request, Response

from delib_fast.config import ConfigError
from delib_fast.datagen import answers, batch_apis
from delib_fast.datagen.answers import Answer, token_count
from delib_fast.datagen.backends import EndpointError, RequestRejected, Retry
from delib_fast.datagen.dialects import AnthropicDialect, OpenAIDialect, decode, params_of, retry_after
from delib_fast.datagen.endpoints import EndpointBackend, base_url_of
from delib_fast.datagen.judge import request_verdicts
from delib_fast.datagen.settings import EndpointSettings
from delib_fast.evals.settings import JudgeConfig

CHAT = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
)


def anthropic(**changes: Any) -> EndpointSettings:
    return EndpointSettings(**{"model": "m", "api": "anthropic", **changes})


def test_a_run_with_anthropics_api(model: ScriptedModel, spec, prompts_file, tmp_path: Path, monkeypatch) -> None:
    """The same rows as with OpenAI's API, except for the samples, which are drawn by the ids of their requests."""
    monkeypatch.setenv("ANTHROPIC_API_KEY", "key-for-tests")
    keys: set[str | None] = set()
    with HTTPServer(host="127.0.0.1", port=0, threaded=True) as server:
        endpoint = AnthropicBatchServer(server)
        endpoint.fault = lambda request, when: keys.add(request.headers["x-api-key"])  # type: ignore[func-returns-value]
        settings = settings_for(endpoint, generator={"api": "anthropic"})
        summary = asyncio.run(run_deliberate(tmp_path / "out", spec, settings, prompts_file))
        assert endpoint.paid_twice() == []
    assert summary["rows"] == 12
    assert keys == {"key-for-tests"}
    assert summary["paid"]["completion_tokens"] > 0
    assert {row["generator"]["served_by"] for row in read_rows(tmp_path / "out" / "rows.jsonl")} == {"scripted-0613"}


def test_the_body_of_a_request() -> None:
    request = answers.Request("p", "m", CHAT, params_of(anthropic(extra={"top_k": 5})))
    assert AnthropicDialect().body(request) == {
        "model": "m",
        "system": "Be brief.",
        "messages": [{"role": "user", "content": "Hello"}],
        "temperature": 1.0,  # without top_p: the API rejects requests with both
        "max_tokens": 4096,
        "top_k": 5,
    }
    assert params_of(anthropic(top_p=0.9))["top_p"] == 0.9
    assert OpenAIDialect().body(request)["messages"] == list(CHAT)
    assert params_of(EndpointSettings(model="m")) == {"temperature": 1.0, "top_p": 1.0, "max_tokens": 4096}


MESSAGE = {
    "type": "message",
    "model": "served",
    "content": [
        {"type": "thinking", "thinking": "hm, ", "signature": "x"},
        {"type": "redacted_thinking", "data": "x"},
        {"type": "thinking", "thinking": "yes"},
        {"type": "text", "text": "Good "},
        {"type": "text", "text": "day"},
    ],
    "stop_reason": "end_turn",
    "usage": {"input_tokens": 5, "cache_creation_input_tokens": 10, "cache_read_input_tokens": 100, "output_tokens": 7},
}


def test_an_answer() -> None:
    assert AnthropicDialect().parse(MESSAGE) == Answer("Good day", "stop", "hm, yes", 115, 7, "served")


@pytest.mark.parametrize(
    ("stop_reason", "finish", "truncated"),
    [
        ("max_tokens", "max_tokens", True),
        ("model_context_window_exceeded", "model_context_window_exceeded", True),
        ("refusal", "content_filter", False),
        ("stop_sequence", "stop_sequence", False),
        (None, "unknown", False),
        (7, "unknown", False),
    ],
)
def test_reasons_to_stop(stop_reason: Any, finish: str, truncated: bool) -> None:
    answer = AnthropicDialect().parse({**MESSAGE, "stop_reason": stop_reason})
    assert (answer.finish, answer.truncated) == (finish, truncated)


@pytest.mark.parametrize(
    "changes",
    [{"type": "error"}, {"content": 7}, {"content": ["text"]}, {"content": {"type": "text"}}, {"type": None}],
)
def test_malformed_messages(changes: dict[str, Any]) -> None:
    with pytest.raises(Retry, match="malformed_body: the answer is not a message"):
        AnthropicDialect().parse({**MESSAGE, **changes})


def respond(status: int, error: Any, **headers: str) -> Response:
    body = json.dumps({"type": "error", "error": error})
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    return Response(body, status=status, content_type="application/json", headers=fields)


@pytest.mark.parametrize(
    ("response", "kind", "message"),
    [
        (respond(529, {"type": "overloaded_error", "message": "busy"}), Retry, "http_529: busy"),
        (respond(429, {"type": "rate_limit_error", "message": "slow"}, Retry_After="7"), Retry, "rate_limit: slow"),
        (
            respond(429, {"type": "rate_limit_error", "details": {"error_code": "enforced_spend_limit_reached"}}),
            EndpointError,
            "no quota left",
        ),
        (respond(402, {"type": "billing_error", "message": "pay"}), EndpointError, "no quota left: pay"),
        (respond(401, {"type": "authentication_error", "message": "x"}), EndpointError, "variable ANTHROPIC_API_KEY"),
        (respond(404, {"type": "not_found_error", "message": "x"}), EndpointError, "has no model 'm', or no /messages"),
        (respond(413, {"type": "request_too_large", "message": "long"}), RequestRejected, "HTTP 413: long"),
    ],
)
def test_errors(response: Response, kind: type, message: str, httpserver: HTTPServer) -> None:
    httpserver.expect_request("/v1/messages").respond_with_response(response)

    async def main() -> None:
        backend = EndpointBackend(anthropic(base_url=httpserver.url_for("/")))
        try:
            await backend.complete(answers.Request("p", "m", CHAT, {}))
        finally:
            await backend.close()

    with pytest.raises(kind) as error:
        asyncio.run(main())
    assert message in str(error.value)
    if "Retry-After" in response.headers:
        assert error.value.after_s == 7


def test_a_judge_with_anthropics_api(httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELIB_FAST_JUDGE_KEY", "judge-key")

    def handler(request: Request) -> Response:
        assert request.headers["x-api-key"] == "judge-key"
        text = "<answer>yes</answer>"
        return Response(json.dumps({**MESSAGE, "content": [{"type": "text", "text": text}]}))

    httpserver.expect_request("/v1/messages").respond_with_handler(handler)
    judge = JudgeConfig(base_url=httpserver.url_for("/v1"), model="m", api="anthropic")
    assert request_verdicts(judge.endpoint, ["x", "y"], ["yes", "no"]) == ["yes", "yes"]


@pytest.mark.parametrize(
    ("settings", "variables", "expected"),
    [
        ({}, {}, "https://api.openai.com/v1"),
        ({}, {"OPENAI_BASE_URL": "http://127.0.0.1:1/v1/"}, "http://127.0.0.1:1/v1"),
        ({"api": "anthropic"}, {}, "https://api.anthropic.com/v1"),
        ({"api": "anthropic"}, {"ANTHROPIC_BASE_URL": "http://127.0.0.1:1"}, "http://127.0.0.1:1/v1"),
        ({"api": "anthropic", "base_url": "http://127.0.0.1:1/v1"}, {}, "http://127.0.0.1:1/v1"),
    ],
)
def test_addresses(settings, variables, expected, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_BASE_URL", "ANTHROPIC_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert base_url_of(EndpointSettings(model="m", **settings)) == expected


def test_invalid_addresses_and_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "http://user:pass@host/v1")
    with pytest.raises(ConfigError, match=r"\$OPENAI_BASE_URL: base_url contains a user name or key before the @"):
        base_url_of(EndpointSettings(model="m"))
    for url in (
        "http://host:99999/v1",
        "http://",
        "http://[::1/v1",
        "http://a b/v1",
        "http://h/v1?key=x",
        "http://h/#",
    ):
        with pytest.raises(ValueError, match="base_url"):
            EndpointSettings(model="m", base_url=url)
    monkeypatch.setenv("OPENAI_API_KEY", "kéy")
    with pytest.raises(ConfigError, match="OPENAI_API_KEY is not printable ASCII"):
        EndpointBackend(EndpointSettings(model="m", base_url="http://127.0.0.1:1/v1"))


# --- values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *((n, n) for n in (0, 7, 10**8)),
        (7.0, 7),
        *((bad, None) for bad in (10**8 + 1, 10**320, -1, 7.5, float("nan"), float("inf"), True, "7", None, [7], {})),
    ],
)
def test_token_counts(value: Any, expected: int | None) -> None:
    assert token_count(value) == expected
    assert Answer("x", "stop", None, value, value).completion_tokens == expected


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("plain ü \U0001f600 \x1b\n", "plain ü \U0001f600 \x1b\n"),
        ("a\0b", "a\ufffdb"),
        ("\ud800", "\ufffd"),
        ("\udc00\ud800", "\ufffd\ufffd"),
        ("\ud83d\ude00", "\U0001f600"),
    ],
)
def test_texts(text: str, cleaned: str) -> None:
    answer = Answer(text, text, text, served_by=text)
    assert {answer.text, answer.finish, answer.reasoning, answer.served_by} == {cleaned}


def test_names_of_an_endpoint_are_short() -> None:
    answer = Answer("x", "y" * 10**6, served_by="z" * 10**6)
    assert (len(answer.finish), len(answer.served_by)) == (64, 200)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after-ms": "600"}, 0.6),
        ({"retry-after": "-5"}, 0.0),
        ({"retry-after": "1e400"}, float("inf")),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "Thu, 01 Jan 1970 00:00:00 GMT"}, 0.0),
        ({"retry-after": "Fri, 31 Dec 99999 23:59:59 GMT"}, None),
        ({}, None),
    ],
)
def test_retry_after(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers) == seconds


def test_bodies() -> None:
    assert decode(b'\xef\xbb\xbf{"a": "\xff", "n": ' + b"9" * 5000 + b"}") == {"a": "\ufffd", "n": None}
    for body, message in (
        (b"", "is not JSON: ''"),
        (b"<html>", "is not JSON: '<html>'"),
        (b"7", "is not a JSON object, but a int"),
        (b"[" * 10**6, "nested too deeply"),
    ):
        with pytest.raises(Retry, match="malformed_body") as error:
            decode(body)
        assert message in str(error.value)


@pytest.mark.parametrize("before", [53, 59, 65, 71])
def test_a_key_is_removed_before_a_message_is_cut(before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message shows the first characters of what an endpoint sent, which may end inside of the key."""
    key = "Canary-7f3a9b1c2d4e5f6a7b8c9d"
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(Retry) as body:
        decode(f"{'x' * before} {key}".encode())
    assert str(body.value) == f"malformed_body: the body is not JSON: '{'x' * before} ***'"
    with pytest.raises(EndpointError) as name:
        batch_apis._id(f"{'x' * (before - 20)} {key}")
    assert f"sent '{'x' * (before - 20)} ***' as the id" in str(name.value)
    shown = f"{'x' * before} {base64.b64encode(key.encode()).decode()}"
    for answer in (
        OpenAIDialect().parse({"choices": [{"message": {"content": "a"}, "finish_reason": shown}], "model": shown}),
        AnthropicDialect().parse(
            {"type": "message", "content": [{"type": "text", "text": "a"}], "stop_reason": shown, "model": shown}
        ),
    ):
        # The last one or two characters of Base64 remain: they also depend on what follows the key.
        assert answer.finish[: before + 4] == f"{'x' * before} ***"[:64]
        assert answer.served_by[: before + 4] == f"{'x' * before} ***"
        assert len(answer.served_by) <= before + 6


def test_text_that_is_not_text_makes_no_row(model: ScriptedModel, spec, prompts_file, tmp_path: Path) -> None:
    """An answer with a NUL is paid for and kept in the log, but training would refuse a row with it."""
    broken = (
        "<deliberation>\nI think about it for a while, and then I say it.\n</deliberation>\n<reply>\na\0b\n</reply>"
    )
    model.answer = lambda purpose, text: broken if purpose == "generate" and "sourdough" in text else None
    summary = asyncio.run(run_deliberate(tmp_path / "out", spec, settings_for(model), prompts_file))
    assert (summary["rows"], summary["dropped"]) == (10, {"damaged_text": 2})
    assert "\\u0000" not in (tmp_path / "out" / "requests.jsonl").read_text()


def test_lists_with_characters_that_are_not_text(model: ScriptedModel, spec, tmp_path: Path) -> None:
    """The JSON inside an answer has its own escapes: they become prompts, which must be text."""
    model.answer = lambda purpose, text: (
        '["How do I prune\\u0000a rose?", "May I read \\ud800 it?", "What is the tide at noon?"]'
        if purpose == "user_messages"
        else None
    )
    settings = settings_for(model, prompts_from_spec=4, samples=1)
    summary = asyncio.run(run_deliberate(tmp_path / "out", spec, settings, None))
    assert summary["rows"] == 1
    assert read_rows(tmp_path / "out" / "rows.jsonl")[0]["prompt"] == "What is the tide at noon?"
