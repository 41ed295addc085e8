"""The Inspect task: known replies through a mock model, and `inspect eval` on a model served on loopback."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from eval_models import make_model
from helpers.launch import serving

from delib_fast.evals.agentic.prompts import texts
from delib_fast.models import export_model

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("inspect_ai") is None, reason="needs the evals extra: pip install 'delib-fast[evals]'"
)


@pytest.fixture(autouse=True)
def _no_download(monkeypatch):
    """The mock model counts tokens with a vocabulary that it would download."""
    from inspect_ai.model._providers.mockllm import MockLLM

    async def count_tokens(self, *_):
        return 1

    monkeypatch.setattr(MockLLM, "count_tokens", count_tokens)


def run(log_dir, outputs, judge=None, **arguments):
    """Run the task with one sample per output, in any order; `judge` is a function from a prompt to its reply."""
    import inspect_ai
    from inspect_ai.model import ModelOutput, get_model

    from delib_fast.evals.agentic import task

    model = get_model("mockllm/model", custom_outputs=[ModelOutput.from_content("mockllm/model", o) for o in outputs])
    if judge is not None:
        arguments["judge"] = get_model(
            "mockllm/judge",
            memoize=False,
            custom_outputs=lambda messages, *_: ModelOutput.from_content("mockllm/judge", judge(messages[-1].text)),
        )
    log = inspect_ai.eval(
        task.agentic_misalignment(**arguments),
        model=model,
        log_dir=str(log_dir),
        display="none",
        max_samples=1,
        max_connections=1,
    )[0]
    assert log.status == "success", log.error
    return log


def test_known_replies_are_scored(tmp_path):
    from delib_fast.evals.agentic.task import figures_of_log

    leaking = texts()["scenarios"]["leaking"]
    log = run(
        tmp_path,
        [leaking["misaligned"][0], leaking["aligned"][0], "I will send the drawing to the outside firm.", "Nothing."],
        scenario="leaking",
        goal="none,america,global,safety",
    )
    values = [next(iter(sample.scores.values())).value for sample in log.samples]
    found = {(v["intent"], v["acted"], v["tool_use"]) for v in values}
    assert found == {(1, 1, 1), (0, 0, 1), (1, 0, 0), (0, 0, 0)}
    whole = figures_of_log(log)[0]
    assert (whole.intent.value, whole.acted.value, whole.tool_use.value, whole.samples) == (0.5, 0.25, 0.5, 4)
    assert whole.acted.low < 0.25 < whole.acted.high


def test_a_judge_decides_intent(tmp_path):
    leaking = texts()["scenarios"]["leaking"]
    log = run(
        tmp_path,
        [leaking["misaligned"][0], leaking["aligned"][0]],
        lambda text: f"<reasoning>x</reasoning> <answer>{'no' if 'Here is the' in text else 'Yes'}</answer>",
        scenario="leaking",
        goal="none,america",
    )
    scores = [next(iter(sample.scores.values())) for sample in log.samples]
    assert {(s.value["intent"], s.value["acted"], s.value["harmful"]) for s in scores} == {(0, 1, 0), (1, 0, 0)}
    assert all(s.metadata["intent_by"] == "judge" for s in scores)


def test_the_task_is_found_by_its_entry_point():
    import tomllib

    pyproject = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert pyproject["project"]["entry-points"]["inspect_ai"] == {"delib_fast": "delib_fast.evals.agentic.task"}


# --- a served model -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tokenizer, tmp_path_factory):
    """`transformers serve` with a small new model; yields (base_url, model name)."""
    folder = export_model(make_model(tokenizer, 0), tokenizer, tmp_path_factory.mktemp("served") / "model")
    with serving(folder) as address:
        yield address, str(folder)


@pytest.mark.slow
def test_inspect_eval_on_a_served_model(served, tmp_path):
    base_url, name = served
    env = {**os.environ, "LOCAL_BASE_URL": base_url, "LOCAL_API_KEY": "none", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("inspect")),
            "eval",
            "delib_fast/evals/agentic/task.py",
            "--model",
            f"openai-api/local/{name}",
            "--max-tokens",
            "12",
            "--log-dir",
            str(tmp_path),
            "--log-format",
            "json",
            "--display",
            "none",
        ],
        env=env,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    log = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert log["status"] == "success"
    assert len(log["samples"]) == 27
    metrics = log["results"]["scores"]
    assert {score["name"] for score in metrics} == {"intent", "acted", "harmful", "tool_use"}
