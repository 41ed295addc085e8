"""Hostile endpoints: the key and the prompt stay at the origin, time and memory are bounded, and what was paid for is
kept. Each test names the behaviour of `hostile_endpoint.py`."""

from __future__ import annotations

import asyncio
import json
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("httpx", reason="generation needs the httpx package (extra `generate`)")

import typer
from helpers.marks import full
from hostile_endpoint import BEHAVIOURS, CONTENTS, MALFORMED, STATUS_200_ERRORS, USAGES, HostileEndpoint
from typer.testing import CliRunner

from delib_fast.cli.datagen import register
from delib_fast.datagen.answers import Answer
from delib_fast.datagen.backends import EndpointError, NoAnswer
from delib_fast.datagen.client import Client, for_each
from delib_fast.datagen.judge import JudgeError, request_verdicts
from delib_fast.datagen.progress import Meter
from delib_fast.datagen.request_log import RequestLog, read_answers
from delib_fast.datagen.settings import EndpointSettings

KEY = "sk-canary-4fK29vWq77Zx"
PROMPT = "the secret prompt about harbours"
GENEROUS_S = 60.0  # for a bounded test, on a busy machine


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> Iterator[HostileEndpoint]:
    with HostileEndpoint() as server:
        yield server


def settings_for(url: str, **changes: Any) -> EndpointSettings:
    return EndpointSettings(
        **{
            "model": "m",
            "base_url": url,
            "first_backoff_s": 0.01,
            "attempts": 2,
            "price_in": 1.0,
            "price_out": 2.0,
            "max_tokens": 100,
            **changes,
        }
    )


def ask(url: str, folder: Path, prompts: tuple[str, ...] = (PROMPT,), **changes: Any) -> list[Any]:
    """Request an answer to each prompt. Returns answers and NoAnswers, in order; raises the cause of a stop."""
    found: dict[str, Any] = {}

    async def main() -> None:
        log = RequestLog(folder / "requests.jsonl")
        client = Client(log, Meter(log))
        endpoint = client.endpoint(settings_for(url, **changes))

        async def one(prompt: str) -> None:
            try:
                found[prompt] = await endpoint.ask(({"role": "user", "content": prompt},), purpose="p")
            except NoAnswer as error:
                found[prompt] = error

        try:
            async with client.running():
                await for_each(prompts, one, client, concurrency=8)
        finally:
            log.close()

    asyncio.run(asyncio.wait_for(main(), GENEROUS_S))
    return [found[prompt] for prompt in prompts]


def failures(folder: Path) -> list[dict[str, Any]]:
    """The failed attempts in the request log."""
    lines = (folder / "requests.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["is"] == "failed"]


# --- the origin -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [300, 301, 302, 303, 304, 305, 307, 308])
def test_no_redirect_is_followed(status: int, server: HostileEndpoint, tmp_path: Path) -> None:
    """Neither the generator nor the judge sends anything to the target, and the message names it and the remedy."""
    with HostileEndpoint() as elsewhere:
        target = elsewhere.url("valid")
        server.targets["other"] = f"{target}/chat/completions"
        url = server.url(f"redirect-{status}-other")
        with pytest.raises(EndpointError) as generator:
            ask(url, tmp_path)
        with pytest.raises(JudgeError) as judge:
            request_verdicts(settings_for(url), ["x"], ["yes", "no"])
        assert elsewhere.received == []
    expected = (
        f"{url} redirects to {target}/chat/completions (HTTP {status}). No redirect is followed, because the key and "
        f"the prompt would be sent there; if you trust that address, set base_url to {target}"
    )
    assert str(generator.value) == expected
    assert str(judge.value) == f"judge 'm' at {url}: {expected}"
    assert server.requests == 2


@pytest.mark.parametrize(
    ("location", "target", "remedy"),
    [
        ("https://127.0.0.1:1/v1/chat/completions", None, "https://127.0.0.1:1/v1"),  # the same host with TLS
        ("/elsewhere/chat/completions", "http://{host}/elsewhere/chat/completions", "http://{host}/elsewhere"),
        ("//other.example/x", "http://other.example/x", "http://other.example/x"),
        (f"https://other.example/?k={KEY}", "https://other.example/?k=***", "https://other.example/"),
        ("http://other.example:99999/x", None, "http://other.example:99999/x"),
        ("javascript:alert(1)", None, "javascript:alert(1)"),
    ],
)
def test_targets_of_redirects(
    location: str, target: str | None, remedy: str, server: HostileEndpoint, tmp_path: Path
) -> None:
    server.targets["x"] = location
    url = server.url("redirect-307-x")
    host = url.split("/")[2]
    with pytest.raises(EndpointError) as error:
        ask(url, tmp_path)
    shown = (target or location).format(host=host)
    assert f"redirects to {shown} (HTTP 307)" in str(error.value)
    assert str(error.value).endswith(f"set base_url to {remedy.format(host=host)}")
    assert KEY not in str(error.value)


def test_a_redirect_without_a_target(server: HostileEndpoint, tmp_path: Path) -> None:
    url = server.url("redirect-302-none")
    with pytest.raises(EndpointError, match=r"\(HTTP 302\)\. No redirect is followed.*would be sent there$"):
        ask(url, tmp_path)


def test_cookies_are_not_kept(server: HostileEndpoint, tmp_path: Path) -> None:
    ask(server.url("cookies"), tmp_path, tuple("abcdef"), concurrency=1)
    assert (server.requests, server.cookies) == (6, 0)


def test_an_echoed_key_is_not_shown(server: HostileEndpoint, tmp_path: Path) -> None:
    """The body repeats the key after 280 characters, where a message is cut, with escape codes."""
    with pytest.raises(EndpointError) as error:
        ask(server.url("echo-401"), tmp_path)
    message = str(error.value)
    assert "wrong key ***" in message
    assert KEY[:8] not in message
    assert message.isprintable()


# --- time and memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("behaviour", ["drip", "drip-head", "silence", "early-hints"])
def test_an_attempt_has_a_deadline(behaviour: str, server: HostileEndpoint, tmp_path: Path) -> None:
    """A byte now and then does not extend the deadline, which holds for each attempt."""
    start = time.monotonic()
    (answer,) = ask(server.url(behaviour), tmp_path, timeout_s=0.3)
    assert time.monotonic() - start >= 0.6
    assert isinstance(answer, NoAnswer)
    assert server.by_behaviour[behaviour] == 2
    found = failures(tmp_path)
    assert [(f["reason"], f["attempt"]) for f in found] == [("timeout", 1), ("timeout", 2)]
    assert found[0]["detail"] == "timeout: no complete answer within 0.3 s"
    # The endpoint may charge for what it did not send: 100 tokens of an answer and at most a token for each byte.
    assert all(f["at_most"] == {"tokens": 100 + len(PROMPT) + 32, "cost": pytest.approx(264e-6)} for f in found)


def test_the_number_of_pieces_is_bounded(server: HostileEndpoint, tmp_path: Path) -> None:
    """Two bytes of a body take as much time as 64 KiB."""
    (answer,) = ask(server.url("two-bytes-at-a-time"), tmp_path, attempts=1)
    assert isinstance(answer, NoAnswer)
    assert "too_large: the answer has more than 20,000 pieces of less than 64 bytes" in str(answer)


@pytest.mark.parametrize("behaviour", ["endless-body", "gzip-bomb"])
def test_the_size_of_an_answer_is_bounded(behaviour: str, server: HostileEndpoint, tmp_path: Path) -> None:
    """The limit holds after decompression, and in memory."""
    tracemalloc.start()
    (answer,) = ask(server.url(behaviour), tmp_path, max_answer_mib=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(answer, NoAnswer)
    detail = "too_large: the answer has more than 2 MiB; if that is right, raise max_answer_mib"
    assert [f["detail"] for f in failures(tmp_path)] == [detail, detail]
    assert peak < 16 * 2**20


def test_an_endless_head_is_a_failed_attempt(server: HostileEndpoint, tmp_path: Path) -> None:
    with pytest.raises(EndpointError, match=r"does not answer \(connection: RemoteProtocolError"):
        ask(server.url("endless-head"), tmp_path)
    assert {f["reason"] for f in failures(tmp_path)} == {"connection"}


@pytest.mark.parametrize("behaviour", ["gzip-of-gzip", "zstd", "gzip-cut"])
def test_other_encodings_are_refused(behaviour: str, server: HostileEndpoint, tmp_path: Path) -> None:
    ask(server.url(behaviour), tmp_path)
    assert [f["reason"] for f in failures(tmp_path)] == ["malformed_body"] * 2
    assert "content-encoding" in failures(tmp_path)[0]["detail"]


def test_gzip_is_read(server: HostileEndpoint, tmp_path: Path) -> None:
    (answer,) = ask(server.url("gzip-valid"), tmp_path)
    assert answer.text == "Here is an answer."


# --- answers --------------------------------------------------------------------------------------------------


def the_same_from_the_log(answer: Answer, folder: Path) -> None:
    log = RequestLog(folder / "requests.jsonl")
    assert log.get(answer.request_id) == answer
    (record,) = read_answers(log.path)
    assert record["answer"]["text"] == answer.text
    log.close()


@pytest.mark.parametrize("behaviour", USAGES)
def test_an_impossible_usage_loses_no_answer(behaviour: str, server: HostileEndpoint, tmp_path: Path) -> None:
    """The answer is kept; its tokens count as not reported, and towards a budget as the most that they can be."""
    (answer,) = ask(server.url(behaviour), tmp_path)
    assert (answer.text, answer.prompt_tokens, answer.completion_tokens) == ("Here is an answer.", None, None)
    the_same_from_the_log(answer, tmp_path)
    totals = RequestLog(tmp_path / "requests.jsonl").totals
    assert (totals.answers, totals.without_usage, totals.cost) == (1, 1, None)
    assert totals.at_most.tokens == 100 + len(PROMPT) + 32
    (again,) = ask(server.url(behaviour), tmp_path)
    assert again == answer
    assert server.requests == 1


@pytest.mark.parametrize("behaviour", CONTENTS)
def test_contents_are_cleaned(behaviour: str, server: HostileEndpoint, tmp_path: Path) -> None:
    (answer,) = ask(server.url(behaviour), tmp_path)
    assert answer.text == CONTENTS[behaviour][1]
    assert (answer.prompt_tokens, answer.completion_tokens) == (5, 7)
    the_same_from_the_log(answer, tmp_path)


def test_bytes_that_are_not_utf8(server: HostileEndpoint, tmp_path: Path) -> None:
    (answer,) = ask(server.url("not-utf8"), tmp_path)
    assert answer.text == "a\ufffdb"
    the_same_from_the_log(answer, tmp_path)


def test_tool_calls_are_an_empty_answer(server: HostileEndpoint, tmp_path: Path) -> None:
    (answer,) = ask(server.url("tool-calls"), tmp_path)
    assert (answer.text, answer.finish) == ("", "tool_calls")


@pytest.mark.parametrize("behaviour", [*MALFORMED, "page"])
def test_bodies_without_an_answer(behaviour: str, server: HostileEndpoint, tmp_path: Path) -> None:
    (answer,) = ask(server.url(behaviour), tmp_path)
    assert isinstance(answer, NoAnswer)
    found = failures(tmp_path)
    assert [f["reason"] for f in found] == ["malformed_body"] * 2
    assert all(len(f["detail"]) < 400 and f["detail"].isprintable() for f in found)


@pytest.mark.parametrize("behaviour", STATUS_200_ERRORS)
def test_errors_with_status_200(behaviour: str, server: HostileEndpoint, tmp_path: Path) -> None:
    reasons = {"error-429": "rate_limit", "error-500": "http_500", "error-text": "malformed_body"}
    if behaviour == "error-quota":
        with pytest.raises(EndpointError, match="no quota left: nothing left"):
            ask(server.url(behaviour), tmp_path)
        return
    ask(server.url(behaviour), tmp_path)
    assert {f["reason"] for f in failures(tmp_path)} == {reasons[behaviour]}
    assert json.loads(STATUS_200_ERRORS[behaviour])["error"] in (
        "broken",
        {"code": 429, "message": "slow down"},
        {"code": 500, "message": "broken"},
    )
    assert any(word in failures(tmp_path)[0]["detail"] for word in ("slow down", "broken"))


# --- whole commands -------------------------------------------------------------------------------------------

SPEC = """# Conduct of Quill

## Rules

1. **Answer first.** Put the answer before any concern, and voice a concern once.
2. **Say how sure you are.** Separate what is known from what is guessed, in every answer.
"""
SAMPLE = ("page", "deep", "usage-320-digits", "half-surrogate", "drip", "redirect-307-other")


@pytest.mark.parametrize("command", ["deliberate spec.md prompts.txt", "document spec.md --tokens 2k"])
@pytest.mark.parametrize(
    "behaviour",
    [b if b in SAMPLE else full(b) for b in (*BEHAVIOURS, "redirect-307-other")],
)
def test_a_command_ends_with_a_reason(
    behaviour: str,
    command: str,
    server: HostileEndpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No behaviour makes a row. Every run ends soon, with exit code 3 and a printable reason, and the same again."""
    monkeypatch.chdir(tmp_path)
    Path("spec.md").write_text(SPEC)
    Path("prompts.txt").write_text("How do I prune a rose?\nMay I read my son's diary?\n")
    app = typer.Typer(pretty_exceptions_enable=False)
    register(app)
    server.targets["other"] = "https://other.example/v1/chat/completions"
    settings = ("first_backoff_s=0.01", "attempts=2", "timeout_s=0.5", "max_answer_mib=1")
    arguments = [
        *(*command.split(), "-o", "out", "--model", "m", "--base-url", server.url(behaviour)),
        *(part for setting in settings for part in ("--set", f"generator.{setting}")),
    ]
    for _ in range(2):
        start = time.monotonic()
        result = CliRunner().invoke(app, arguments)
        assert time.monotonic() - start < GENEROUS_S
        assert isinstance(result.exception, SystemExit), result.exception
        assert result.exit_code == 3, result.output
        assert "error: " in result.output
        assert result.output.replace("\n", "").isprintable()
        for text in (result.output, *(p.read_text() for p in Path("out").iterdir() if p.is_file())):
            assert KEY not in text
    assert Path("out/summary.json").exists()
    assert len(server.received) < 200
