"""A study from its file to its page: stages are trained once, and a killed study resumes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.tiny_study import tiny_study

from delib_fast.config import ConfigError


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished study of 2 MSM variants, 2 sizes and 2 seeds."""
    from delib_fast.study import load_study, run_study

    folder = tmp_path_factory.mktemp("study")
    path = tiny_study(
        folder,
        seeds=[1, 2],
        aft_sizes=[4, 12],
        published=True,
        contrasts=[
            {
                "title": "values less rules",
                "a": "MSM (values) + AFT (CoT)",
                "b": "MSM (rules) + AFT (CoT)",
                "metric": "choice",
            }
        ],
    )
    return path, run_study(load_study(path))


@pytest.mark.slow
def test_every_arm_is_measured(done):
    _, result = done
    tree = json.loads(result.json.read_text(), parse_constant=pytest.fail)
    labels = ["base", "AFT (no CoT)", "AFT (CoT)"] + [
        name.format(v)
        for v in ("rules", "values")
        for name in ("MSM ({})", "MSM ({}) + AFT (no CoT)", "MSM ({}) + AFT (CoT)")
    ]
    assert list(dict.fromkeys(arm["label"] for arm in tree["arms"])) == labels
    for arm in tree["arms"]:
        figure = arm["figures"]["choice"]
        assert set(figure["by seed"]) == {"1", "2"}
        mean = sum(s["value"] for s in figure["by seed"].values()) / 2
        assert figure["over seeds"]["value"] == pytest.approx(mean)
    (contrast,) = tree["contrasts"]
    assert contrast["a"] == "MSM (values) + AFT (CoT), 12 rows", "of several sizes, the largest"
    assert len(tree["efficiency"]["choice"]) == 4
    assert tree["cost"]["train_cpu_s"] > 0


@pytest.mark.slow
def test_each_stage_is_trained_once(done):
    """2 seeds × (1 base + 2 MSM + 3 parents × 2 sizes × 2 kinds of AFT); separate runs of the arms would train more."""
    path, result = done
    cost = [json.loads(line) for line in (path.parent / "out/cost.jsonl").read_text().splitlines()]
    trained = [record["task"] for record in cost if record.get("task", "").startswith("train")]
    assert len(trained) == len(set(trained)) == 2 * (1 + 2 + 3 * 2 * 2)
    measured = [record.get("task", "").startswith("measure") for record in cost]
    assert measured.index(True) < len(trained), "models are measured while others are still to be trained"
    assert result.summary["cost"]["stages_without_sharing"] == 2 * (1 + 2 * 2 + 2 * 2 * 2 + 2 * 3 * 2 * 2)
    assert len(list((path.parent / "out/stages").iterdir())) == len(trained)
    # the parent of an AFT stage in its ledger is the model of the MSM stage that it shares with others
    aft = [json.loads((f / "ledger.json").read_text())["stages"][0] for f in (path.parent / "out/stages").glob("aft-*")]
    parents = {entry["parent"]["path"] for entry in aft}
    assert len(parents) == 2 * 3


@pytest.mark.slow
def test_a_finished_study_trains_only_new_arms(done, monkeypatch):
    from delib_fast.study import load_study, run_study
    from delib_fast.study.run import describe_plan

    path, result = done
    messages: list[str] = []
    again = run_study(load_study(path), messages.append)
    assert "0 tasks" in messages[0]
    assert again.summary["arms"] == result.summary["arms"]
    more = path.with_name("more.yaml")
    more.write_text(path.read_text().replace("aft_sizes:\n- 4\n- 12", "aft_sizes:\n- 4\n- 12\ncot_weights:\n- 1\n- 0"))
    assert more.read_text() != path.read_text()
    plan = describe_plan(load_study(more))
    assert plan.count("already trained") == 2 * (1 + 2 + 3 * 2 * 2)
    assert plan.count("aft-seed") - plan.count("already trained") + 2 * 3 == 2 * 3 * 2, "3 parents × 2 sizes × weight 0"


@pytest.mark.slow
def test_the_page_loads_nothing(done):
    _, result = done
    page = result.page.read_text()
    assert [p.stem for p in result.pictures] == ["arms", "efficiency", "variants"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in result.pictures)
    assert page.count("data:image/png;base64,") == 3
    for outside in ('src="http', 'href="http', "<script"):
        assert outside not in page
    assert "arXiv 2605.02087v2, Fig. 4, Qwen3-32B, MSM + AFT (CoT)" in page
    assert "MSM (values) + AFT (CoT)" in page


def test_keys_depend_on_what_weights_depend_on(tmp_path):
    """A different seed, file, setting or parent gives a different key; a different location or log does not."""
    from delib_fast.study import load_study
    from delib_fast.study.plan import plan_study
    from delib_fast.study.run import prepare_data

    def keys(**changes):
        study = load_study(tiny_study(tmp_path, **changes))
        return {node.key for node in plan_study(study, prepare_data(study, 1, print)).nodes}

    seeds, one = keys(), keys(seeds=[1])
    assert one < seeds
    assert keys(seeds=[1], out=str(tmp_path / "elsewhere")) == one
    assert not keys(seeds=[1], prepare={"script": "make.py", "args": ["--rows", 13]}) & one
    run = load_study(tiny_study(tmp_path, seeds=[1])).run
    assert keys(seeds=[1], run={**run, "log": {"every_steps": 1}}) == one
    base = {"kind": "msm", "name": "pretrain", "train": ["text"], "pack_capacity": 64, "tokens_per_step": 64}
    assert not keys(seeds=[1], base=[base]) & one, "a changed parent changes all later stages"
    aft = {"train": ["demos"], "pack_capacity": 64, "tokens_per_step": 128}
    assert len(keys(seeds=[1], aft=aft) & one) == 3, "a changed AFT does not change base and MSM"


def test_an_arm_is_measured_before_another_is_trained(tmp_path):
    """A worker takes the first task whose dependencies are done, so a model is measured as soon as it is trained."""
    from delib_fast.study import load_study
    from delib_fast.study.plan import plan_study
    from delib_fast.study.run import plan_tasks, prepare_data

    study = load_study(tiny_study(tmp_path))
    prepared = prepare_data(study, 1, print)
    tasks, files = plan_tasks(study, plan_study(study, prepared), prepared)
    assert len(tasks) == 2 * len(files), "in this study every stage is the last of an arm"
    for training, measuring in zip(tasks[::2], tasks[1::2], strict=True):
        assert training.name.startswith("train ")
        assert measuring.name == training.name.replace("train ", "measure ")
        assert measuring.depends_on == (training.name,)
    done = [task.name for task in tasks]
    assert all(done.index(name) < i for i, task in enumerate(tasks) for name in task.depends_on), (
        "parents before children"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [1, 1]}, "seeds: 1 is given twice"),
        ({"armz": ["base"]}, "armz: unknown key .did you mean 'arms'"),
        ({"arms": ["msm_aft_cot"], "aft": None}, "the arm msm_aft_cot needs aft:"),
        ({"run": {"stages": []}}, "run: stages is set by the study .see base, msm and aft.; remove it"),
        (
            {"alignment": "choise"},
            "alignment names the metric 'choise', which is not under metrics: .did you mean 'choice'",
        ),
        ({"aft": {"train": ["demos"], "epoch": 1}}, "epoch: unknown key .did you mean 'epochs'"),
        ({"prepare": None}, "is in the folder of the `prepare` script, but the study has no prepare:"),
        (
            {"metrics": {"dose": {"kind": "suite", "suite": "dose", "row": "aft", "column": "dose"}}},
            "metrics.dose belongs to the suite dose, which measures an arm's AFT stage, and the arm [a-z_]+ has none",
        ),
        (
            {"contrasts": [{"title": "t", "a": "MSM (value) + AFT (CoT)", "b": "base", "metric": "choice"}]},
            "names the arm .*, which is not in the study .did you mean 'MSM .values. . AFT",
        ),
    ],
)
def test_rejects_before_anything_is_trained(tmp_path, changes, message):
    from delib_fast.study import load_study, run_study

    with pytest.raises(ConfigError, match=message):
        run_study(load_study(tiny_study(tmp_path, **changes)))
    assert not (tmp_path / "out/stages").exists()


@pytest.mark.slow
def test_a_killed_study_resumes(tmp_path):
    """A study is killed while it trains: its workers exit, and the same command trains what is missing."""
    path = tiny_study(tmp_path, seeds=[1], arms=["base", "msm_aft_cot"])
    command = [sys.executable, "-m", "delib_fast.cli.main", "study", str(path)]
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    cost = tmp_path / "out/cost.jsonl"
    deadline = time.monotonic() + 900
    while not (cost.exists() and "train pretrain" in cost.read_text()):
        assert first.poll() is None, "the study ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    while workers_of(tmp_path):
        assert time.monotonic() < deadline, "a worker is still running after its study"
        time.sleep(0.1)
    before = cost.read_text().count("train pretrain")
    second = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert second.returncode == 0, second.stderr
    assert "base" in second.stdout
    assert cost.read_text().count("train pretrain") == before, "a trained stage is not trained again"
    assert json.loads((tmp_path / "out/study.json").read_text())["arms"][0]["label"] == "base"


def workers_of(folder: Path) -> list[str]:
    """The processes that have a log of this study open."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            try:
                targets = [os.readlink(fd) for fd in (process / "fd").iterdir()]
            except OSError:
                continue
            if any(target.startswith(str(folder / "out/logs")) for target in targets):
                found.append(process.name)
    return found


def test_a_failed_task_skips_only_those_that_depend_on_it(tmp_path):
    """The tasks that depend on the failed task are skipped, and the error names the failed task and its log."""
    from delib_fast.study.pool import StudyError, Task, run_tasks

    log = str(tmp_path / "log")
    bad = {"do": "train", "config": {"run_dir": "-"}, "log": log}
    fine = {
        "do": "measure",
        "folder": "-",
        "log": log,
        "metrics": {},
        "device": "cpu",
        "base": None,
        "thinks": False,
        "evaluation": {},
        "out": "-",
    }
    done = []
    with pytest.raises(StudyError, match=r"(?s)first: study: model: missing.*\(log:") as caught:
        run_tasks([Task("first", bad), Task("second", fine, ("first",))], [{}], lambda task, _: done.append(task.name))
    assert "second" not in str(caught.value)
    assert not done
