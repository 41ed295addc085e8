from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("httpx", reason="generation needs the httpx package (extra `generate`)")
pytest.importorskip("pytest_httpserver")

from generation_runs import PROMPTS
from pytest_httpserver import HTTPServer
from scripted_model import SPEC, ScriptedModel

from delib_fast.datagen.spec import Spec


@pytest.fixture(autouse=True)
def _no_outside_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.delenv(name, raising=False)
    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)


@pytest.fixture
def model() -> Iterator[ScriptedModel]:
    server = HTTPServer(host="127.0.0.1", port=0, threaded=True)
    server.start()
    yield ScriptedModel(server)
    server.clear()
    if server.is_running():
        server.stop()


@pytest.fixture
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with spec.md and prompts.txt."""
    monkeypatch.chdir(tmp_path)
    Path("spec.md").write_text(SPEC)
    Path("prompts.txt").write_text("How do I prune a rose?\nMay I read my son's diary?\n")
    return tmp_path


@pytest.fixture
def invoke(model: ScriptedModel, run_folder: Path) -> Callable[[str], tuple[int, str]]:
    """Run a command in `run_folder`, with the options of the model for `URL`. Returns the exit code and the output."""
    import typer
    from typer.testing import CliRunner

    from delib_fast.cli.datagen import register

    app = typer.Typer()
    register(app)

    def run(command: str) -> tuple[int, str]:
        url = f"--model scripted --base-url {model.base_url} --set generator.first_backoff_s=0.01"
        result = CliRunner().invoke(app, command.replace("URL", url).split())
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.output

    return run


@pytest.fixture
def spec() -> Spec:
    return Spec.of(SPEC, model_name="Quill", provider_name="Fern")


@pytest.fixture
def prompts_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return path
