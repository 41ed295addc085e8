"""A real model behind both backends: `transformers serve` on loopback, and in this process.

The model is a small one with random weights, made here from a config: what it writes is noise, so what is looked at
is that every answer is real, kept, counted and never asked for again.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.launch import serving
from helpers.small_models import tiny_qwen3
from making import PROMPTS, make_rows, read_rows

from delib_fast.datagen.request_log import RequestLedger
from delib_fast.datagen.settings import DeliberateSettings
from delib_fast.datagen.spec import Spec

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder such as a run of this project exports."""
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
    # Six tokens an answer, and a judge that random weights can't be: every row goes, with its reason.
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


def check(out: Path, spec: Spec, made: DeliberateSettings, prompts_file: Path) -> RequestLedger:
    summary = asyncio.run(make_rows(out, spec, made, prompts_file))
    assert summary["rows"] == 0
    assert sum(summary["dropped"].values()) == 6
    assert set(summary["dropped"]) <= {"truncated", "no_cot", "no_response", "leaked_scaffolding", "cot_too_short"}
    assert summary["paid"]["answers"] == 6
    assert 6 <= summary["paid"]["completion_tokens"] <= 36
    assert summary["paid"]["prompt_tokens"] > 6 * 300, "the spec and the prompt were sent"
    again = asyncio.run(make_rows(out, spec, made, prompts_file))
    assert again["this_run"]["answers"] == 0
    assert again["dropped"] == summary["dropped"]
    return RequestLedger(out / "requests.jsonl")


def test_transformers_serve(folder: Path, served: str, spec: Spec, tmp_path: Path) -> None:
    ledger = check(tmp_path / "out", spec, settings(model=str(folder), base_url=served), prompts(tmp_path))
    answers = [r for r in read_rows(tmp_path / "out" / "requests.jsonl") if r["is"] == "answer"]
    assert all(ledger.get(r["id"]) is not None for r in answers)
    assert {r["answer"]["finish"] for r in answers} <= {"length", "stop"}
    assert any(r["answer"]["text"] for r in answers)
    assert {r["attempts"] for r in answers} == {1}


def test_in_process(folder: Path, spec: Spec, tmp_path: Path) -> None:
    made = settings(model=str(folder), backend="transformers")
    check(tmp_path / "out", spec, made, prompts(tmp_path))


def test_in_process_equals_served_when_greedy(folder: Path, served: str, spec: Spec, tmp_path: Path) -> None:
    """With no sampling both backends write the same, so the chat and its template arrive alike, batched or not."""
    texts = {}
    for name, generator in (("served", {"base_url": served}), ("in process", {"backend": "transformers"})):
        made = settings(model=str(folder), temperature=0.0, **generator)
        asyncio.run(make_rows(tmp_path / name, spec, made, prompts(tmp_path)))
        answers = [r for r in read_rows(tmp_path / name / "requests.jsonl") if r["is"] == "answer"]
        texts[name] = {r["id"]: (r["answer"]["text"].strip(), r["answer"]["prompt_tokens"]) for r in answers}
    assert texts["served"] == texts["in process"]
