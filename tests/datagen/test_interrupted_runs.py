"""Runs that end early, by a kill, a signal or a dead server: they resume, and nothing is paid for twice."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_process import CliProcess
from generation_runs import run_deliberate, settings_for
from pytest_httpserver import HTTPServer
from scripted_model import SPEC, ScriptedModel, status

from delib_fast.datagen.backends import EndpointError
from delib_fast.datagen.spec import Spec

_CONCURRENCY = 4


class Command:
    """`delib-fast deliberate` in a separate process."""

    def __init__(self, folder: Path, model: ScriptedModel, prompts: Path, *more: str, key: str | None = None) -> None:
        spec, config = folder / "spec.md", folder / "settings.yaml"
        spec.write_text(SPEC)
        config.write_text(
            "generator: {first_backoff_s: 0.02, attempts: 4, timeout_s: 20}\nsamples: 2\njudge_votes: 2\n"
            "model_name: Quill\nprovider_name: Fern\n"
        )
        self.folder, self.out = folder, folder / "out"
        self.args = [
            "deliberate",
            str(spec),
            str(prompts),
            "-o",
            str(self.out),
            "--config",
            str(config),
            "--model",
            "scripted",
            "--base-url",
            model.base_url,
            "--concurrency",
            str(_CONCURRENCY),
            *more,
        ]
        self.environment = {"OPENAI_API_KEY": key} if key else {}

    def start(self) -> CliProcess:
        return CliProcess(self.args, self.folder, self.environment)

    def run(self) -> tuple[int, str]:
        return self.start().wait()


def wait_for(what: Callable[[], bool], seconds: float = 900) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "the condition was never met"
        time.sleep(0.005)


def answers_in(log: Path) -> set[str]:
    found = set()
    for line in log.read_bytes().split(b"\n")[:-1]:
        record = json.loads(line)
        if record["is"] == "answer":
            found.add(record["id"])
    return found


@pytest.fixture
def expected(model: ScriptedModel, spec: Spec, prompts_file: Path, tmp_path: Path) -> bytes:
    """The rows of an undisturbed run."""
    asyncio.run(run_deliberate(tmp_path / "undisturbed", spec, settings_for(model), prompts_file))
    model.paid.clear()
    model.received.clear()
    return (tmp_path / "undisturbed" / "rows.jsonl").read_bytes()


def test_a_killed_run_resumes_and_repeats_only_requests_in_flight(
    model: ScriptedModel, prompts_file: Path, tmp_path: Path, expected: bytes
) -> None:
    """Killed three times: only the requests that were in flight at a kill may be paid for again."""
    model.delay_s = 0.05
    command = Command(tmp_path, model, prompts_file)
    in_flight = 0
    for more in (8, 7, 9):
        target = len(model.paid) + more
        process = command.start()
        wait_for(lambda target=target: len(model.paid) >= target)
        process.send_signal(signal.SIGKILL)
        assert process.wait()[0] == -signal.SIGKILL
        kept = answers_in(command.out / "requests.jsonl")
        time.sleep(0.3)  # the server sends answers to the killed process
        lost = set(model.paid) - kept
        assert len(lost) <= _CONCURRENCY, "an answer that had arrived was not on disk"
        in_flight += len(lost)
        received_before = len(model.received)
        assert not (command.out / "rows.jsonl").exists(), "rows of an unfinished run"
        model.server.check_handler_errors()
    code, output = command.run()
    assert code == 0, output
    assert (command.out / "rows.jsonl").read_bytes() == expected
    assert {key for key, *_ in model.received[received_before:]}.isdisjoint(kept), (
        "a request with an answer on disk was sent again"
    )
    assert sum(model.paid.values()) - len(model.paid) <= in_flight


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_keeps_the_answers_in_flight(
    sig: signal.Signals, model: ScriptedModel, prompts_file: Path, tmp_path: Path, expected: bytes
) -> None:
    """Ctrl-C: answers in flight are waited for and kept, so nothing is paid for twice."""
    model.delay_s = 0.1
    command = Command(tmp_path, model, prompts_file)
    process = command.start()
    wait_for(lambda: len(model.paid) >= 9)
    process.send_signal(sig)
    code, output = process.wait()
    assert code == 130, output
    assert "the same command resumes from there" in output
    assert "Traceback" not in output
    assert answers_in(command.out / "requests.jsonl") == set(model.paid)
    code, output = command.run()
    assert code == 0, output
    assert model.paid_twice() == []
    assert (command.out / "rows.jsonl").read_bytes() == expected


def test_a_run_that_lost_its_server_resumes_when_it_is_back(spec: Spec, prompts_file: Path, tmp_path: Path) -> None:
    """If the server dies, the run stops and keeps its answers; when the server is back, the rest is requested."""
    server = HTTPServer(host="127.0.0.1", port=0, threaded=True)
    server.start()
    model = ScriptedModel(server)
    settings = settings_for(model, generator={"attempts": 3, "first_backoff_s": 0.01})
    expected = asyncio.run(run_deliberate(tmp_path / "undisturbed", spec, settings, prompts_file))
    rows = (tmp_path / "undisturbed" / "rows.jsonl").read_bytes()
    model.paid.clear()

    async def run_and_lose_the_server() -> None:
        async def watch() -> None:
            while len(model.paid) < 11:
                await asyncio.sleep(0.005)
            await asyncio.to_thread(server.stop)

        running = asyncio.create_task(watch())
        try:
            await run_deliberate(tmp_path / "out", spec, settings, prompts_file)
        finally:
            await running

    model.delay_s = 0.03
    with pytest.raises(EndpointError, match="does not answer"):
        asyncio.run(run_and_lose_the_server())
    kept = answers_in(tmp_path / "out" / "requests.jsonl")
    assert len(kept) >= 11 - _CONCURRENCY

    back = HTTPServer(host="127.0.0.1", port=0, threaded=True)
    back.start()
    again = ScriptedModel(back)
    settings = settings_for(again)
    summary = asyncio.run(run_deliberate(tmp_path / "out", spec, settings, prompts_file))
    back.stop()
    assert summary["rows"] == expected["rows"]
    assert (tmp_path / "out" / "rows.jsonl").read_bytes() == rows, "the address is not part of a request's id"
    assert set(again.paid).isdisjoint(kept)


def test_key_is_never_written(model: ScriptedModel, prompts_file: Path, tmp_path: Path) -> None:
    """The server receives the key, but no file and no output contains it, even if the endpoint echoes it."""
    canary = 'sk-canary-Zq7X29vWq"\\end'
    model.answer = lambda purpose, text: f"{canary} <deliberation>" if purpose == "generate" else None

    def echo(key, attempt, purpose, request):
        if attempt == 1 and purpose == "classify":
            response = status(500)
            response.set_data(json.dumps({"error": {"message": f"bad key {request.headers['Authorization']}"}}))
            return response
        return None

    model.fault = echo
    code, output = Command(tmp_path, model, prompts_file, key=canary).run()
    assert code == 3, output
    assert "error: nothing was made: truncated\n" in output
    assert model.authorization == {f"Bearer {canary}"}
    model.fault = lambda key, attempt, purpose, request: status(401) if purpose == "judge" else None
    model.answer = lambda purpose, text: None
    code, refused = Command(tmp_path, model, prompts_file, "--style", "cite", key=canary).run()
    assert code == 3
    assert "OPENAI_API_KEY" in refused
    escaped = json.dumps(canary)[1:-1]
    for text in (output, refused, *(p.read_text() for p in tmp_path.rglob("*") if p.is_file())):
        assert canary not in text
        assert escaped not in text
