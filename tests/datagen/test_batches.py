"""Batches at both APIs: the same rows as single requests, at half the price, and nothing paid for twice, however the
run ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from batch_servers import AnthropicBatchServer, BatchServer, OpenAIBatchServer, as_json
from cli_process import CliProcess
from generation_runs import PROMPTS, run_deliberate, settings_for
from pytest_httpserver import HTTPServer
from scripted_model import SPEC, ScriptedModel
from werkzeug import Request, Response

from delib_fast.datagen import batches as batches_module
from delib_fast.datagen.backends import EndpointError
from delib_fast.datagen.request_log import RequestLog, WriteError
from delib_fast.datagen.rows import generate_rows
from delib_fast.datagen.session import Session
from delib_fast.datagen.settings import EndpointSettings
from delib_fast.datagen.spec import Spec
from delib_fast.datagen.stopping import BudgetSpent, Interrupted

T = TypeVar("T")
SERVERS = {"openai": OpenAIBatchServer, "anthropic": AnthropicBatchServer}


@contextlib.contextmanager
def serving(kind: Callable[[HTTPServer], T]) -> Iterator[T]:
    server = HTTPServer(host="127.0.0.1", port=0, threaded=True)
    server.start()
    yield kind(server)
    server.clear()
    if server.is_running():
        server.stop()


@pytest.fixture(params=SERVERS)
def batch_server(request: pytest.FixtureRequest) -> Iterator[BatchServer]:
    with serving(SERVERS[request.param]) as server:
        yield server


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches_module, "_QUIET_S", 0.05)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with single requests."""
    folder = tmp_path_factory.mktemp("single")
    prompts, spec = folder / "prompts.txt", Spec.of(SPEC, model_name="Quill", provider_name="Fern")
    prompts.write_text("\n".join(PROMPTS))
    with serving(ScriptedModel) as model:
        asyncio.run(run_deliberate(folder / "out", spec, settings_for(model), prompts))
    return folder / "out"


def comparable(out: Path) -> list[dict[str, Any]]:
    """The rows without the ids of their requests, which depend on the API."""
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("request_ids", "cot", "response", "judge")} for row in rows]


def batch_settings(server: BatchServer, **changes: Any) -> Any:
    api = "anthropic" if isinstance(server, AnthropicBatchServer) else "openai"
    generator = {"api": api, "batch": True, "batch_poll_s": 0.05, **changes.pop("generator", {})}
    return settings_for(server, generator={"concurrency": 1000, **generator}, **changes)


def test_a_run_in_batches(batch_server, spec, prompts_file, tmp_path, expected) -> None:
    settings = batch_settings(batch_server, stop_early=False)
    summary = asyncio.run(run_deliberate(tmp_path / "out", spec, settings, prompts_file))
    assert summary["rows"] == 12
    assert comparable(tmp_path / "out") == comparable(expected)
    # classify, generate, and all votes together; the six sections are short, and need no summary
    assert [len(b["requests"]) for b in batch_server.batches.values()] == [6, 12, 24]
    log = RequestLog(tmp_path / "out" / "requests.jsonl")
    paid = log.totals
    assert paid.cost == pytest.approx((paid.prompt_tokens * 1.0 + paid.completion_tokens * 2.0) / 1e6 / 2)
    assert log.batches == {}
    again = asyncio.run(run_deliberate(tmp_path / "out", spec, settings, prompts_file))
    assert (again["this_run"]["answers"], len(batch_server.batches)) == (0, 3)


def test_openai_batches_give_the_rows_of_single_requests(spec, prompts_file, tmp_path, expected) -> None:
    """Request ids do not depend on how a request is sent, so the rows are the same byte for byte."""
    with serving(OpenAIBatchServer) as server:
        asyncio.run(run_deliberate(tmp_path / "out", spec, batch_settings(server), prompts_file))
    assert (tmp_path / "out" / "rows.jsonl").read_bytes() == (expected / "rows.jsonl").read_bytes()


def test_results_that_fail_are_requested_again(
    batch_server, spec, prompts_file, tmp_path, expected, monkeypatch
) -> None:
    """In the first batches: a result is missing, one failed, one expired, one is not an answer.

    A failed request is requested again before its batch is finished.
    """
    collected = RequestLog.batch_collected

    async def slowly(self, key: str, outcome: str) -> None:
        await asyncio.sleep(0.3)
        await collected(self, key, outcome)

    monkeypatch.setattr(RequestLog, "batch_collected", slowly)
    anthropic = isinstance(batch_server, AnthropicBatchServer)
    done: set[str] = set()

    def result(custom_id: str, line: dict[str, Any]) -> Any:
        request_id = custom_id.partition("_")[2]
        number = len(done)
        if request_id in done or number >= 4:
            return line
        done.add(request_id)
        batch_server.paid[request_id] -= 1  # what fails is not charged
        if number == 0:
            return None
        if anthropic:
            inner = [
                {"type": "errored", "error": {"type": "error", "error": {"type": "api_error", "message": "x"}}},
                {"type": "expired"},
                {"type": "succeeded", "message": {"type": "message", "content": 7}},
            ]
            return {"custom_id": custom_id, "result": inner[number - 1]}
        bodies = [
            {"response": None, "error": {"code": "batch_expired", "message": "x"}},
            {"response": {"status_code": 500, "body": {"error": {"message": "x"}}}, "error": None},
            {"response": {"status_code": 200, "body": {"choices": "none"}}, "error": None},
        ]
        return {"custom_id": custom_id, **bodies[number - 1]}

    batch_server.result = result
    summary = asyncio.run(run_deliberate(tmp_path / "out", spec, batch_settings(batch_server), prompts_file))
    assert comparable(tmp_path / "out") == comparable(expected)
    assert batch_server.paid_twice() == []
    assert sum(summary["failed_attempts"].values()) == 4


def test_a_rejected_request_does_not_stop_the_others(batch_server, spec, prompts_file, tmp_path) -> None:
    def result(custom_id: str, line: dict[str, Any]) -> Any:
        if "sourdough" not in json.dumps(batch_server.batches):
            return line
        body = next(b for batch in batch_server.batches.values() for name, b in batch["requests"] if name == custom_id)
        if "sourdough" not in json.dumps(body):
            return line
        if isinstance(batch_server, AnthropicBatchServer):
            error = {"type": "error", "error": {"type": "invalid_request_error", "message": "too long"}}
            return {"custom_id": custom_id, "result": {"type": "errored", "error": error}}
        response = {"status_code": 400, "body": {"error": {"message": "too long"}}}
        return {"custom_id": custom_id, "response": response, "error": None}

    batch_server.result = result
    summary = asyncio.run(run_deliberate(tmp_path / "out", spec, batch_settings(batch_server), prompts_file))
    assert (summary["rows"], summary["dropped"]) == (10, {"refused_by_endpoint": 1})
    assert "too long" in summary["first_drop"]


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_unclear_failure_to_create_a_batch(when, batch_server, spec, prompts_file, tmp_path, expected) -> None:
    """The connection fails while a batch is created: it is looked for, and created again only if it does not exist."""
    failed = threading.Event()

    def fault(request: Request, moment: str) -> Response | None:
        if moment == when and request.method == "POST" and request.path.endswith("batches") and not failed.is_set():
            failed.set()
            return Response("", status=504)
        return None

    batch_server.fault = fault
    asyncio.run(run_deliberate(tmp_path / "out", spec, batch_settings(batch_server), prompts_file))
    assert comparable(tmp_path / "out") == comparable(expected)
    assert batch_server.paid_twice() == []


def test_the_price_of_a_batch_counts_towards_max_cost(batch_server, spec, prompts_file, tmp_path) -> None:
    """A request is put into a batch only if its maximum fits into the budget, together with those in flight."""
    settings = batch_settings(batch_server, max_cost=0.02, generator={"max_tokens": 1000})
    with pytest.raises(BudgetSpent):
        asyncio.run(run_deliberate(tmp_path / "out", spec, settings, prompts_file))
    totals = RequestLog(tmp_path / "out" / "requests.jsonl").totals
    assert 0.01 < totals.at_most.cost <= 0.02


def test_other_settings_do_not_pay_for_a_batch_again(batch_server, spec, prompts_file, tmp_path) -> None:
    """A batch is open, and the next run would send its requests one by one."""
    batch_server.takes_s = 3600
    settings = batch_settings(batch_server)

    async def interrupted() -> None:
        async with Session.open(tmp_path / "out", spec, settings) as session:
            working = asyncio.create_task(generate_rows(session, settings, prompts_file))
            while not any(b.batch_id for b in session.log.batches.values()):
                await asyncio.sleep(0.01)
            session.client.stop.set(Interrupted())
            with pytest.raises(Interrupted):
                await working

    asyncio.run(asyncio.wait_for(interrupted(), 60))
    assert len(batch_server.batches) == 1
    single = batch_settings(batch_server, generator={"batch": False})
    with pytest.raises(EndpointError, match=r"batch .* of an earlier run contains requests that would be sent"):
        asyncio.run(run_deliberate(tmp_path / "out", spec, single, prompts_file))
    batch_server.takes_s = 0
    assert asyncio.run(run_deliberate(tmp_path / "out", spec, settings, prompts_file))["rows"] == 12
    assert batch_server.paid_twice() == []


@pytest.mark.parametrize("name", ["../../admin", "a/b", "", "x" * 300, 7, None])
def test_an_id_is_not_a_path(name, batch_server, spec, prompts_file, tmp_path) -> None:
    """An id that the endpoint chose becomes a part of a path only if it is one."""
    seen: list[str] = []

    def fault(request: Request, moment: str) -> Response | None:
        seen.append(request.path)
        return as_json({"id": name}) if request.method == "POST" else None

    batch_server.fault = fault
    with pytest.raises(EndpointError, match="as the id of a batch or file"):
        asyncio.run(run_deliberate(tmp_path / "out", spec, batch_settings(batch_server), prompts_file))
    assert set(seen) <= {"/v1/files", "/v1/batches", "/v1/messages/batches"}


def test_api_defaults() -> None:
    settings = EndpointSettings(model="m", api="anthropic", batch=True)
    assert (settings.api_key_env, settings.concurrency) == ("ANTHROPIC_API_KEY", 1000)
    with pytest.raises(ValueError, match=r"temperature 1\.5 is above 1"):
        EndpointSettings(model="m", api="anthropic", temperature=1.5)
    with pytest.raises(ValueError, match="batch needs an endpoint"):
        EndpointSettings(model="m", backend="transformers", batch=True)


# --- kills ----------------------------------------------------------------------------------------------------


class Killer:
    """Kills the run when its `at`-th request reaches the server, before or after the request has taken effect."""

    def __init__(self, server: BatchServer, at: int, when: str) -> None:
        self.process: CliProcess | None = None
        self.at, self.when, self.count = at, when, 0
        server.fault = self.fault

    def fault(self, request: Request, moment: str) -> Response | None:
        if moment != self.when:
            return None
        self.count += 1
        if self.count == self.at and self.process is not None:
            self.process.send_signal(signal.SIGKILL)
        return None


def command_of(server: BatchServer, folder: Path, prompts: Path) -> list[str]:
    config = folder / "settings.yaml"
    (folder / "spec.md").write_text(SPEC)
    config.write_text(
        "generator: {first_backoff_s: 0.02, attempts: 4, timeout_s: 20, batch: true, batch_poll_s: 0.1}\n"
        "samples: 2\njudge_votes: 2\nstop_early: false\nmodel_name: Quill\nprovider_name: Fern\n"
    )
    api = "anthropic" if isinstance(server, AnthropicBatchServer) else "openai"
    return [
        *("deliberate", str(folder / "spec.md"), str(prompts), "-o", str(folder / "out"), "--config", str(config)),
        *("--model", "scripted", "--base-url", server.base_url, "--set", f"generator.api={api}"),
    ]


def test_a_killed_run_pays_for_no_batch_twice(batch_server, prompts_file, tmp_path, expected, full) -> None:
    """SIGKILL while a request of every kind reaches the server: upload, creation, list, state and results."""
    points = [(at, when) for at in range(1, 9) for when in ("before", "after")]
    chosen = points if full else random.sample(points, 1)
    created_at = 2 if isinstance(batch_server, OpenAIBatchServer) else 1
    for at, when in dict.fromkeys([(created_at, "after"), *chosen]):
        folder = tmp_path / f"{at}-{when}"
        folder.mkdir()
        batch_server.paid.clear()
        codes = []
        for number in (at, at + 2, 0) if full else (at, 0):  # killed once or twice
            killer = Killer(batch_server, number, when)
            killer.process = CliProcess(command_of(batch_server, folder, prompts_file), folder)
            code, output = killer.process.wait()
            codes.append(code)
            assert code in (0, -signal.SIGKILL), output
            if code == 0:
                break
        assert codes[0] == -signal.SIGKILL
        assert codes[-1] == 0
        assert batch_server.paid_twice() == [], (at, when)
        assert sum(batch_server.paid.values()) == 42
        assert comparable(folder / "out") == comparable(expected)


def test_a_full_disk_between_a_batch_and_its_id(
    batch_server, spec, prompts_file, tmp_path, expected, monkeypatch
) -> None:
    """The batch exists, and its id cannot be written: the next run finds it."""

    async def full_disk(self, key, batch_id) -> None:
        raise WriteError(self.path, OSError(28, "No space left on device"))

    with monkeypatch.context() as patch:
        patch.setattr(RequestLog, "batch_submitted", full_disk)
        with pytest.raises(WriteError, match="No space left"):
            asyncio.run(run_deliberate(tmp_path / "out", spec, batch_settings(batch_server), prompts_file))
    assert len(batch_server.batches) == 1
    asyncio.run(run_deliberate(tmp_path / "out", spec, batch_settings(batch_server), prompts_file))
    assert comparable(tmp_path / "out") == comparable(expected)
    assert batch_server.paid_twice() == []


def test_a_batch_that_is_lost_is_not_paid_for_again_silently(batch_server, spec, prompts_file, tmp_path) -> None:
    """The endpoint no longer knows the batch: the error says which it is, and what to append to the log."""

    def fault(request: Request, moment: str) -> Response | None:
        lost = request.method == "GET" and moment == "before"
        return as_json({"error": {"message": "no such batch"}}, 404) if lost else None

    batch_server.fault = fault
    for _ in range(2):
        with pytest.raises(EndpointError, match=r"batch \w+ of 6 requests: .*HTTP 404: no such batch") as error:
            asyncio.run(run_deliberate(tmp_path / "out", spec, batch_settings(batch_server), prompts_file))
    assert len(batch_server.batches) == 1
    remedy = re.search(r"append the line (\{.*\}) to (\S+)", str(error.value))
    assert remedy is not None
    with open(remedy[2], "a") as log:
        log.write(remedy[1] + "\n")
    batch_server.fault = lambda request, moment: None
    assert asyncio.run(run_deliberate(tmp_path / "out", spec, batch_settings(batch_server), prompts_file))["rows"] == 12
    assert len(batch_server.batches) == 1 + 4


def test_a_failing_log_reaches_every_request_of_a_batch(
    batch_server, spec, prompts_file, tmp_path, monkeypatch
) -> None:
    """The disk is full when the first batch is planned: the run ends with the reason, and nothing was submitted."""

    async def full_disk(self, entry, requests) -> None:
        raise WriteError(self.path, OSError(28, "No space left on device"))

    monkeypatch.setattr(RequestLog, "plan_batch", full_disk)
    with pytest.raises(WriteError, match="No space left"):
        asyncio.run(run_deliberate(tmp_path / "out", spec, batch_settings(batch_server), prompts_file))
    assert batch_server.batches == {}
