"""Sampling from a server: the current model is asked for by its folder, and every answer is requested once."""

from __future__ import annotations

import pytest

from delib_fast.config import ConfigError, ModelConfig
from delib_fast.datagen.answers import Answer
from delib_fast.datagen.backends import EndpointError
from delib_fast.datagen.user_prompts import UserPrompt
from delib_fast.evals.moments import Moment
from delib_fast.rounds.sampling import Drawn
from delib_fast.rounds.served import draw_from_server, reply_of
from delib_fast.rounds.settings import SampleConfig

PROMPTS = [
    UserPrompt(({"role": "user", "content": "oak or red?"},), "p.txt:1"),
    UserPrompt(
        ({"role": "system", "content": "Be kind."}, {"role": "user", "content": "ash?"}), "p.txt:2", single=False
    ),
]


@pytest.mark.parametrize(
    ("answer", "cot", "response", "fault"),
    [
        (Answer("the oak", "stop", reasoning="they ask"), "they ask", "the oak", None),
        (Answer("<think>they ask</think>the oak", "stop"), "they ask", "the oak", None),
        (Answer("the oak", "stop"), None, "the oak", None),
        (Answer("<think>they ask", "length"), None, "", "truncated"),
        (Answer("the o", "length"), None, "the o", "truncated"),
        (Answer("<think>they ask", "stop"), None, "", "truncated"),
        (Answer("so the oak <think> hm </think> it is", "stop"), None, "", "leaked_scaffolding"),
        (Answer("", "stop"), None, "", "no_response"),
    ],
)
def test_an_answer_is_split(answer, cot, response, fault):
    reply = reply_of(answer)
    assert (reply.cot, reply.response) == (cot, response)
    assert Drawn(PROMPTS[0], 0, reply).fault(needs_cot=False) == fault


def test_replies_are_requested_by_the_folder_of_the_model_and_once(judge, tmp_path):
    bodies: list[dict] = []
    judge.answer = lambda conversation, response, key: f"<think>{key[:6]} they ask for it</think>the oak"
    judge.on_body = bodies.append
    settings = SampleConfig.model_validate(
        {"k": 2, "temperature": 0.7, "max_new_tokens": 9, "endpoint": {"base_url": judge.base_url}}
    )
    moment = Moment("start", ModelConfig(path=str(tmp_path / "model")))
    arguments = {"k": 2, "system_prompt": "Be brief.", "out": tmp_path}
    first = draw_from_server(moment, PROMPTS, settings, draw=1, **arguments)
    assert [(one.prompt.location, one.number) for one in first] == [
        ("p.txt:1", 0),
        ("p.txt:1", 1),
        ("p.txt:2", 0),
        ("p.txt:2", 1),
    ]
    assert len({one.reply.cot for one in first}) == 4, "the replies to a prompt are independent"
    assert {body["model"] for body in bodies} == {str(tmp_path / "model")}
    assert {(body["temperature"], body["max_tokens"]) for body in bodies} == {(0.7, 9)}
    assert sorted(body["messages"][0]["content"] for body in bodies) == ["Be brief."] * 2 + ["Be kind."] * 2
    again = draw_from_server(moment, PROMPTS, settings, draw=1, **arguments)
    assert (again, len(judge.received)) == (first, 4)
    draw_from_server(moment, PROMPTS, settings, draw=2, **arguments)
    assert len(judge.received) == 8, "another round samples anew"
    assert judge.repeated() == []


def test_a_server_without_the_current_model_stops_with_what_to_serve(judge, tmp_path):
    judge.status = 404
    settings = SampleConfig.model_validate({"endpoint": {"base_url": judge.base_url}})
    moment = Moment("after aft", ModelConfig(path=str(tmp_path / "round-1/run/model")))
    with pytest.raises(EndpointError, match=r"has no model '.*round-1/run/model'.*: serve it under this name$"):
        draw_from_server(moment, PROMPTS, settings, k=1, draw=2, system_prompt=None, out=tmp_path)


def test_an_adapter_without_a_merged_model_is_refused(judge, tmp_path):
    settings = SampleConfig.model_validate({"endpoint": {"base_url": judge.base_url}})
    moment = Moment("after aft", ModelConfig(path="base"), tmp_path / "adapter")
    with pytest.raises(ConfigError, match=r"sample.endpoint: .*adapter is an adapter without a merged model"):
        draw_from_server(moment, PROMPTS, settings, k=1, draw=1, system_prompt=None, out=tmp_path)


def test_the_name_of_the_served_model_is_not_a_setting():
    with pytest.raises(ValueError, match="endpoint has no key model or backend here"):
        SampleConfig.model_validate({"endpoint": {"model": "mine"}})
