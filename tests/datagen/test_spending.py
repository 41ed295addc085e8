"""What a run may spend: its limits hold with requests in flight, and it stops when too few answers are usable."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from generation_runs import run_deliberate, settings_for
from scripted_model import ScriptedModel, purpose_of, scripted, status
from werkzeug import Response

from delib_fast.datagen.answers import Answer, Charge, Request, Totals, plausible_tokens
from delib_fast.datagen.progress import Meter, Share
from delib_fast.datagen.request_log import RequestLog
from delib_fast.datagen.settings import EndpointSettings
from delib_fast.datagen.spec import Spec
from delib_fast.datagen.spending import Budget, YieldCheck, at_most, most_of
from delib_fast.datagen.stopping import BudgetSpent, LowYield, RequestsStopped, StopFlag


@pytest.fixture
def invoke(invoke: Callable[[str], tuple[int, str]]) -> Callable[[str], tuple[int, str]]:
    return lambda command: invoke(f"{command} --model-name Quill")


# --- nothing made ---------------------------------------------------------------------------------------------


def rejected(key, attempt, purpose, request):
    return status(400)


def page(key, attempt, purpose, request):
    return Response("<html>log in</html>", content_type="text/html")


def empty(key, attempt, purpose, request):
    return Response(ScriptedModel.completion(""), content_type="application/json")


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (rejected, "refused_by_endpoint: HTTP 400: scripted 400"),
        (page, "malformed_body: the body is not JSON: '<html>log in</html>'"),
        (empty, "malformed_"),
    ],
)
@pytest.mark.parametrize("command", ["deliberate spec.md prompts.txt", "document spec.md --tokens 2k"])
def test_a_run_that_makes_nothing_fails_with_the_first_reason(
    command: str, fault: Any, reason: str, invoke, model: ScriptedModel
) -> None:
    model.fault = fault
    code, output = invoke(f"{command} -o out URL --set generator.attempts=2")
    assert code == 3
    assert reason in output
    assert json.loads(Path("out/summary.json").read_text())["paid"]["answers"] == len(model.received) * (fault is empty)


def test_dropped_rows_are_a_failure_too(invoke, model: ScriptedModel) -> None:
    model.answer = lambda purpose, text: "no tags" if purpose == "generate" else None
    code, output = invoke("deliberate spec.md prompts.txt -o out URL")
    assert code == 3
    assert "0 rows of 2 prompts" in output
    assert "error: nothing was made: no_cot" in output


# --- the yield ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("useless", ["ideas", "document"])
def test_documents_of_which_none_is_usable_stop_soon(useless: str, invoke, model: ScriptedModel) -> None:
    """6,217 answers were paid for, with no document, against a budget of 6,000 tokens."""
    model.answer = lambda purpose, text: "nothing of use" if purpose == useless else None
    command = "document spec.md -o out --tokens 6k URL --set domains=2"
    code, output = invoke(command)
    assert code == 3
    assert "only 0 of the last" in output
    assert "less than least_yield (0.01)" in output
    assert useless in output or "too_short" in output
    paid = json.loads(Path("out/summary.json").read_text())["paid"]["answers"]
    assert paid < 300

    model.received.clear()
    assert invoke(command)[0] == 3
    assert len(model.received) <= 40  # what was in flight at the stop may be requested before the next check


def test_a_stopped_run_continues_without_the_check(invoke, model: ScriptedModel) -> None:
    model.answer = lambda purpose, text: "nothing of use" if purpose == "document" else None
    assert invoke("document spec.md -o out --tokens 6k URL --set probe_size=4")[0] == 3
    model.answer = lambda purpose, text: None
    code, output = invoke("document spec.md -o out --tokens 2k URL --set least_yield=0")
    assert code == 0
    assert "documents.jsonl" in output


def test_the_probe_comes_first_and_is_reported(
    model: ScriptedModel, spec: Spec, prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two of the six prompts are generated before the others; the figures are printed before the others are paid."""
    order: list[str] = []

    def answer(purpose: str, text: str) -> None:
        order.append(purpose)

    model.answer = answer
    settings = settings_for(model, probe_size=4)
    summary = asyncio.run(run_deliberate(tmp_path / "out", spec, settings, prompts_file))
    assert order[:2] == ["classify", "classify"]
    assert set(order[: 2 + 4 + 8]) == {"classify", "generate", "judge"}
    assert order[14] == "classify"
    assert "4 of the first 4 are usable; 14 answers with " in capsys.readouterr().err
    assert summary["usable"] == {
        "answers for 'classify'": {"total": 6, "usable": 6},
        "answers for 'judge'": {"total": 24, "usable": 24},
        "samples or documents": {"total": 12, "usable": 12},
    }
    assert summary["usable_tokens"] > 12 * 20


def test_yield_is_checked_again_when_the_number_has_doubled() -> None:
    meter, totals = Meter(), Totals()
    check = YieldCheck(meter, totals, after=4, least=0.5)

    def count(usable: int, useless: int) -> LowYield | None:
        for _ in range(usable):
            meter.keep()
        for _ in range(useless):
            meter.drop_made("no_cot", "the detail")
        return check.fault()

    assert count(1, 2) is None  # 3 of them: too few to judge
    assert count(1, 0) is None  # 2 of 4
    assert count(0, 3) is None  # not yet doubled
    fault = count(0, 1)  # 0 of the last 4
    assert isinstance(fault, LowYield)
    assert str(fault).startswith(
        "only 0 of the last 4 samples or documents are usable, less than least_yield (0.5). Dropped: no_cot 6. The "
        "first: no_cot: the detail. So far, "
    )


def test_rows_that_are_good_enough_are_usable() -> None:
    meter = Meter()
    meter.drop("duplicate_prompt")  # before anything is paid for
    meter.drop_made("not_best")
    meter.drop_made("low_compliance")
    assert meter.shares == {"samples or documents": Share(2, 1)}


def test_a_run_whose_lists_fail_sometimes_continues(model: ScriptedModel, spec: Spec, tmp_path: Path) -> None:
    """Failed steps do not count as useless samples: each kind of request has a share of its own."""

    def answer(purpose: str, text: str) -> str | None:
        return "no list" if purpose == "user_messages" and sum(text.encode()) % 2 else None

    model.answer = answer
    settings = settings_for(model, prompts_from_spec=8, samples=1, probe_size=2, list_attempts=1)
    summary = asyncio.run(run_deliberate(tmp_path / "out", spec, settings, None))
    assert summary["dropped"]["malformed_user_messages"] >= 2
    assert summary["rows"] == 8


# --- limits ---------------------------------------------------------------------------------------------------

SETTINGS = EndpointSettings(model="m", price_in=1.0, price_out=2.0, max_tokens=1000)
REQUEST = Request("p", "m", ({"role": "user", "content": "ä" * 34},), {})


def test_the_most_that_a_request_costs() -> None:
    assert most_of(SETTINGS, REQUEST) == Charge(68 + 32 + 1000, (100 + 2000) / 1e6)
    assert most_of(SETTINGS, REQUEST, longest=1500).tokens == 1600
    batch = SETTINGS.model_copy(update={"batch": True})
    assert most_of(batch, REQUEST).cost == pytest.approx(2100 / 2e6)


@pytest.mark.parametrize(
    ("prompt", "completion", "text", "tokens"),
    [
        (50, 60, "x", 110),
        (None, 60, "x", 1100),
        (50, None, "x", 1100),
        (0, 60, "x", 1100),
        (50, 0, "x", 1100),  # a text of no tokens
        (50, 0, "", 50),
        (50, 5000, "x", 5050),  # the endpoint ignores max_tokens, and charges for it
    ],
)
def test_the_most_that_an_answer_costs(prompt, completion, text, tokens) -> None:
    answer = Answer(text, "stop", None, prompt, completion)
    assert at_most(SETTINGS, REQUEST, answer).tokens == tokens


def test_a_limit_holds_with_requests_in_flight(
    model: ScriptedModel, spec: Spec, prompts_file: Path, tmp_path: Path
) -> None:
    """Many requests are made concurrently, and none of them is sent unless its longest answer fits."""
    model.delay_s = 0.02
    settings = settings_for(model, max_paid_tokens=30_000, generator={"concurrency": 16, "max_tokens": 500})
    with pytest.raises(BudgetSpent, match=r"max_paid_tokens \(30,000\) does not cover another request: the answers"):
        asyncio.run(run_deliberate(tmp_path / "out", spec, settings, prompts_file))
    totals = RequestLog(tmp_path / "out" / "requests.jsonl").totals
    assert 20_000 < totals.at_most.tokens <= 30_000
    assert totals.at_most.tokens == totals.prompt_tokens + totals.completion_tokens


@pytest.mark.parametrize("usage", [0, None])
def test_a_limit_holds_without_usage(usage, model: ScriptedModel, spec: Spec, prompts_file, tmp_path) -> None:
    """The endpoint reports no tokens, or none at all: every answer counts as the most that it can have."""

    def silent(key, attempt, purpose, request):
        text = "\n".join(m["content"] for m in json.loads(request.get_data())["messages"])
        reply = json.loads(ScriptedModel.completion(scripted(purpose_of(text), f"{text} {key}")))
        reply["usage"] = None if usage is None else dict.fromkeys(reply["usage"], usage)
        return Response(json.dumps(reply), content_type="application/json")

    model.fault = silent
    settings = settings_for(model, max_paid_tokens=60_000, generator={"max_tokens": 1000})
    with pytest.raises(BudgetSpent):
        asyncio.run(run_deliberate(tmp_path / "out", spec, settings, prompts_file))
    assert 0 < len(model.received) <= 60_000 // 1000


def test_a_request_waits_for_the_budget_that_others_hold() -> None:
    async def main() -> None:
        budget, stop = Budget(Totals(), None, 100, lambda: Charge()), StopFlag()
        order: list[str] = []

        async def one(name: str, tokens: int) -> None:
            async with budget.hold(Charge(tokens), stop):
                order.append(name)
                await asyncio.sleep(0.01)

        await asyncio.gather(one("a", 60), one("b", 60), one("c", 30))
        assert order == ["a", "c", "b"]
        with pytest.raises(RequestsStopped):
            await one("d", 101)
        assert isinstance(stop.cause, BudgetSpent)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("reported", "text", "tokens"),
    [(25, "x" * 100, 25), (0, "x" * 100, 25), (1, "x" * 100, 25), (10**6, "x" * 100, 25), (None, "x" * 100, 25)],
)
def test_a_document_has_a_plausible_number_of_tokens(reported, text, tokens) -> None:
    assert plausible_tokens(reported, text) == tokens
