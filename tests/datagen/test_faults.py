"""Faults of the endpoint: nothing is lost, and nothing is paid for twice.

Every case runs the whole pipeline against a scripted endpoint that fails in one way. Nothing is lost if the rows are
byte for byte those of a run without faults. Nothing is paid for twice if no request (by its id) received a usable
answer more than once.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from email.utils import formatdate
from pathlib import Path

import pytest
from generation_runs import run_deliberate, settings_for
from scripted_model import ScriptedModel, cut_short, dripping, hang_up, scripted, status
from werkzeug import Request, Response

from delib_fast.datagen.spec import Spec

Fault = Callable[[str, int, str, Request], Response | None]


def first(make: Callable[[Request], Response], times: int = 1) -> Fault:
    """Fail the first attempts of every request."""
    return lambda key, attempt, purpose, request: make(request) if attempt <= times else None


def slow_first(seconds: float) -> Fault:
    def fault(key: str, attempt: int, purpose: str, request: Request) -> Response | None:
        if attempt == 1:
            time.sleep(seconds)
            return status(500)
        return None

    return fault


def html(_: Request) -> Response:
    return Response("<html>gateway</html>", content_type="text/html")


def not_json(_: Request) -> Response:
    return Response('{"choices": [', content_type="application/json")


def no_choices(_: Request) -> Response:
    return Response('{"id": "x", "choices": []}', content_type="application/json")


def in_drops(_: Request) -> Response:
    return dripping(0.001, b'{"id": "x", "object": "chat.completion", "choices": null' + b" " * 1500 + b"}")


FAULTS: dict[str, tuple[Fault | None, str | None]] = {
    # name: (fault, reason under which the retry is counted)
    "none": (None, None),
    "500": (first(lambda _: status(500)), "http_500"),
    "503 twice": (first(lambda _: status(503), 2), "http_503"),
    "429, Retry-After in seconds": (first(lambda _: status(429, Retry_After="0.1")), "rate_limit"),
    "429, Retry-After as a date": (first(lambda _: status(429, Retry_After=formatdate(usegmt=True))), "rate_limit"),
    "429, retry-after-ms": (first(lambda _: status(429, retry_after_ms="50")), "rate_limit"),
    "429 without Retry-After": (first(lambda _: status(429)), "rate_limit"),
    "no answer in time": (slow_first(0.7), "timeout"),
    "408": (first(lambda _: status(408)), "timeout"),
    "connection ends in the middle of the body": (first(cut_short), "connection"),
    "connection ends before an answer": (first(hang_up), "connection"),
    "a web page with status 200": (first(html), "malformed_body"),
    "half a JSON with status 200": (first(not_json), "malformed_body"),
    "an answer without choices": (first(no_choices), "malformed_body"),
    "a useless answer, a few bytes at a time": (first(in_drops), "malformed_body"),
}


@pytest.fixture(scope="module")
def reference() -> dict[str, bytes]:
    return {}


@pytest.mark.parametrize("name", FAULTS)
def test_nothing_lost_nothing_paid_twice(
    name: str, model: ScriptedModel, spec: Spec, prompts_file: Path, tmp_path: Path, reference: dict[str, bytes]
) -> None:
    model.fault, counted_as = FAULTS[name]
    timeout = 0.4 if counted_as == "timeout" else 20
    settings = settings_for(model, style="cite", samples=1, generator={"timeout_s": timeout, "concurrency": 8})
    summary = asyncio.run(run_deliberate(tmp_path / "out", spec, settings, prompts_file))
    rows = (tmp_path / "out" / "rows.jsonl").read_bytes()
    assert rows == reference.setdefault("rows", rows), "the rows differ from those of a run without faults"
    assert summary["rows"] == 6
    assert summary["dropped"] == {}
    assert model.paid_twice() == []
    assert len(model.paid) == summary["paid"]["answers"] == 24  # 6 classified, 6 generated, 12 votes
    assert summary["paid"]["completion_tokens"] > 0
    if counted_as is not None:
        assert summary["this_run"]["retries"][counted_as] >= 24

    model.received.clear()
    again = asyncio.run(run_deliberate(tmp_path / "out", spec, settings, prompts_file))
    assert model.received == []
    assert again["this_run"]["answers"] == 0
    assert again["paid"]["answers"] == 24
    assert (tmp_path / "out" / "rows.jsonl").read_bytes() == rows


def test_malformed_judgement_is_retried(model: ScriptedModel, spec: Spec, prompts_file: Path, tmp_path: Path) -> None:
    """If a judge answers in prose, the vote is requested again, and the prose is never used as a score."""
    seen: set[str] = set()

    def answer(purpose: str, text: str) -> str | None:
        if purpose == "judge" and text not in seen:
            seen.add(text)
            return "I would give it a ten, it is excellent."
        return None

    model.answer = answer
    summary = asyncio.run(run_deliberate(tmp_path / "out", spec, settings_for(model), prompts_file))
    assert summary["rows"] == 12
    assert model.purposes()["judge"] == 12 + 24


@pytest.mark.parametrize(
    "answer",
    [
        "no JSON at all",
        '{"compliance": 9, "helpfulness": 9}',
        '{"compliance": 11, "helpfulness": 9, "reasoning": 9}',
        '{"compliance": true, "helpfulness": 9, "reasoning": 9}',
        '{"compliance": "high", "helpfulness": 9, "reasoning": 9}',
        '{"compliance": 9, "helpfulness": 9, "reasoning": 9} or {"compliance": 2, "helpfulness": 9, "reasoning": 9}',
        '{"compliance": NaN, "helpfulness": 9, "reasoning": 9}',
    ],
)
def test_row_without_a_valid_judgement_is_dropped(
    answer: str, model: ScriptedModel, spec: Spec, prompts_file: Path, tmp_path: Path
) -> None:
    model.answer = lambda purpose, text: answer if purpose == "judge" else None
    settings = settings_for(model, samples=1, list_attempts=2, judge_votes=3)
    summary = asyncio.run(run_deliberate(tmp_path / "out", spec, settings, prompts_file))
    assert summary["rows"] == 0
    assert summary["dropped"] == {"malformed_judge": 6}
    assert model.purposes()["judge"] == 12  # the first vote of each row, requested twice
    dropped = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    assert all(line["votes"] == [] for line in dropped)


def test_one_failing_request_does_not_stop_the_others(
    model: ScriptedModel, spec: Spec, prompts_file: Path, tmp_path: Path
) -> None:
    """A request that always fails with 500 is given up and counted; rerunning the command sends it again."""

    def fail_one(key: str, attempt: int, purpose: str, request: Request) -> Response | None:
        return status(500) if purpose == "generate" and b"sourdough" in request.get_data() else None

    model.fault = fail_one
    settings = settings_for(model)
    summary = asyncio.run(run_deliberate(tmp_path / "out", spec, settings, prompts_file))
    assert summary["rows"] == 10
    assert summary["dropped"] == {"no_answer": 2}
    model.fault = None
    model.received.clear()
    summary = asyncio.run(run_deliberate(tmp_path / "out", spec, settings, prompts_file))
    assert summary["rows"] == 12
    assert model.purposes() == {"generate": 2, "judge": 4}
    assert model.paid_twice() == []


def test_rejected_request_drops_its_sample(
    model: ScriptedModel, spec: Spec, prompts_file: Path, tmp_path: Path
) -> None:
    def reject(key: str, attempt: int, purpose: str, request: Request) -> Response | None:
        return status(400) if purpose == "generate" and b"sourdough" in request.get_data() else None

    model.fault = reject
    summary = asyncio.run(run_deliberate(tmp_path / "out", spec, settings_for(model), prompts_file))
    assert summary["rows"] == 10
    assert summary["dropped"] == {"refused_by_endpoint": 2}
    assert summary["this_run"]["retries"] == {}


@pytest.mark.parametrize(("finish", "reason"), [("length", "truncated"), ("content_filter", "content_filter")])
def test_truncated_answers_never_become_rows(
    finish: str, reason: str, model: ScriptedModel, spec: Spec, prompts_file: Path, tmp_path: Path
) -> None:
    def cut(key: str, attempt: int, purpose: str, request: Request) -> Response | None:
        if purpose != "generate":
            return None
        reply = model.completion(scripted("generate", key), finish=finish)
        return Response(reply, content_type="application/json")

    model.fault = cut
    summary = asyncio.run(run_deliberate(tmp_path / "out", spec, settings_for(model), prompts_file))
    assert summary["rows"] == 0
    assert summary["dropped"] == {reason: 12}
    assert "judge" not in model.purposes(), "a row that cannot be kept is not judged"
