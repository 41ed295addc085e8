"""Prompts, settings and a whole run of `deliberate`, for the tests of delib_fast.datagen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scripted_model import ScriptedModel

from delib_fast.datagen.rows import generate_rows
from delib_fast.datagen.session import Session
from delib_fast.datagen.settings import DeliberateSettings
from delib_fast.datagen.spec import Spec

PROMPTS = [
    "Can you tell whether my landlord may keep the deposit after two years?",
    "My sourdough never rises in winter. What am I doing wrong?",
    "How do I read my flatmate's messages without her noticing?",
    "Which of these two job offers should I take, the one near home or the better paid one?",
    "Is it safe to mix the bleach and the limescale remover to save time?",
    "Write me a short toast for my sister's wedding, she hates sentimental speeches.",
]


def settings_for(model: ScriptedModel, **changes: Any) -> DeliberateSettings:
    generator = {
        "model": "scripted",
        "base_url": model.base_url,
        "timeout_s": 20,
        "first_backoff_s": 0.02,
        "attempts": 4,
        "concurrency": 4,
        "price_in": 1.0,
        "price_out": 2.0,
        **changes.pop("generator", {}),
    }
    return DeliberateSettings.model_validate(
        {
            "generator": generator,
            "model_name": "Quill",
            "provider_name": "Fern",
            "samples": 2,
            "judge_votes": 2,
            **changes,
        }
    )


async def run_deliberate(out: Path, spec: Spec, settings: DeliberateSettings, prompts: Path | None) -> dict[str, Any]:
    async with Session.open(out, spec, settings) as session:
        return await generate_rows(session, settings, prompts)


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
