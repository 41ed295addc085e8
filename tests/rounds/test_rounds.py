"""Whole rounds of a tiny model and a scripted judge: what is kept and trained, kills, interrupts and errors."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
import yaml
from helpers.tiny_rounds import ScriptedJudge, scores_of, tiny_rounds

from delib_fast.digests import read_json, write_json
from delib_fast.files import hash_file

RUN = "helpers.tiny_rounds:run"


@pytest.fixture(scope="module")
def done(tmp_path_factory, fork_server, chat_model):
    """Two rounds that were not interrupted: the configuration, its judge and the labels of the disk operations."""
    folder = tmp_path_factory.mktemp("rounds")
    judge = ScriptedJudge()
    path = tiny_rounds(folder, chat_model, judge.base_url)
    fork_server.run(RUN, [path], FAULT_DIR=str(folder / "out"), FAULT_TRACE=str(folder / "trace"))
    yield path, judge, (folder / "trace").read_text().splitlines()
    judge.close()


def rows_of(out: Path, number: int, name: str = "rows.jsonl") -> list[dict]:
    return [json.loads(line) for line in (out / f"round-{number}" / name).read_text().splitlines()]


def results(out: Path) -> dict[str, str]:
    """Hashes of everything that must be equal in two runs."""
    names = ["rounds.json", *(f"measures/model-{n}.json" for n in range(3))]
    for n in (1, 2):
        names += [f"round-{n}/{name}" for name in ("rows.jsonl", "dropped.jsonl", "selection.json")]
        names += [f"round-{n}/run/adapter/adapter_model.safetensors", f"round-{n}/run/model/model.safetensors"]
    return {name: hash_file(out / name) for name in names}


def test_two_rounds_keep_train_and_continue_the_adapter(done, chat_model):
    path, _, _ = done
    out = path.parent / "out"
    summary = read_json(out / "rounds.json")
    assert summary["stopped"] == "all rounds are done"
    assert summary["cot_under_pressure"] == "SFT"
    assert [model["after_round"] for model in summary["models"]] == [0, 1, 2]
    for number, entry in enumerate(summary["rounds"], 1):
        kept, dropped = rows_of(out, number), rows_of(out, number, "dropped.jsonl")
        assert entry["replies"] == len(kept) + len(dropped) == 12
        assert entry["kept"] == len(kept) > 0
        for row in kept:
            expected = [scores_of(row["prompt"], row["response"], key) for key in row["request_ids"]]
            assert [{k: v for k, v in vote.items() if k != "why"} for vote in row["votes"]] == expected
            assert row["scores"]["min"] == min(min(vote.values()) for vote in expected) >= 6
            assert row["judge"] == {"model": "scripted", "sees": "response", "prompts": row["judge"]["prompts"]}
        below = [row for row in dropped if row["reason"] == "below_threshold"]
        assert all(min(min(v["compliance"], v["helpfulness"]) for v in row["votes"]) < 6 for row in below)
        assert entry["train"]["steps"] >= 1
    first, second = (yaml.safe_load((out / f"round-{n}/run/config.yaml").read_text()) for n in (1, 2))
    assert first["model"]["lora"]["path"] is None
    assert Path(second["model"]["lora"]["path"]) == out / "round-1/run/adapter"
    assert first["model"]["path"] == second["model"]["path"] == str(chat_model)
    assert summary["models"][0]["drift"] == []
    after_one, after_two = (summary["models"][n]["drift"] for n in (1, 2))
    assert [d["segment"] for d in after_one] == ["cot", "response"]
    assert 0 < after_one[0]["kl"]["value"] != after_two[0]["kl"]["value"] > 0
    assert after_one[0]["start_nll"] == after_two[0]["start_nll"]


def test_the_judge_received_no_chain_of_thought_and_every_request_once(done):
    path, judge, _ = done
    out = path.parent / "out"
    cots = {row["cot"] for n in (1, 2) for name in ("rows.jsonl", "dropped.jsonl") for row in rows_of(out, n, name)}
    assert len(cots - {None, ""}) > 1
    texts = "\n".join(text for _, text in judge.received)
    assert not [cot for cot in cots if cot and len(cot.split()) > 4 and cot in texts]
    assert "rely on the answer being right" in texts, "the spec is in the requests"
    assert judge.repeated() == []
    summary = read_json(out / "rounds.json")
    assert summary["paid"]["answers"] == len(judge.received)
    scan = summary["rounds"][1]["scan"]
    assert scan["cots"] > 0
    assert scan["texts"] > 3


def test_the_page_shows_the_rounds(done):
    page = (done[0].parent / "out" / "rounds.html").read_text()
    for text in (
        "2 rounds",
        "CoT under pressure",
        "SFT",
        "after 2",
        "below_threshold",
        "none found",
        "KL(start‖model)",
    ):
        assert text in page


def test_the_model_does_not_see_the_spec(done):
    """The prompts that are sampled from are those of the file, and the rows of the training hold nothing else."""
    out = done[0].parent / "out"
    prompts = (done[0].parent / "prompts.txt").read_text().splitlines()
    assert {row["prompt"] for n in (1, 2) for row in rows_of(out, n)} <= set(prompts)


# (operation, whether only --full kills there): sampling with a torn line, judging, selecting, before, in and after
# training, and the results.
KILLS = (
    ("write measures/model-N.samples.jsonl", False),
    ("fsync requests.jsonl", False),
    ("replace measures/.model-N.json", True),
    ("write round-N/samples.jsonl", False),
    ("fsync requests.jsonl", True),
    ("replace round-N/.rows.jsonl", True),
    ("replace round-N/.selection.json", False),
    ("mkdir round-N/run", True),
    ("fsync round-N/run/checkpoints", False),
    ("replace round-N/run/.ledger.json", True),
    ("replace .rounds.json", False),
    ("replace .rounds.html", True),
)


def matching(wanted: str, labels: list[str]) -> str:
    """The first label that begins as wanted, e.g. without the random part of a temporary name."""
    found = [label for label in labels if label.startswith(wanted)]
    assert found, f"{wanted} is not among {sorted(set(labels))}"
    return found[0]


@pytest.mark.slow
def test_killed_rounds_resume_bitwise_and_pay_nothing_twice(done, fork_server, chat_model, tmp_path, full):
    path, _, labels = done
    judge = ScriptedJudge()
    own = tiny_rounds(tmp_path, chat_model, judge.base_url)
    out, killed = tmp_path / "out", 0
    kills = [wanted for wanted, only_full in KILLS if full or not only_full]
    for wanted in kills:
        answered = {json.loads(line)["id"] for line in _answers(out / "requests.jsonl")}
        before = len(judge.received)
        job = fork_server.start(RUN, [own], FAULT_DIR=str(out), FAULT=matching(wanted, labels))
        (code,) = fork_server.wait(job)
        assert code in (0, -signal.SIGKILL), fork_server.output(job)
        killed += code == -signal.SIGKILL
        assert answered.isdisjoint(key for key, _ in judge.received[before:]), "an answer on disk was requested again"
    assert killed >= len(kills) - 1
    fork_server.run(RUN, [own])
    judge.close()
    assert results(out) == results(path.parent / "out")
    rows, selection = out / "round-1/rows.jsonl", out / "round-1/selection.json"
    rows.write_text(rows.read_text().splitlines()[0] + "\n")
    tree = read_json(selection)
    write_json(selection, {**tree, "files": {**tree["files"], "rows.jsonl": hash_file(rows)}})
    (output,) = fork_server.run(RUN, [own], code=2)
    assert f"{out / 'round-1/run'} was trained on other rows than those in {rows}; restore the file, or" in output


def _answers(log: Path) -> list[bytes]:
    return [line for line in log.read_bytes().split(b"\n") if b'"is": "answer"' in line] if log.exists() else []


@pytest.mark.slow
def test_ctrl_c_while_judging_and_while_training_resumes(done, fork_server, chat_model, tmp_path):
    """Answers in flight are kept, training saves a checkpoint, and the result is that of an undisturbed run."""
    path, _, _ = done
    judge = ScriptedJudge()
    own = tiny_rounds(tmp_path, chat_model, judge.base_url)
    jobs = []
    judge.on_request = lambda count: count == 6 and fork_server.signal(jobs[-1], signal.SIGINT)
    jobs.append(fork_server.start(RUN, [own]))
    assert fork_server.wait(jobs[-1]) == [130], fork_server.output(jobs[-1])
    assert "the same command resumes from there" in fork_server.output(jobs[-1])[0]
    assert len(_answers(tmp_path / "out" / "requests.jsonl")) == len(judge.received)
    jobs.append(fork_server.start(RUN, [own]))
    while not (tmp_path / "out/round-1/run/metrics.jsonl").exists():
        assert fork_server.poll(jobs[-1]) == [None], fork_server.output(jobs[-1])
        time.sleep(0.01)
    fork_server.signal(jobs[-1], signal.SIGINT)
    assert fork_server.wait(jobs[-1]) == [130], fork_server.output(jobs[-1])
    assert "Traceback" not in fork_server.output(jobs[-1])[0]
    fork_server.run(RUN, [own])
    judge.close()
    assert judge.repeated() == []
    assert results(tmp_path / "out") == results(path.parent / "out")
