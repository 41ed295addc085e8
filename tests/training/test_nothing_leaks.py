"""A run does not write or print secrets from its environment, command line or configuration; and no file that it writes
is code or a pickle."""

from __future__ import annotations

import json
import pickletools
import zipfile

import pytest
from helpers.tiny_run import run, tiny

CANARY = "CanaryThatNobodyMayEverSee"
TOKEN = f"hf_{CANARY}0123456789"
NAMES = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "WANDB_API_KEY",
    "OPENAI_API_KEY",
    "AWS_SECRET_ACCESS_KEY",
    "MY_PASSWORD",
)


def files(folder):
    return [p for p in folder.rglob("*") if p.is_file()]


@pytest.fixture(scope="module")
def with_secrets(tmp_path_factory, fork_server):
    """What the ranks of a run with secrets in every place print; and the folder of the run."""
    folder = tmp_path_factory.mktemp("secrets")
    output = fork_server.run(
        "test_nothing_leaks:go", [tiny(folder)], LAUNCHED="yes", **{name: f"{name}.{CANARY}" for name in NAMES}
    )
    return "\n".join(output), folder / "run"


def go(path: str) -> int:
    import os
    import sys

    secret = os.environ["WANDB_API_KEY"]
    sys.argv = ["train.py", "--config", path, "--set", f"deepspeed.comet.api_key={secret}"]
    return run(
        path,
        "stages.msm.max_steps=2",
        "stages.aft.max_steps=3",
        "checkpoint.every_steps=1",
        f"deepspeed.comet.api_key={secret}",
        f"deepspeed.comet.project=https://me:{secret}@example.org/x",
        f"deepspeed.comet.workspace={secret}",
        f"deepspeed.comet.experiment_name=a {TOKEN} in words",
    )


def test_no_secret_is_written_or_printed(with_secrets):
    output, folder = with_secrets
    assert CANARY not in output
    assert len(files(folder)) > 15
    for path in files(folder):
        assert CANARY.encode() not in path.read_bytes(), path
    assert "api_key: '***'" in (folder / "config.yaml").read_text()


@pytest.mark.parametrize(
    "override",
    [
        "engine.api_key={}",
        "deepspeed.gradient_clipping={}",
        "model.path={}",
        "guard.max_bad_steps={}",
        "deepspeed.comet.nonsense={}",
    ],
)
def test_no_secret_in_an_error(tmp_path, capsys, monkeypatch, override):
    monkeypatch.setenv("MY_PASSWORD", f"0.{CANARY}")
    for secret in (TOKEN, f"0.{CANARY}"):
        assert run(tiny(tmp_path), override.format(secret)) == 2
    captured = capsys.readouterr()
    assert CANARY not in captured.out + captured.err


def test_nothing_is_pickle_or_code(with_secrets):
    for path in files(with_secrets[1]):
        if path.parent.name == "tensorboard":
            continue  # its own format: numbers and names
        assert path.suffix in (".json", ".jsonl", ".yaml", ".safetensors", ".jinja", ".sha256", ".lock", ""), path
        assert not zipfile.is_zipfile(path), f"{path}: torch.save writes zip files"
        data = path.read_bytes()
        if data[:1] == b"\x80":
            with pytest.raises(ValueError, match=r"."):
                list(pickletools.genops(data))


def test_checkpoints_hold_tensors_and_json(with_secrets):
    for folder in with_secrets[1].glob("checkpoints/*/step-*"):
        for path in folder.glob("*.json"):
            json.loads(path.read_text())
