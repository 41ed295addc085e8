"""The judge does not see chains of thought: its type has no field for one, and a scan finds a leak."""

from __future__ import annotations

import asyncio
from dataclasses import fields
from pathlib import Path

import pytest
from helpers.tiny_rounds import SPEC

from delib_fast.datagen.answers import Answer, Request, sha256_of
from delib_fast.datagen.request_log import RequestLog
from delib_fast.datagen.spec import Spec
from delib_fast.datagen.user_prompts import UserPrompt
from delib_fast.rounds.cot_scan import CotLeakError, JudgedReply, scan_requests
from delib_fast.rounds.judging import JudgeRequests, ResponseView, view_of
from delib_fast.rounds.settings import JudgeConfig

PROMPT = UserPrompt(({"role": "user", "content": "May I read my son's diary?"},), "p.txt:1")
COT = "The son is not in the room so I weigh his trust against her worry and say what I only guess at"
RESPONSE = "I would not read it. Ask him first, and say why you worry."


def requests_of(sees: str) -> JudgeRequests:
    settings = JudgeConfig.model_validate({"endpoint": {"model": "m"}, "sees": sees})
    return JudgeRequests.of(settings, Spec.of(SPEC), model_name="Quill", provider_name="Fern")


def write_log(path: Path, *chats: tuple[dict[str, str], ...]) -> Path:
    """A request log with an answer to each chat."""

    async def write() -> None:
        log = RequestLog(path)
        for number, chat in enumerate(chats):
            request = Request("judge", "m", chat, {}, number)
            await log.append(request, Answer("{}", "stop"), cost=None, attempts=1, seconds=0.1)
        log.close()

    asyncio.run(write())
    return path


def judged(requests: JudgeRequests, cot: str = COT, response: str = RESPONSE) -> JudgedReply:
    view = view_of(PROMPT, cot, response, requests.settings)
    return JudgedReply(PROMPT.conversation, cot, response, tuple(sha256_of(m["content"]) for m in requests.chat(view)))


def others(requests: JudgeRequests) -> list[str]:
    return [requests.spec.text, *requests.templates]


def test_the_view_of_a_response_has_no_field_for_a_chain_of_thought():
    requests = requests_of("response")
    view = view_of(PROMPT, COT, RESPONSE, requests.settings)
    assert type(view) is ResponseView
    assert [field.name for field in fields(ResponseView)] == ["conversation", "response"]
    assert COT not in str(requests.chat(view))
    assert RESPONSE in requests.chat(view)[-1]["content"]
    assert requests.axes == ("compliance", "helpfulness"), "the reasoning is not rated, because it is not seen"


def test_with_sees_all_the_judge_sees_the_chain_of_thought():
    requests = requests_of("all")
    assert COT in requests.chat(view_of(PROMPT, COT, RESPONSE, requests.settings))[-1]["content"]
    assert requests.axes == ("compliance", "helpfulness", "reasoning")


def test_a_clean_log_passes(tmp_path):
    requests = requests_of("response")
    log = write_log(tmp_path / "log", requests.chat(view_of(PROMPT, COT, RESPONSE, requests.settings)))
    result = scan_requests(
        log, [judged(requests), judged(requests, cot="I see."), judged(requests, cot="")], others(requests)
    )
    assert (result.cots, result.texts) == (1, 2)
    assert (
        result.describe() == "no 13-gram of 1 chains of thought occurs in 2 texts sent to the judge (1 have fewer "
        "than 8 words and were not looked for)"
    )


@pytest.mark.parametrize("what", ["whole", "part", "other case", "eight words", "another request"])
def test_a_planted_leak_is_found(tmp_path, what):
    requests = requests_of("response")
    system, user = requests.chat(view_of(PROMPT, COT, RESPONSE, requests.settings))
    cot = "Weigh his trust against her worry first." + " now" if what == "eight words" else COT
    planted = {
        "whole": cot,
        "part": " ".join(cot.split()[3:16]),
        "other case": f"*{cot.upper()}*",
        "eight words": cot,
        "another request": cot,
    }[what]
    leak = {"role": "user", "content": f"{planted} {user['content']}"}
    chats = [(system, user), (system, leak)] if what == "another request" else [(system, leak)]
    log = write_log(tmp_path / "log", *chats)
    with pytest.raises(CotLeakError, match=r"log: a request to the judge contains (13|8) words of a chain of thought"):
        scan_requests(log, [judged(requests, cot)], others(requests))


def test_twelve_words_of_a_long_chain_of_thought_are_not_a_leak(tmp_path):
    requests = requests_of("response")
    system, user = requests.chat(view_of(PROMPT, COT, RESPONSE, requests.settings))
    part = {"role": "user", "content": " ".join(COT.split()[3:15]) + ". " + user["content"]}
    scan_requests(write_log(tmp_path / "log", (system, part)), [judged(requests)], others(requests))


def test_words_that_are_also_in_the_response_the_prompt_or_the_spec_are_not_a_leak(tmp_path):
    requests = requests_of("response")
    sentence = "Answer in as few words as the question allows, because long answers hide what matters to the person who"
    cots = [f"They want advice. {RESPONSE} That is what I say to her in the end.", f"{PROMPT.conversation} {sentence}"]
    chat = requests.chat(view_of(PROMPT, cots[0], RESPONSE, requests.settings))
    scan_requests(write_log(tmp_path / "log", chat), [judged(requests, cot) for cot in cots], others(requests))


def test_a_draft_of_the_response_in_another_request_is_a_leak(tmp_path):
    """Words of this reply's chain of thought may be in its own request if its response has them, not in another's."""
    requests = requests_of("response")
    drafted = "I would tell her plainly that reading the diary breaks his trust and rarely calms a worry for long"
    own, other = judged(requests, f"So: {drafted}.", drafted), judged(requests)
    chat = requests.chat(view_of(PROMPT, None, RESPONSE, requests.settings))
    log = write_log(tmp_path / "log", chat, requests.chat(view_of(PROMPT, None, drafted, requests.settings)))
    scan_requests(log, [own, other], others(requests))
    planted = (chat[0], {"role": "user", "content": chat[1]["content"].replace("Ask him", f"{drafted}. Ask him")})
    leaking = JudgedReply(PROMPT.conversation, "", RESPONSE, tuple(sha256_of(m["content"]) for m in planted))
    with pytest.raises(CotLeakError, match="reading the diary breaks"):
        scan_requests(write_log(tmp_path / "log2", planted), [own, leaking], others(requests))
