"""Both backends with a real model: `transformers serve` on this machine, and in this process.

The model is small and has random weights, so its answers are noise. The tests check that every answer is kept, counted
and never requested again.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from generation_runs import PROMPTS, read_rows, run_deliberate
from helpers.launch import serving
from helpers.small_models import tiny_qwen3

from delib_fast.datagen.request_log import RequestLog
from delib_fast.datagen.settings import DeliberateSettings
from delib_fast.datagen.spec import Spec

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as a training run exports it."""
    from delib_fast.config import ModelConfig
    from delib_fast.models import build_model, export_model, train_tokenizer

    texts = [" ".join(PROMPTS), Path(__file__).read_text()] * 4
    tokenizer = train_tokenizer(texts, 512)
    architecture = tiny_qwen3(max_position_embeddings=16384, tie_word_embeddings=True)
    model = build_model(ModelConfig.model_validate({"architecture": architecture}), tokenizer)
    model.generation_config.do_sample = True  # without it, transformers serve is greedy at every temperature
    return export_model(model, tokenizer, tmp_path_factory.mktemp("model") / "small")


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[str]:
    """The address of `transformers serve` with that model."""
    with serving(folder) as address:
        yield address


def settings(**generator: Any) -> DeliberateSettings:
    # Six tokens per answer, and random weights cannot judge: every row is dropped with a reason.
    return DeliberateSettings.model_validate(
        {
            "generator": {"max_tokens": 6, "concurrency": 3, "temperature": 1.0, **generator},
            "model_name": "Quill",
            "provider_name": "Fern",
            "samples": 2,
            "list_attempts": 2,
            "cot_from": "reasoning",
        }
    )


def prompts(folder: Path) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "category": "rule-1"}) + "\n" for p in PROMPTS[:3]))
    return path


def check(out: Path, spec: Spec, run_settings: DeliberateSettings, prompts_file: Path) -> RequestLog:
    summary = asyncio.run(run_deliberate(out, spec, run_settings, prompts_file))
    assert summary["rows"] == 0
    assert sum(summary["dropped"].values()) == 6
    assert set(summary["dropped"]) <= {"truncated", "no_cot", "no_response", "leaked_scaffolding", "cot_too_short"}
    assert summary["paid"]["answers"] == 6
    assert 6 <= summary["paid"]["completion_tokens"] <= 36
    assert summary["paid"]["prompt_tokens"] > 6 * 300, "the spec and the prompt were sent"
    again = asyncio.run(run_deliberate(out, spec, run_settings, prompts_file))
    assert again["this_run"]["answers"] == 0
    assert again["dropped"] == summary["dropped"]
    return RequestLog(out / "requests.jsonl")


def test_served_answers_are_kept_and_reused(folder: Path, served: str, spec: Spec, tmp_path: Path) -> None:
    log = check(tmp_path / "out", spec, settings(model=str(folder), base_url=served), prompts(tmp_path))
    answers = [r for r in read_rows(tmp_path / "out" / "requests.jsonl") if r["is"] == "answer"]
    assert all(log.get(r["id"]) is not None for r in answers)
    assert {r["answer"]["finish"] for r in answers} <= {"length", "stop"}
    assert any(r["answer"]["text"] for r in answers)
    assert {r["attempts"] for r in answers} == {1}


def test_in_process_answers_are_kept_and_reused(folder: Path, spec: Spec, tmp_path: Path) -> None:
    run_settings = settings(model=str(folder), backend="transformers")
    check(tmp_path / "out", spec, run_settings, prompts(tmp_path))


def test_in_process_equals_served_when_greedy(
    folder: Path, served: str, spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy decoding gives equal answers with both backends, so both apply the chat template in the same way.

    The server computes in the precision of the model's file, fp32.
    """
    monkeypatch.setattr("delib_fast.models.precision.native_precision", lambda device: "fp32")
    texts = {}
    for name, generator in (("served", {"base_url": served}), ("in process", {"backend": "transformers"})):
        run_settings = settings(model=str(folder), temperature=0.0, **generator)
        asyncio.run(run_deliberate(tmp_path / name, spec, run_settings, prompts(tmp_path)))
        answers = [r for r in read_rows(tmp_path / name / "requests.jsonl") if r["is"] == "answer"]
        texts[name] = {r["id"]: (r["answer"]["text"].strip(), r["answer"]["prompt_tokens"]) for r in answers}
    assert texts["served"] == texts["in process"]
