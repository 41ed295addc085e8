"""The commands as users run them: options, messages, exit statuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer
from scripted_model import ScriptedModel, status

from delib_fast.cli.datagen import register
from delib_fast.config import ConfigError
from delib_fast.config.load import load
from delib_fast.datagen.settings import SETTINGS_FILE, DeliberateSettings, DocumentSettings
from delib_fast.datagen.spec import Spec
from delib_fast.datagen.user_prompts import read_prompts


def test_a_spec_becomes_rows_documents_and_reports(invoke) -> None:
    code, output = invoke(
        "deliberate spec.md prompts.txt -o rows URL -n 2 -k 2 --style cite --also-no-cot --model-name Quill"
    )
    assert code == 0
    assert "4 rows of 2 prompts → rows/rows.jsonl" in output
    assert "answers paid for: 14" in output
    code, output = invoke(
        "document spec.md -o docs --tokens 2k URL --emphasis rules_and_values --model-name Quill "
        "--set domains=2 --set subdomains=2"
    )
    assert code == 0
    assert "→ docs/documents.jsonl" in output
    for folder in ("rows", "docs"):
        code, output = invoke(f"data-report {folder} --spec spec.md")
        assert code == 0
        assert output.split() == [f"{folder}/report.html", f"{folder}/report.json"]
        assert (
            "Quill" not in Path(folder, "settings.yaml").read_text()
            or "model_name: Quill" in Path(folder, "settings.yaml").read_text()
        )


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        ("deliberate spec.md -o out URL", "give a file of prompts, or --prompts-from-spec N"),
        ("deliberate nospec.md prompts.txt -o out URL", "nospec.md: the spec cannot be read"),
        ("deliberate spec.md nofile.txt -o out URL", "nofile.txt: the prompts cannot be read"),
        ("deliberate spec.md prompts.txt -o out --base-url http://127.0.0.1:9/v1", "generator.model is not set"),
        ("deliberate spec.md prompts.txt -o out URL --style citing", "style: input should be 'cite' or 'internal'"),
        ("deliberate spec.md prompts.txt -o out URL --threshold 11", "threshold 11 is outside the scale"),
        ("deliberate spec.md prompts.txt -o out URL --set smaples=2", "smaples: unknown key"),
        ("deliberate spec.md prompts.txt -o out URL --set max_cost=1", "max_cost needs price_in and price_out"),
        ("document spec.md -o out URL --tokens lots", "--tokens lots: write it as"),
        ("data-report nothing", "contains neither rows.jsonl nor documents.jsonl"),
    ],
)
def test_mistakes_are_reported(command: str, fault: str, invoke) -> None:
    with pytest.raises(ConfigError) as error:
        invoke(command)
    assert fault in str(error.value)


def test_example_settings_are_valid() -> None:
    examples = Path(__file__).parents[2] / "examples" / "datagen"
    settings = load(DeliberateSettings, examples / "settings.yaml", SETTINGS_FILE)
    assert settings.thresholds() == {"compliance": 8, "helpfulness": 7, "reasoning": 7}
    load(DeliberateSettings, examples / "local.yaml", SETTINGS_FILE)
    load(DocumentSettings, examples / "local_documents.yaml", SETTINGS_FILE)
    short = Spec.read(examples / "short_spec.md", model_name="Quill", provider_name="Fern")
    assert len(read_prompts(examples / "prompts.jsonl", short)) == 20


def test_help_texts_state_the_defaults_of_the_settings() -> None:
    app = typer.Typer()
    register(app)
    group: Any = typer.main.get_command(app)
    options = {p.name: p.help for name in ("deliberate", "document") for p in group.commands[name].params}
    rows, documents = DeliberateSettings.model_validate({}), DocumentSettings.model_validate({})
    assert documents.tokens == 1_000_000
    assert rows.best_of is None
    for name, default in {
        "samples": rows.samples,
        "judge_votes": rows.judge_votes,
        "threshold": f"{rows.threshold:g}",
        "concurrency": rows.generator.concurrency,
        "model_name": rows.model_name,
        "provider_name": rows.provider_name,
        "tokens": "1M",
        "best_of": "all",
    }.items():
        assert f"(default: {default})" in options[name]
    assert f"{rows.style} (default)" in options["style"]
    assert f"{documents.emphasis} (default)" in options["emphasis"]
    assert f"{rows.generator.backend} (an endpoint, default)" in options["backend"]


def test_lost_endpoint_is_reported(invoke, model: ScriptedModel, capfd: pytest.CaptureFixture[str]) -> None:
    model.fault = lambda key, attempt, purpose, request: status(404) if purpose == "judge" else None
    code, _ = invoke("deliberate spec.md prompts.txt -o out URL --model-name Quill")
    assert code == 3
    assert not Path("out/rows.jsonl").exists()
    assert '"unfinished": true' in Path("out/summary.json").read_text()
