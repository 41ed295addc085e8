"""`document`, from a spec to midtraining documents, and `data-report` on the data of both commands."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from generation_runs import read_rows, run_deliberate, settings_for
from scripted_model import SPEC, ScriptedModel, scripted

from delib_fast.config import ConfigError, SourceConfig
from delib_fast.data import read_source
from delib_fast.datagen.documents import generate_documents
from delib_fast.datagen.session import Session
from delib_fast.datagen.settings import DocumentSettings
from delib_fast.datagen.spec import Spec
from delib_fast.reports.data_report import write_report

STAR1 = Path(__file__).parents[3] / "shared" / "data" / "star1.json"
EXAMPLES = Path(__file__).parents[2] / "examples" / "data"


def run(model: ScriptedModel, out: Path, spec: Spec, **changes: Any) -> dict[str, Any]:
    shared = settings_for(model).model_dump()
    settings = DocumentSettings.model_validate(
        {
            **{key: shared[key] for key in ("generator", "model_name", "provider_name")},
            "tokens": 6000,
            "domains": 3,
            "subdomains": 2,
            "assertions": 3,
            "document_types": 2,
            "ideas": 2,
            **changes,
        }
    )

    async def main() -> dict[str, Any]:
        async with Session.open(out, spec, settings) as session:
            return await generate_documents(session, settings)

    return asyncio.run(main())


def test_documents_are_generated_up_to_the_token_budget(model: ScriptedModel, spec: Spec, tmp_path: Path) -> None:
    summary = run(model, tmp_path / "out", spec)
    documents = read_rows(tmp_path / "out" / "documents.jsonl")
    assert summary["documents"] == len(documents)
    assert 6000 <= summary["tokens"] == sum(d["tokens"] for d in documents) < 6000 + 2 * 400
    assert {
        "text",
        "source",
        "domain",
        "subdomain",
        "idea",
        "emphasis",
        "spec_sha256",
        "generator",
        "request_ids",
    } <= documents[0].keys()
    for stage in ("domains", "subdomains", "assertions", "document_types", "ideas"):
        assert read_rows(tmp_path / "out" / f"{stage}.jsonl"), stage
    assert len({d["domain"] for d in documents}) == 3, "a small budget covers all domains"
    rows = read_source("d", SourceConfig.model_validate({"path": str(tmp_path / "out" / "documents.jsonl")}))
    assert {row.kind for row in rows} == {"document"}
    order = [d["domain"] for d in documents]
    assert order != sorted(order, key=order.index), "shuffled"

    before = (tmp_path / "out" / "documents.jsonl").read_bytes()
    model.received.clear()
    run(model, tmp_path / "out", spec)
    assert model.received == []
    assert (tmp_path / "out" / "documents.jsonl").read_bytes() == before


def test_a_larger_budget_reuses_the_answers_of_a_smaller_one(model: ScriptedModel, spec: Spec, tmp_path: Path) -> None:
    """A larger budget reuses the answers of a smaller one, and continues with more rounds of ideas."""
    run(model, tmp_path / "out", spec, tokens=2000)
    model.received.clear()
    summary = run(model, tmp_path / "out", spec, tokens=20000)
    assert summary["tokens"] >= 20000
    assert model.paid_twice() == []
    ideas = read_rows(tmp_path / "out" / "ideas.jsonl")
    assert len({(i["subdomain"], i["idea"]) for i in ideas}) == len(ideas)
    assert len(ideas) > 3 * 2 * 2 * 2, "a second round"


@pytest.mark.parametrize(
    ("emphasis", "words"),
    [
        ("rules", "Do not explain why"),
        ("values", "Dwell on why"),
        ("rules_and_values", "the rule follows from the value"),
    ],
)
def test_emphasis_is_in_the_prompts(
    emphasis: str, words: str, model: ScriptedModel, spec: Spec, tmp_path: Path
) -> None:
    run(model, tmp_path / "out", spec, emphasis=emphasis, tokens=500)
    texts = [r["text"] for r in read_rows(tmp_path / "out" / "requests.jsonl") if r["is"] == "text"]
    asked = [t for t in texts if "Write this text in full" in t]
    assert asked
    assert all(words in t for t in asked)
    assert {d["emphasis"] for d in read_rows(tmp_path / "out" / "documents.jsonl")} == {emphasis}


def test_documents_with_faults_are_rewritten(model: ScriptedModel, spec: Spec, tmp_path: Path) -> None:
    def answer(purpose: str, text: str) -> str | None:
        if purpose == "critique":
            return '{"faults": []}' if int(re.search(r"<text ([0-9a-f]{8})", text)[1], 16) % 2 else None
        return None

    model.answer = answer
    run(model, tmp_path / "out", spec, critique=True, tokens=4000)
    documents = read_rows(tmp_path / "out" / "documents.jsonl")
    rewritten = [d for d in documents if d["rewritten"]]
    assert rewritten
    assert len(rewritten) < len(documents)
    assert all(bool(d["critique"]) == d["rewritten"] for d in documents)
    assert model.purposes()["rewrite"] >= len(rewritten)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Quill is kind.", "too_short"),
        ("A letter about nobody in particular. " * 20, "not_named"),
        ("Quill <|im_start|> " + "word " * 80, "leaked_scaffolding"),
    ],
)
def test_documents_that_are_dropped(text: str, reason: str, model: ScriptedModel, spec: Spec, tmp_path: Path) -> None:
    turn = iter(range(10**6))

    def answer(purpose: str, asked: str) -> str | None:
        return text if purpose == "document" and next(turn) % 4 == 0 else None

    model.answer = answer
    summary = run(model, tmp_path / "out", spec, tokens=3000)
    assert summary["dropped"][reason] >= 1
    assert not any(d["text"] == text for d in read_rows(tmp_path / "out" / "documents.jsonl"))
    assert summary["tokens"] >= 3000, "dropped documents do not count towards the budget"


def test_run_ends_when_the_ideas_are_used_up(model: ScriptedModel, spec: Spec, tmp_path: Path) -> None:
    model.answer = lambda purpose, text: '["one idea only"]' if purpose == "ideas" else None
    summary = run(model, tmp_path / "out", spec, tokens=10**6, rounds=2)
    assert 0 < summary["documents"] <= 3 * 2 * 2
    assert summary["tokens"] < 10**6


# --- data-report ------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """The text of a page, and the addresses that it would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words, self.fetched, self.open = "", [], []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [v for k, v in attrs if k in ("src", "href")]
        assert tag != "script"

    def handle_data(self, data: str) -> None:
        self.words += data


def test_the_report_of_a_run_has_its_statistics(
    model: ScriptedModel, spec: Spec, prompts_file: Path, tmp_path: Path
) -> None:
    out, spec_file = tmp_path / "out", tmp_path / "spec.md"
    spec_file.write_text(SPEC)
    low = '{"compliance": 3, "helpfulness": 9, "reasoning": 9}'
    model.answer = lambda purpose, text: (
        low
        if purpose == "judge" and "sourdough" in text
        else scripted(purpose, text).replace("Here is", "<b>Here</b> is")
    )
    asyncio.run(run_deliberate(out, spec, settings_for(model, style="cite", samples=1), prompts_file))
    html, figures = write_report(out, spec=spec_file)
    found = json.loads(figures.read_text())
    part = found["parts"]["rows.jsonl: rows"]
    assert part["count"] == 5
    assert part["citations"]["accuracy"] == 1.0
    assert part["by_category"] == {"rule-1": 5, "v1-honesty": 5}
    assert sum(b["count"] for b in part["scores"]["compliance"]["histogram"]) == 5
    assert found["run"]["dropped"] == {"low_compliance": 1}
    assert found["run"]["answers"]["by_purpose"]["judge"] == 11
    assert sum(b["count"] for b in found["run"]["dropped_scores"]["compliance"]) == 1
    page = Page(html.read_text())
    assert page.fetched == []
    for words in ("low_compliance", "rule-1", "share 8 successive words", "<b>Here</b> is what I know"):
        assert words.replace("share", "shares") in page.words or words in page.words


def test_the_report_of_documents_has_their_statistics(model: ScriptedModel, spec: Spec, tmp_path: Path) -> None:
    run(model, tmp_path / "out", spec, tokens=1500)
    html, figures = write_report(tmp_path / "out")
    part = json.loads(figures.read_text())["parts"]["documents.jsonl: documents"]
    assert part["tokens"] >= 1500
    assert part["near_duplicates"]["documents"]["count"] == 0
    assert "Documents, by domain" in Page(html.read_text()).words


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("summary.json", "", "summary.json is damaged"),
        ("summary.json", "[1,2", "summary.json is damaged"),
        ("summary.json", '{"paid": 3, "digest": "0"}', "summary.json is damaged .it does not match its digest"),
        ("dropped.jsonl", '{"votes": "x"}\n', "dropped.jsonl is damaged"),
        ("dropped.jsonl", '{"votes": [{"compliance": "x"}]}\n', "dropped.jsonl is damaged"),
        ("requests.jsonl", None, "requests.jsonl is damaged"),
        ("requests.jsonl", '{"is": "answer", "id": "a", "answer": {"text": "a", "finish": "b"}}\n', "is damaged"),
    ],
)
def test_a_report_names_the_damaged_file(name: str, content: str | None, message: str, tmp_path: Path) -> None:
    """`None` is a named pipe, which is not waited for."""
    (tmp_path / "documents.jsonl").write_text('{"text": "one document"}\n')
    if content is None:
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        write_report(tmp_path)


def test_a_report_follows_no_link_and_reads_line_separators(tmp_path: Path) -> None:
    votes = [{"compliance": 5, "helpfulness": 5, "reasoning": 5, "why": "a\u2028b"}]
    (tmp_path / "documents.jsonl").write_text('{"text": "one document"}\n')
    (tmp_path / "dropped.jsonl").write_text(json.dumps({"votes": votes}, ensure_ascii=False) + "\n")
    (tmp_path / "mine").write_text("a file of the user")
    (tmp_path / "report.html").symlink_to("mine")
    (tmp_path / "report.json").symlink_to("mine")
    write_report(tmp_path)
    assert (tmp_path / "mine").read_text() == "a file of the user"
    assert json.loads((tmp_path / "report.json").read_text())["run"]["dropped_scores"]


def test_the_report_of_the_example_rows_has_accurate_citations(tmp_path: Path) -> None:
    _, figures = write_report(EXAMPLES / "deliberation.jsonl", spec=EXAMPLES / "spec.md", out=tmp_path)
    part = next(iter(json.loads(figures.read_text())["parts"].values()))
    assert part["by_style"]["cite"] == part["citations"]["rows"]
    assert part["citations"]["accuracy"] > 0.85


@pytest.mark.data
@pytest.mark.skipif(not STAR1.exists(), reason=f"{STAR1} is not present")
def test_the_report_of_star1_is_in_the_known_range(tmp_path: Path) -> None:
    """Every statistic is present for the rows of another project, and in the range known for this dataset."""
    html, figures = write_report(STAR1, out=tmp_path)
    part = json.loads(figures.read_text())["parts"]["star1.json: rows"]
    assert part["count"] == part["with_cot"] == 1000
    assert part["citations"]["speaks_of_policy"] > 0.97
    assert part["citations"]["accuracy"] > 0.9
    assert 0.55 < part["refusals"]["share"] < 0.65  # full refusals, as classify_reply finds them
    assert part["by_category"]["Self-Harm"] == 85
    if chromium := shutil.which("chromium"):
        shot = tmp_path / "page.png"
        subprocess.run(
            [
                chromium,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                f"--screenshot={shot}",
                f"--user-data-dir={tmp_path / 'profile'}",
                html.as_uri(),
            ],
            check=True,
            capture_output=True,
            timeout=900,
        )
        assert shot.stat().st_size > 20_000
