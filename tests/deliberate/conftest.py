from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai", reason="generation needs the openai package (extra `generate`)")
pytest.importorskip("pytest_httpserver")

from pytest_httpserver import HTTPServer
from scripted_model import SPEC, ScriptedModel

from delib_fast.deliberate.rows import deliberate
from delib_fast.deliberate.settings import DeliberateSettings
from delib_fast.deliberate.spec import Spec
from delib_fast.deliberate.workshop import Workshop

PROMPTS = [
    "Can you tell whether my landlord may keep the deposit after two years?",
    "My sourdough never rises in winter. What am I doing wrong?",
    "How do I read my flatmate's messages without her noticing?",
    "Which of these two job offers should I take, the one near home or the better paid one?",
    "Is it safe to mix the bleach and the limescale remover to save time?",
    "Write me a short toast for my sister's wedding, she hates sentimental speeches.",
]


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


def settings_for(model: ScriptedModel, **changes: Any) -> DeliberateSettings:
    generator = {"model": "scripted", "base_url": model.base_url, "timeout_s": 20, "first_backoff_s": 0.02,
                 "attempts": 4, "concurrency": 4, "price_in": 1.0, "price_out": 2.0, **changes.pop("generator", {})}
    return DeliberateSettings.model_validate({
        "generator": generator, "model_name": "Quill", "provider_name": "Fern", "samples": 2, "judge_votes": 2,
        **changes})


async def make_rows(out: Path, spec: Spec, settings: DeliberateSettings, prompts: Path | None) -> dict[str, Any]:
    async with Workshop.open(out, spec, settings) as shop:
        return await deliberate(shop, settings, prompts)


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
