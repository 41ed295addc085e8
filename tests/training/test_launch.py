"""Runs in separate processes: stopped, killed and resumed, with every launcher, on two ranks, for each arm."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from helpers.launch import HANG_S, ROOT, free_port
from helpers.tiny_run import metrics, run, tiny, weights


def start(path: Path, *overrides: str) -> subprocess.Popen[str]:
    words = [word for item in overrides for word in ("--set", item)]
    return subprocess.Popen(
        [sys.executable, "-m", "delib_fast.train", "--config", str(path), *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_step(run_dir: Path, process: subprocess.Popen[str], stage: str, step: int) -> None:
    deadline = time.monotonic() + HANG_S
    while time.monotonic() < deadline and process.poll() is None:
        if (run_dir / "metrics.jsonl").exists() and any(
            line["stage"] == stage and line["step"] >= step for line in metrics(run_dir)
        ):
            return
        time.sleep(0.02)
    process.kill()
    pytest.fail(f"the run ended or hung before step {step} of {stage}:\n{process.communicate()[0]}")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["msm", "aft"])
def test_stopped_run_resumes_bitwise(tmp_path, finished, stage):
    path = tiny(tmp_path)
    process = start(path)
    wait_for_step(tmp_path / "run", process, stage, 2)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=HANG_S)[0]
    assert process.returncode == 0, output
    assert "the same command resumes from there" in output
    assert list((tmp_path / "run" / "checkpoints" / stage).glob("step-*/manifest.json"))
    assert run(path) == 0
    for name, weight in weights(finished).items():
        assert torch.equal(weights(tmp_path / "run")[name], weight), name
    assert [(m["stage"], m["step"], m["loss"]) for m in metrics(tmp_path / "run")] == [
        (m["stage"], m["step"], m["loss"]) for m in metrics(finished)
    ]


@pytest.mark.slow
def test_killed_run_resumes_bitwise(tmp_path, finished):
    path = tiny(tmp_path)
    process = start(path, "checkpoint.every_steps=1")
    wait_for_step(tmp_path / "run", process, "aft", 2)
    process.kill()
    process.communicate()
    assert run(path) == 0
    for name, weight in weights(finished).items():
        assert torch.equal(weights(tmp_path / "run")[name], weight), name
    assert [(m["stage"], m["step"], m["loss"]) for m in metrics(tmp_path / "run")] == [
        (m["stage"], m["step"], m["loss"]) for m in metrics(finished)
    ]


LAUNCHERS = {
    "deepspeed": ["deepspeed", "--num_accelerators", "1", "--master_port", "{port}", "delib_fast/train.py"],
    "deepspeed --module": [
        "deepspeed",
        "--num_accelerators",
        "1",
        "--master_port",
        "{port}",
        "--module",
        "delib_fast.train",
    ],
    "torchrun": ["torchrun", "--nproc_per_node", "1", "--master_port", "{port}", "delib_fast/train.py"],
    "python": ["python", "delib_fast/train.py"],
}


def launch(launcher: list[str], path: Path, *words: str, timeout: float = HANG_S) -> subprocess.CompletedProcess[str]:
    binary = Path(sys.executable).parent / launcher[0]
    command = [word.format(port=free_port()) for word in [str(binary), *launcher[1:]]]
    return subprocess.run(
        [*command, "--config", str(path), *words],
        cwd=ROOT,
        text=True,
        timeout=timeout,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"DS_ACCELERATOR": "cpu"},
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHERS)
def test_launchers_give_the_same_model(tmp_path, finished, name):
    done = launch(LAUNCHERS[name], tiny(tmp_path))
    assert done.returncode == 0, done.stdout
    for key, weight in weights(finished).items():
        assert torch.equal(weights(tmp_path / "run")[key], weight), key


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ranks", "number", "to_all"),
    [
        ("deepspeed", 2, signal.SIGINT, True),  # Ctrl-C in a terminal reaches the launcher and the ranks
        ("deepspeed", 1, signal.SIGTERM, False),  # the launcher dies and does not signal the ranks
        ("torchrun", 2, signal.SIGTERM, False),
    ],
)
def test_ranks_save_and_end_after_a_signal_to_the_launcher(tmp_path, name, ranks, number, to_all):
    """The ranks save within a step and end; no process is left. The launcher's exit code is not ours."""
    path = tiny(tmp_path)
    start = [str(ranks) if word == "1" else word.format(port=free_port()) for word in LAUNCHERS[name]]
    with (tmp_path / "output").open("w") as output:
        process = subprocess.Popen(
            [
                str(Path(sys.executable).parent / start[0]),
                *start[1:],
                "--config",
                str(path),
                "--set",
                "stages.aft.epochs=40",
            ],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        )
        wait_for_step(tmp_path / "run", process, "aft", 2)
        children = psutil.Process(process.pid).children(recursive=True)
        (os.killpg if to_all else os.kill)(process.pid, number)
        process.wait(HANG_S)
        _, alive = psutil.wait_procs(children, timeout=HANG_S)
    assert not alive, "orphaned processes"
    output = (tmp_path / "output").read_text()
    assert output.count("the same command resumes from there") == 1, output
    last = metrics(tmp_path / "run")[-1]["step"]
    assert (tmp_path / "run" / "checkpoints" / "aft" / f"step-{last:08d}" / "manifest.json").exists()


@pytest.mark.slow
def test_two_ranks_under_zero_3_have_the_loss_of_one(tmp_path, finished):
    launcher = ["deepspeed", "--num_accelerators", "2", "--master_port", "{port}", "delib_fast/train.py"]
    done = launch(launcher, tiny(tmp_path), "--set", "engine.zero_stage=3")
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("Held-out nll") == 1, "only rank 0 prints"
    for stage in json.loads((tmp_path / "run" / "ledger.json").read_text())["stages"]:
        assert stage["export_check"]["model"]["difference"] < 1e-6
    for ours, alone in zip(metrics(tmp_path / "run"), metrics(finished), strict=True):
        assert (ours["stage"], ours["step"], ours["tokens"]) == (alone["stage"], alone["step"], alone["tokens"])
        assert ours["loss"] == pytest.approx(alone["loss"], rel=1e-4)  # AdamW magnifies the order of sums


@pytest.mark.slow
def test_two_nodes_shard_each_pack(tmp_path, finished):
    """torchrun on two "machines" that meet on loopback, with one rank each; every pack is sharded across both."""
    path, port = tiny(tmp_path), free_port()
    start = [
        str(Path(sys.executable).parent / "torchrun"),
        "--nnodes",
        "2",
        "--nproc_per_node",
        "1",
        "--rdzv_backend",
        "c10d",
        "--rdzv_endpoint",
        f"127.0.0.1:{port}",
        "--rdzv_id",
        "two-nodes",
    ]
    nodes = [
        subprocess.Popen(
            [
                *start,
                "--node_rank",
                str(node),
                "delib_fast/train.py",
                "--config",
                str(path),
                "--set",
                "engine.sequence_parallel=2",
                "engine.zero_stage=3",
            ],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | {"DS_ACCELERATOR": "cpu"},
        )
        for node in range(2)
    ]
    outputs = [node.communicate(timeout=HANG_S)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    for ours, alone in zip(metrics(tmp_path / "run"), metrics(finished), strict=True):
        for key in ("stage", "step", "tokens", "supervised_tokens"):
            assert ours[key] == alone[key], "every token counts once, though two ranks have each pack"
        # At first only rounding differs; later AdamW magnifies the order of the sums, to 1e-4 at the end of this run.
        if ours["stage"] == "msm" or ours["step"] <= 5:
            assert ours["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    output, expected = (
        [e["segments"] for e in json.loads((run / "ledger.json").read_text())["evaluations"]]
        for run in (tmp_path / "run", finished)
    )
    assert len(output) == len(expected) == 3
    for stage in json.loads((tmp_path / "run" / "ledger.json").read_text())["stages"]:
        assert stage["export_check"]["model"]["difference"] < 1e-6  # of the tokens of the first shard
    for moment in (0, 1):  # before training, and after MSM
        for segment, figures in expected[moment].items():
            assert output[moment][segment]["tokens"] == figures["tokens"]
            assert output[moment][segment]["nll"] == pytest.approx(figures["nll"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["aft_no_cot", "aft_cot", "msm_aft_no_cot", "msm_aft_cot"])
def test_each_example_arm_trains_the_right_segments(tmp_path, arm):
    path = ROOT / "examples" / "configs" / f"{arm}.yaml"
    shrink = [f"run_dir={tmp_path / 'run'}", "model.architecture.num_hidden_layers=1", "stages.aft.max_steps=2"]
    if arm.startswith("msm"):
        shrink.append("stages.msm.max_steps=2")
    assert run(path, *shrink) == 0
    ledger = json.loads((tmp_path / "run" / "ledger.json").read_text())
    assert set(ledger["stages"][-1]["supervised_tokens"]) == (
        {"response"} if arm.endswith("no_cot") else {"cot", "response"}
    )
    assert ("no CoT: response" in ledger["evaluations"][-1]["segments"]) == arm.endswith("no_cot")


@pytest.mark.slow
def test_teacher_of_the_end_to_end_example_starts(tmp_path):
    """Training must accept the rows that the script generates, or the example would end before its first step."""
    lessons = tmp_path / "lessons.jsonl"
    subprocess.run([sys.executable, "examples/datagen/make_lessons.py", str(lessons)], cwd=ROOT, check=True)
    assert (
        run(
            ROOT / "examples" / "datagen" / "teacher.yaml",
            f"run_dir={tmp_path / 'run'}",
            f"data.lessons.path={lessons}",
            "model.architecture.num_hidden_layers=1",
            "stages.teach.max_steps=1",
        )
        == 0
    )
