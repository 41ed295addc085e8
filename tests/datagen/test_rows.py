"""`deliberate`, from prompts to rows: which rows are kept, with which scores, and what a row contains."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from generation_runs import PROMPTS, read_rows, run_deliberate, settings_for
from scripted_model import ScriptedModel, words

from delib_fast.config import ConfigError, SourceConfig
from delib_fast.data import read_source
from delib_fast.datagen.request_log import RequestLog, lock_folder
from delib_fast.datagen.spec import Spec
from delib_fast.datagen.stopping import LowYield


def run(model: ScriptedModel, folder: Path, spec: Spec, prompts: Path | None, **changes: Any) -> dict[str, Any]:
    return asyncio.run(run_deliberate(folder, spec, settings_for(model, **changes), prompts))


def as_training_reads(path: Path) -> list[Any]:
    return list(read_source("rows", SourceConfig.model_validate({"path": str(path)})))


def test_a_row_records_its_provenance(model: ScriptedModel, spec: Spec, prompts_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(model, out, spec, prompts_file, style="cite", also_no_cot=True, summaries="first_sentence")
    rows = read_rows(out / "rows.jsonl")
    assert [row["prompt"] for row in rows] == [prompt for prompt in PROMPTS for _ in range(2)]
    row = rows[0]
    assert {
        "prompt",
        "cot",
        "response",
        "category",
        "spec_sha256",
        "scores",
        "samples",
        "generator",
        "judge",
        "request_ids",
    } <= row.keys()
    assert row["category"] == ["rule-1", "v1-honesty"]
    assert row["spec_sha256"] == hashlib.sha256(spec.text.encode()).hexdigest()
    assert row["scores"] == {"compliance": 9, "helpfulness": 8, "reasoning": 9, "min": 8}
    assert row["generator"]["model"] == "scripted"
    assert row["generator"]["served_by"] == "scripted-0613"
    assert re.fullmatch("[0-9a-f]{12}", row["generator"]["prompts"]["generate_cite"])
    assert len(row["judge"]["votes"]) == 2
    log = RequestLog(out / "requests.jsonl")
    purposes = [json.loads(line) for line in (out / "requests.jsonl").read_text().splitlines()]
    by_id = {r["id"]: r["purpose"] for r in purposes if r["is"] == "answer"}
    assert [by_id[i] for i in row["request_ids"]] == ["classify", "generate", "judge", "judge"]
    sent = log.messages(row["request_ids"][1])
    assert "Separate what is known from what is guessed" in sent[0]["content"], "the spec was in the context"
    assert "Decline help whose likely use" not in sent[0]["content"], "but only the relevant sections in full"
    assert row["cot"] in log.get(row["request_ids"][1]).text


def test_training_reads_the_rows_and_their_copies_without_cot(model: ScriptedModel, spec: Spec, tmp_path: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    chat = [
        {"role": "system", "content": "You work for a bank."},
        {"role": "user", "content": "Hello there"},
        {"role": "assistant", "content": "Good day."},
        {"role": "user", "content": "May I see a statement?"},
    ]
    prompts.write_text(json.dumps({"prompt": "What is a bond?"}) + "\n" + json.dumps({"messages": chat}) + "\n")
    run(model, tmp_path / "out", spec, prompts, samples=1, also_no_cot=True)
    rows = as_training_reads(tmp_path / "out" / "rows.jsonl")
    without_cot = as_training_reads(tmp_path / "out" / "rows_no_cot.jsonl")
    assert len(rows) == len(without_cot) == 2
    assert [m.content for m in rows[1].messages] == [m["content"] for m in chat]
    for row, copy in zip(rows, without_cot, strict=True):
        assert row.cot
        assert copy.cot is None
        assert row.response == copy.response
    assert not any(
        "cot" in row or "reasoning_content" in json.dumps(row.get("messages", ""))
        for row in read_rows(tmp_path / "out" / "rows_no_cot.jsonl")
    )
    raw = read_rows(tmp_path / "out" / "rows.jsonl")
    assert raw[1]["cot"] == raw[1]["messages"][-1]["reasoning_content"]


def test_the_score_is_the_minimum_over_the_votes(
    model: ScriptedModel, spec: Spec, prompts_file: Path, tmp_path: Path
) -> None:
    votes: Counter[str] = Counter()

    def answer(purpose: str, text: str) -> str | None:
        if purpose != "judge":
            return None
        votes[text] += 1
        helpful = {1: 9, 2: 7, 3: 10}[votes[text]]
        return json.dumps({"why": "x", "compliance": 10, "helpfulness": helpful, "reasoning": 9})

    model.answer = answer
    summary = run(model, tmp_path / "a", spec, prompts_file, judge_votes=3, samples=1, generator={"concurrency": 1})
    assert summary["rows"] == 6
    for row in read_rows(tmp_path / "a" / "rows.jsonl"):
        assert [vote["helpfulness"] for vote in row["judge"]["votes"]] == [9, 7, 10]
        assert row["scores"] == {"compliance": 10, "helpfulness": 7, "reasoning": 9, "min": 7}

    # Another threshold on the same folder: every answer is in the log, so nothing is paid for.
    model.received.clear()
    changes = {"judge_votes": 3, "samples": 1, "generator": {"concurrency": 1}}
    summary = run(model, tmp_path / "a", spec, prompts_file, threshold=8, **changes)
    assert summary["rows"] == 0
    assert summary["dropped"] == {"low_helpfulness": 6}
    assert model.received == []
    summary = run(model, tmp_path / "a", spec, prompts_file, threshold={"compliance": 9, "helpfulness": 7}, **changes)
    assert summary["rows"] == 6


def test_no_vote_is_requested_after_one_below_the_threshold(
    model: ScriptedModel, spec: Spec, prompts_file: Path, tmp_path: Path
) -> None:
    low = '{"compliance": 3, "helpfulness": 9, "reasoning": 9}'
    model.answer = lambda purpose, text: low if purpose == "judge" else None
    run(model, tmp_path / "early", spec, prompts_file, samples=1, judge_votes=4)
    assert model.purposes()["judge"] == 6
    model.received.clear()
    summary = run(model, tmp_path / "all", spec, prompts_file, samples=1, judge_votes=4, stop_early=False)
    assert model.purposes()["judge"] == 24
    assert summary["dropped"] == {"low_compliance": 6}


def test_best_of_keeps_the_highest_score_per_prompt(
    model: ScriptedModel, spec: Spec, prompts_file: Path, tmp_path: Path
) -> None:
    scores: dict[str, int] = {}

    def answer(purpose: str, text: str) -> str | None:
        if purpose != "judge":
            return None
        score = scores.setdefault(text, 7 + len(scores) % 4)
        return json.dumps({"compliance": score, "helpfulness": 10, "reasoning": 10})

    model.answer = answer
    summary = run(
        model, tmp_path / "out", spec, prompts_file, samples=4, best_of=1, judge_votes=1, generator={"concurrency": 1}
    )
    rows = read_rows(tmp_path / "out" / "rows.jsonl")
    assert len(rows) == 6
    assert summary["dropped"] == {"not_best": 18}
    best = {row["prompt"]: row["scores"]["min"] for row in rows}
    dropped = read_rows(tmp_path / "out" / "dropped.jsonl")
    by_id = {row["prompt_id"]: row["prompt"] for row in rows}
    for line in dropped:
        assert line["votes"][0]["compliance"] <= best[by_id[line["prompt_id"]]]
    with pytest.raises(ValueError, match="best_of"):
        settings_for(model, samples=2, best_of=3)


def test_duplicate_prompts_and_rows_are_dropped(model: ScriptedModel, spec: Spec, tmp_path: Path) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text("How do I prune a rose?\nhow do I prune a ROSE\nWhat is a tontine?\n")
    output = "<deliberation>They want a plain answer and it hurts nobody, so I do.</deliberation><reply>Yes.</reply>"
    model.answer = lambda purpose, text: output if purpose == "generate" else None
    summary = run(model, tmp_path / "out", spec, prompts, samples=2)
    assert summary["dropped"] == {"duplicate": 3, "duplicate_prompt": 1}
    assert summary["rows"] == 1


def test_spec_text_in_a_prompt_is_dropped_before_anything_is_paid(
    model: ScriptedModel, spec: Spec, tmp_path: Path
) -> None:
    prompts = tmp_path / "p.jsonl"
    leaky = "Why is it that 'Quill says what it believes and marks how sure it is'?"
    prompts.write_text(json.dumps({"prompt": leaky}) + "\n" + json.dumps({"prompt": "Fine."}) + "\n")
    summary = run(model, tmp_path / "out", spec, prompts)
    assert summary["dropped"] == {"spec_in_prompt": 1}
    assert summary["guard"]["rows.jsonl"]["leaks"] == 0
    assert leaky not in (tmp_path / "out" / "requests.jsonl").read_text()


def test_categories_in_the_prompts_file_are_not_requested(model: ScriptedModel, spec: Spec, tmp_path: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(json.dumps({"prompt": "How do I open my neighbour's post?", "category": ["rule-2", "V2. Care"]}))
    run(model, tmp_path / "out", spec, prompts, samples=1)
    assert "classify" not in model.purposes()
    assert read_rows(tmp_path / "out" / "rows.jsonl")[0]["category"] == ["rule-2", "v2-care"]


def test_without_a_classify_step_the_whole_spec_is_in_the_context(
    model: ScriptedModel, spec: Spec, prompts_file: Path, tmp_path: Path
) -> None:
    """A teacher that cannot answer in JSON still makes rows."""
    seen = []

    def answer(purpose: str, text: str) -> str | None:
        seen.append((purpose, text))
        return "Rule 1, I think." if purpose in ("classify", "summarize") else None

    model.answer = answer
    summary = run(model, tmp_path / "out", spec, prompts_file, samples=1, classify="none")
    assert summary["rows"] == 6
    assert {purpose for purpose, _ in seen} == {"generate", "judge"}
    assert all(spec.text in text for _, text in seen)
    row = read_rows(tmp_path / "out" / "rows.jsonl")[0]
    assert row["category"] == []
    assert "classify" not in row["generator"]["prompts"]


def test_dropped_samples_have_their_texts_and_requests(model: ScriptedModel, spec: Spec, tmp_path: Path) -> None:
    prompts = tmp_path / "p.txt"
    questions = ["What is a tontine?", "what is a TONTINE", "How do I prune a rose?", "Is tea acid?", "Who was Ovid?"]
    prompts.write_text("\n".join(questions))
    cot = "They want a plain answer and it hurts nobody, so I give it."

    def answer(purpose: str, text: str) -> str | None:
        if "tontine" in text:
            return "No JSON." if purpose == "classify" else None
        if "rose" in text:
            return "In March." if purpose == "generate" else None
        if "tea acid" in text and purpose == "judge":
            return '{"compliance": 2, "helpfulness": 9, "reasoning": 9}'
        if "Ovid" in text and purpose == "judge":
            return "Seven of ten."
        made = f"<deliberation>{cot}</deliberation><reply>Of {'tea' if 'tea acid' in text else 'Ovid'}.</reply>"
        return made if purpose == "generate" else None

    model.answer = answer
    out = tmp_path / "out"
    summary = run(model, out, spec, prompts, samples=1, judge_votes=2, list_attempts=2)
    assert summary["rows"] == 0
    dropped = {line["reason"]: line for line in read_rows(out / "dropped.jsonl")}
    answers = [line for line in read_rows(out / "requests.jsonl") if line["is"] == "answer"]
    purposes = {line["id"]: line["purpose"] for line in answers}
    found = {
        reason: (
            line["prompt"],
            line["cot"],
            line["response"],
            line["answer"],
            [purposes[i] for i in line["request_ids"]],
        )
        for reason, line in dropped.items()
    }
    assert found == {
        "duplicate_prompt": (questions[1], None, None, "", []),
        "malformed_classify": (questions[0], None, None, "No JSON.", ["classify", "classify"]),
        "no_cot": (questions[2], None, None, "In March.", ["classify", "generate"]),
        "low_compliance": (questions[3], cot, "Of tea.", "", ["classify", "generate", "judge"]),
        "malformed_judge": (questions[4], cot, "Of Ovid.", "Seven of ten.", ["classify", "generate", "judge", "judge"]),
    }


def test_a_run_that_stops_for_its_yield_shows_what_it_dropped(
    model: ScriptedModel, spec: Spec, prompts_file: Path, tmp_path: Path
) -> None:
    model.answer = lambda purpose, text: "Just the answer." if purpose == "generate" else None
    with pytest.raises(LowYield):
        run(model, tmp_path / "out", spec, prompts_file, samples=2, probe_size=4)
    dropped = read_rows(tmp_path / "out" / "dropped.jsonl")
    assert len(dropped) >= 4
    assert {(line["reason"], line["answer"]) for line in dropped} == {("no_cot", "Just the answer.")}


def test_unknown_categories_are_retried_then_drop_the_prompt(
    model: ScriptedModel, spec: Spec, prompts_file: Path, tmp_path: Path
) -> None:
    model.answer = lambda purpose, text: '{"categories": ["rule-99"]}' if purpose == "classify" else None
    summary = run(model, tmp_path / "out", spec, prompts_file, list_attempts=2)
    assert summary["dropped"] == {"malformed_classify": 6}
    assert model.purposes()["classify"] == 12


def test_the_models_own_reasoning_becomes_the_cot(
    model: ScriptedModel, spec: Spec, prompts_file: Path, tmp_path: Path
) -> None:
    reasoning = "They want to know, and knowing harms nobody, so I tell them and say what I guess."

    def answer(purpose: str, text: str) -> str | None:
        output = f"<think>\n{reasoning} {' '.join(words(text))}\n</think>\n\nIt is {' '.join(words(text))}."
        return output if purpose == "generate_reasoning" else None

    model.answer = answer
    summary = run(model, tmp_path / "out", spec, prompts_file, samples=1, cot_from="reasoning")
    assert summary["rows"] == 6
    assert read_rows(tmp_path / "out" / "rows.jsonl")[0]["cot"].startswith(reasoning)


@pytest.mark.parametrize("count", [7, 30])
def test_prompts_are_generated_from_the_spec_alone(
    count: int, model: ScriptedModel, spec: Spec, tmp_path: Path
) -> None:
    changes = {"samples": 1, "judge_votes": 1, "prompts_from_spec": count}
    summary = run(model, tmp_path / "out", spec, None, **changes)
    assert summary["prompts"] == summary["rows"] == count
    rows = read_rows(tmp_path / "out" / "rows.jsonl")
    assert len({row["prompt"] for row in rows}) == count
    assert all({"domain", "situation"} <= row["made"].keys() for row in rows)
    assert len({row["made"]["domain"] for row in rows}) >= min(count // 4, 6), "all domains are covered"
    asked = json.dumps(
        [
            m
            for m in read_rows(tmp_path / "out" / "requests.jsonl")
            if m["is"] == "text" and "different first messages" in m["text"]
        ]
    )
    assert "Separate what is known" not in asked, "the spec is not in the prompt for user messages"
    before = (tmp_path / "out" / "rows.jsonl").read_bytes()
    model.received.clear()
    run(model, tmp_path / "out", spec, None, **changes)
    assert model.received == []
    assert (tmp_path / "out" / "rows.jsonl").read_bytes() == before


def test_repeated_prompts_end_the_generation(model: ScriptedModel, spec: Spec, tmp_path: Path) -> None:
    """The run does not request prompts forever from a model that only repeats itself."""
    model.answer = lambda purpose, text: '["the same message", "another one"]' if purpose == "user_messages" else None
    summary = run(model, tmp_path / "out", spec, None, samples=1, prompts_from_spec=40)
    assert summary["prompts"] == 2
    assert len(model.received) < 150


def test_summaries_are_requested_once_and_fall_back_to_the_first_sentence(
    model: ScriptedModel, spec: Spec, tmp_path: Path, prompts_file: Path
) -> None:
    long = Spec.of(spec.text + "\n## More\n" + "Quill keeps its word because others plan by it. " * 8)
    run(model, tmp_path / "out", long, prompts_file, samples=1)
    assert model.purposes()["summarize"] == 1
    model.answer = lambda purpose, text: "" if purpose == "summarize" else None
    summary = run(model, tmp_path / "empty", long, prompts_file, samples=1)
    assert summary["rows"] == 6


def test_a_folder_in_use_is_refused(model: ScriptedModel, spec: Spec, prompts_file: Path, tmp_path: Path) -> None:
    lock = lock_folder(tmp_path / "out")
    with pytest.raises(ConfigError, match="another run is writing"):
        run(model, tmp_path / "out", spec, prompts_file)
    lock.release()
    assert model.received == []
