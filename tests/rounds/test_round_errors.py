"""Rounds that stop early, and mistakes: each error says what, where and what to do, and loses nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from helpers.tiny_rounds import scores_of, tiny_rounds

from delib_fast.config import ConfigError
from delib_fast.digests import read_json
from delib_fast.rounds.settings import load_rounds


def low(conversation: str, response: str, key: str) -> str:
    return json.dumps({"why": "bad", "compliance": 2, "helpfulness": 2})


def test_rounds_stop_when_nothing_new_is_kept(command, judge, tmp_path):
    judge.answer = low
    code, output = command(heldout=None)
    assert code == 0, output
    summary = read_json(tmp_path / "out" / "rounds.json")
    assert summary["stopped"] == "nothing new was kept"
    assert summary["rounds"][0]["kept"] == 0
    assert "stopped after 0 rounds: nothing new was kept" in output
    assert not (tmp_path / "out" / "round-1" / "run").exists()
    received = len(judge.received)
    code, _ = command(heldout=None)
    assert (code, len(judge.received)) == (0, received), "nothing is judged again"


def test_rounds_stop_at_the_held_out_score(command, tmp_path):
    code, output = command(stop={"score": 1.5})
    assert code == 0, output
    summary = read_json(tmp_path / "out" / "rounds.json")
    assert summary["stopped"] == "the held-out score reached stop.score"
    assert summary["rounds"] == []
    assert summary["models"][0]["score"]["value"] >= 1.5


def test_ratings_that_cannot_be_read_are_counted(command, judge, tmp_path):
    """The judge gives no scores for one response; the other replies are rated. Nothing reaches the threshold of 10."""

    def answer(conversation: str, response: str, key: str) -> str:
        unread = conversation.startswith("red")
        return "I cannot say." if unread else json.dumps({"why": "", **scores_of(conversation, response, key)})

    judge.answer = answer
    code, output = command(heldout=None, keep={"threshold": 10})
    assert code == 0, output
    entry = read_json(tmp_path / "out" / "rounds.json")["rounds"][0]
    dropped = [json.loads(x) for x in (tmp_path / "out/round-1/dropped.jsonl").read_text().splitlines()]
    unread = [row for row in dropped if row["reason"] == "malformed_judge"]
    assert entry["dropped"]["malformed_judge"] == len(unread) > 0
    assert {row["prompt"] for row in unread} == {"red or oak?"}
    assert entry["rated"] == sum(row["reason"] == "below_threshold" for row in dropped) > 0


def test_a_judge_without_any_readable_rating_stops_the_round(command, judge, tmp_path):
    judge.answer = lambda conversation, response, key: "Fine."
    code, output = command(heldout=None)
    assert code == 3
    assert "'scripted' could rate none of " in output
    assert "it contains no JSON object with compliance, helpfulness" in output
    assert "check the model under judge.endpoint" in output
    assert not (tmp_path / "out/round-1/selection.json").exists()


def test_a_judge_that_cannot_be_reached_stops_the_round_and_it_resumes(command, judge, tmp_path):
    judge.answer = low
    reachable = judge.base_url
    endpoint = {"model": "scripted", "base_url": "http://127.0.0.1:9/v1", "attempts": 2, "first_backoff_s": 0.01}
    code, output = command(heldout=None, judge={"endpoint": endpoint, "ratings": 2})
    assert code == 3
    assert "http://127.0.0.1:9/v1 does not answer" in output
    assert "the same command resumes from there" in output
    samples = (tmp_path / "out/round-1/samples.jsonl").read_bytes()
    code, output = command(heldout=None, judge={"endpoint": {**endpoint, "base_url": reachable}, "ratings": 2})
    assert code == 0, output
    assert (tmp_path / "out/round-1/samples.jsonl").read_bytes() == samples, "the replies were not sampled again"


def test_a_leak_fails_the_round(command, tmp_path, monkeypatch):
    """If a bug put the chain of thought into the request, the scan would find it before anything is kept."""
    from delib_fast.rounds import run
    from delib_fast.rounds.judging import ResponseView

    def leaking(prompt, cot, response, settings):
        return ResponseView(f"{prompt.conversation} {cot}", response)

    monkeypatch.setattr(run, "view_of", leaking)
    code, output = command(heldout=None)
    assert code == 3, output
    assert "requests.jsonl: a request to the judge contains" in output
    assert "words of a chain of thought, which a judge with sees: response must not see: 'they ask for" in output
    assert not (tmp_path / "out/round-1/rows.jsonl").exists()
    assert not (tmp_path / "out/rounds.json").exists()


def test_with_sees_all_there_is_no_scan_and_the_ledger_says_judge(command, judge, tmp_path):
    seen = []

    def answer(conversation: str, response: str, key: str) -> str:
        return json.dumps({"why": "", "compliance": 9, "helpfulness": 9, "reasoning": 2})

    judge.answer = answer
    judge.on_request = lambda count: seen.append(judge.received[-1][1])
    endpoint = {"model": "scripted", "base_url": judge.base_url}
    code, output = command(heldout=None, judge={"endpoint": endpoint, "ratings": 1, "sees": "all"})
    assert code == 0, output
    summary = read_json(tmp_path / "out/rounds.json")
    assert summary["cot_under_pressure"] == "judge"
    assert summary["rounds"][0]["scan"] is None
    assert summary["rounds"][0]["kept"] == 0, "the reasoning is rated 2"
    assert all("they ask for" in text for text in seen)


def test_another_configuration_in_the_same_folder_is_refused(command, judge, tmp_path, monkeypatch):
    judge.answer = low
    assert command(heldout=None)[0] == 0
    code, output = command(heldout=None, keep={"threshold": 8}, sample={"k": 4, "max_new_tokens": 40, "batch_size": 8})
    assert code == 2
    assert f"{tmp_path / 'out'} holds rounds of another configuration; give another out, or delete it" in output
    assert "  keep.threshold: 6.0 there, 8.0 here" in output
    assert "  sample.max_new_tokens: 48 there, 40 here" in output
    code, output = command("--rounds", "3", heldout=None)
    assert code == 0, f"rounds may change: {output}"
    monkeypatch.setattr("helpers.tiny_rounds.SPEC", "# Conduct\nBe kind to whoever asks.\n")
    code, output = command(heldout=None)
    assert code == 2
    assert "  spec: its content has changed" in output


def test_a_changed_input_is_refused(command, judge, tmp_path):
    judge.answer = low
    assert command(heldout=None)[0] == 0
    rows = tmp_path / "out/round-1/dropped.jsonl"
    rows.write_text(rows.read_text().replace("red", "rod"))
    code, output = command(heldout=None)
    assert code == 2
    assert f"{rows}: it was changed or removed after the round selected its rows; restore it, or delete " in output


def test_a_prompt_with_text_of_the_spec_is_left_out(tmp_path):
    from delib_fast.rounds.inputs import read_inputs

    path = tiny_rounds(tmp_path, Path("model"), "http://127.0.0.1:9/v1", heldout=None)
    leak = "Answer in as few words as the question allows, please: oak or red?"
    (tmp_path / "prompts.txt").write_text(f"oak or red?\n{leak}\noak or red?\n")
    inputs = read_inputs(load_rounds(path))
    assert [prompt.conversation for prompt in inputs.prompts] == ["oak or red?"]
    assert inputs.left_out == {"prompts: spec_in_prompt": 1, "prompts: duplicate_prompt": 1}


def test_a_held_out_prompt_that_is_trained_on_is_refused(tmp_path):
    from delib_fast.rounds.inputs import read_inputs

    path = tiny_rounds(tmp_path, Path("model"), "http://127.0.0.1:9/v1")
    (tmp_path / "heldout.txt").write_text("ash or green?\n")
    expected = (
        f"{tmp_path}/heldout.txt:1: this held-out prompt is also trained on ({tmp_path}/prompts.txt:3); remove it "
        "from one of the two files"
    )
    with pytest.raises(ConfigError) as error:
        read_inputs(load_rounds(path))
    assert str(error.value) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spec": None}, "spec: input should be a valid string"),
        ({"sample": {"k": 0}}, "sample.k: input should be greater than 0, not 0"),
        (
            {"sample": {"temperature": 0}},
            "sample: k is 4 and temperature is 0, which gives the same reply every time: set temperature above 0",
        ),
        ({"keep": {}}, "keep: no rule is set: set threshold (1 to 10), or best_of_k: true, or both"),
        ({"keep": {"threshold": 11}}, "keep.threshold: input should be less than or equal to 10, not 11"),
        (
            {"keep": {"best_of_k": True}, "sample": {"k": 1}},
            "keep.best_of_k compares the replies to a prompt, but sample.k is 1; raise it",
        ),
        ({"heldout": None, "stop": {"win_rate": 0.6}}, "stop.win_rate is measured on held-out prompts: set heldout"),
        ({"judge": {"sees": "response"}}, "judge.endpoint: missing; it has no default"),
        ({"judge": {"endpoint": {}}}, "judge: endpoint.model is not set: give the name of the judge at its endpoint"),
        ({"judge": {"endpoint": {}, "sees": "cot"}}, "judge.sees: input should be 'response' or 'all', not 'cot'"),
        ({"run": {"model": {"path": "m"}, "run_dir": "x"}}, "run: run_dir is set by the command (see out:); remove it"),
        ({"run": {"engine": {}}}, "run: model.path is missing: the first round samples from that model"),
        ({"train": {"kind": "msm"}}, "train: kind is set by the command; remove it"),
        ({"train": {"epoch": 2}}, "train.epoch: unknown key (did you mean 'epochs'?)"),
        ({"train": {"train": ["more"]}}, "train.train names 'more', which is not under data: (known: kept)"),
    ],
)
def test_a_mistake_in_the_configuration_is_explained(tmp_path, change, message):
    path = tiny_rounds(tmp_path, Path("model"), "http://127.0.0.1:9/v1", **change)
    with pytest.raises(ConfigError) as error:
        load_rounds(path)
    assert str(error.value).startswith(f"{path}: {message}")


def test_every_key_has_a_help_text():
    from delib_fast.rounds import settings

    for section in ("SampleConfig", "JudgeConfig", "KeepConfig", "StopConfig", "RoundsConfig"):
        for name, field in getattr(settings, section).model_fields.items():
            assert field.description, f"{section}.{name}"


def test_the_example_is_valid():
    path = Path(__file__).parents[2] / "examples" / "rounds.yaml"
    config = load_rounds(path)
    assert config.cot_under_pressure() == "SFT"
    assert yaml.safe_load(path.read_text())["sample"]["k"] == config.sample.k


@pytest.mark.parametrize(
    ("train", "sees", "expected"),
    [
        ({}, "response", "SFT"),
        ({"cot": "strip"}, "response", "no"),
        ({"cot_weight": 0}, "response", "no"),
        ({"cot": "context"}, "response", "no"),
        ({"cot": "strip"}, "all", "judge"),
        ({}, "all", "judge"),
        ({"teacher": {"model": "self", "cot_weight": 1}}, "response", "SFT and distillation"),
        ({"teacher": {"model": "self", "cot_weight": 1, "nll_weight": 0}}, "response", "distillation"),
        ({"teacher": {"model": "self", "nll_weight": 0}}, "response", "no"),
    ],
)
def test_who_optimizes_chains_of_thought(tmp_path, train, sees, expected):
    judge = {"endpoint": {"model": "m"}, "sees": sees}
    if "teacher" in train:
        (tmp_path / "teacher.md").write_text("# Spec\nBe kind.\n")
        train = {"teacher": {"spec": "teacher.md", **train["teacher"]}}
    path = tiny_rounds(tmp_path, Path("model"), "http://127.0.0.1:9/v1", train=train, judge=judge)
    assert load_rounds(path).cot_under_pressure() == expected
