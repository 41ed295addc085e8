"""A study as a process: what is trained first, what is trained again, and what a killed or failed one repeats."""

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


def test_the_prepare_script_runs_again_if_an_input_changes(tmp_path):
    """A change of what the script reads would otherwise leave the data of the old inputs in use."""
    from delib_fast.study import load_study
    from delib_fast.study.run import prepare_data

    (tmp_path / "words").mkdir()
    script = """import argparse, pathlib
parser = argparse.ArgumentParser()
parser.add_argument("--seed"), parser.add_argument("--out", type=pathlib.Path)
out = parser.parse_args().out
out.mkdir(parents=True)
here = pathlib.Path(__file__).parent
(out / "rows.txt").write_text((here / "words/a.txt").read_text() + (here / "b.csv").read_text())
"""
    prepare = {"script": "read.py", "inputs": ["words", "b.csv"]}

    def made(a, b):
        (tmp_path / "words/a.txt").write_text(a)
        (tmp_path / "b.csv").write_text(b)
        study = load_study(tiny_study(tmp_path, seeds=[1], prepare=prepare))
        (tmp_path / "read.py").write_text(script)
        folder = prepare_data(study, 1, print)[1]
        return folder, (folder / "rows.txt").read_text()

    first = made("one", "two")
    assert first[1] == "onetwo"
    assert made("one", "2")[1] == "one2"
    assert made("1", "two")[1] == "1two"
    assert made("one", "two") == first


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
    assert keys(seeds=[1], run={**run, "export": {"check": False}}) == one
    templates = {}
    for name, text in (("first", "{{ messages }}"), ("copy", "{{ messages }}"), ("other", "{{ messages }}.")):
        (tmp_path / f"{name}.jinja").write_text(text)
        template = {"chat_template": str(tmp_path / f"{name}.jinja")}
        templates[name] = keys(seeds=[1], run={**run, "tokenizer": {**run["tokenizer"], **template}})
    assert templates["first"] == templates["copy"], "the content of a file matters, not its path"
    assert not templates["first"] & templates["other"]
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
            {"prepare": {"script": "make.py", "inputs": ["gone.csv"]}},
            r"prepare\.inputs: .*gone\.csv: no such file or folder",
        ),
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
