from __future__ import annotations

import json
import logging
from collections.abc import Iterator
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
def spec() -> Spec:
    return Spec.of(SPEC, model_name="Quill", provider_name="Fern")


@pytest.fixture
def prompts_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return path
