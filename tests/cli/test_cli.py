"""The command line: its help, what it imports, and its errors."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from delib_fast.cli.main import app
from delib_fast.config import ConfigError

runner = CliRunner()


def test_help_lists_every_command_and_imports_no_torch():
    code = (
        "import sys; from typer.testing import CliRunner; from delib_fast.cli.main import app; "
        "print(CliRunner().invoke(app, ['--help']).stdout); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("config", "train", "ledger", "env", "deliberate", "document", "data-report", "eval"):
        assert name in done.stdout


def test_config_imports_no_torch_and_no_transformers(tmp_path):
    """Importing them takes seconds, and checking a file needs neither."""
    run = tmp_path / "run.yaml"
    run.write_text(
        "run_dir: run\nmodel: {path: folder, lora: {r: 4}}\ndata: {rows: rows.jsonl}\n"
        "stages: [{kind: aft, train: [rows], pack_capacity: 64, tokens_per_step: 64}]\n"
    )
    code = (
        "import sys; from typer.testing import CliRunner; from delib_fast.cli.main import app; "
        f"done = CliRunner().invoke(app, ['config', {str(run)!r}]); print(done.stdout); "
        "assert not done.exit_code and not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tokens_per_step: 64" in done.stdout


@pytest.mark.parametrize("name", ["deliberate", "document", "data-report", "eval", "rounds"])
def test_lazy_commands_have_help(name):
    done = runner.invoke(app, [name, "--help"])
    assert done.exit_code == 0
    assert "Usage" in done.stdout


def test_config_prints_the_json_schema():
    assert json.loads(runner.invoke(app, ["config", "--schema"]).stdout)["title"] == "Config"


def test_config_prints_overrides_and_defaults():
    done = runner.invoke(app, ["config", "examples/quickstart.yaml", "--set", "stages.aft.cot=strip"])
    assert "cot: strip" in done.stdout
    assert "weight_decay: 0.01" in done.stdout


@pytest.mark.parametrize("name", ["nowhere", "README.md"])
def test_ledger_of_no_run_directory_is_a_config_error(name):
    done = runner.invoke(app, ["ledger", name])
    assert isinstance(done.exception, ConfigError)
    assert f"is {name} a run directory?" in str(done.exception)


def test_output_that_cannot_be_written_is_an_error():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "delib_fast.cli.main", "config", "examples/quickstart.yaml"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 3
    assert done.stderr.splitlines()[0] == "error: the output: No space left on device"


def test_env_lists_the_backends_of_the_ops():
    output = runner.invoke(app, ["env"]).stdout
    assert "linear_cross_entropy" in output
    assert "reference" in output
