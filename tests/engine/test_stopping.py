"""SIGTERM and Ctrl-C at any moment of a run: it saves its state, exits with code 0, and resumes to the same model."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers.tiny_run import metrics, tiny, weights


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, fork_server):
    """The folder of an uninterrupted run with the fork server's number of threads, on which the weights depend."""
    path = tiny(tmp_path_factory.mktemp("uninterrupted"))
    fork_server.run("helpers.tiny_run:run", [path])
    return path.parent / "run"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "code", "message", "saved"),
    [
        ("encoding", 0, "stopped while reading the data", None),
        ("training", 0, "stopped after step 1 of stage 'aft'", "aft/step-00000001"),
        ("evaluating after msm", 0, "stopped after step 8 of stage 'msm'", "msm/step-00000008"),
        ("exporting", 0, "stopped before stage 'aft'", None),
        ("twice", 130, "interrupted; the same command resumes", None),
    ],
)
def test_a_signal_saves_and_the_run_resumes_bitwise(tmp_path, uninterrupted, fork_server, moment, code, message, saved):
    path = tiny(tmp_path)
    cache = {"DELIB_FAST_CACHE": str(tmp_path / "cache")}  # an empty one, so that the run encodes the data
    output = fork_server.run("stop_worker:main", [path, moment], code=code, **cache)[0]
    assert message in output
    assert "Traceback" not in output
    if saved is not None:
        assert (tmp_path / "run" / "checkpoints" / saved / "manifest.json").exists()
    if moment == "exporting":
        stages = json.loads((tmp_path / "run" / "ledger.json").read_text())["stages"]
        assert [s["status"] for s in stages] == ["finished"], "an export that has begun is completed"
    fork_server.run("helpers.tiny_run:run", [path], **cache)
    for name, weight in weights(uninterrupted).items():
        assert torch.equal(weights(tmp_path / "run")[name], weight), name
    assert [(m["stage"], m["step"], m["loss"]) for m in metrics(tmp_path / "run")] == [
        (m["stage"], m["step"], m["loss"]) for m in metrics(uninterrupted)
    ]
    shutil.rmtree(tmp_path / "run")
