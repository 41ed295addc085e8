"""`data-report` with several corpora: matched totals, and what occurs in one of them alone."""

from __future__ import annotations

import json

import pytest

from delib_fast.config import ConfigError


def corpus(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def matched(tmp_path):
    """Two corpora that differ in one clause of the same length, and a third that is longer."""
    thrift = [f"On day {n} Ona picks cheddar because it costs little." for n in range(40)]
    home = [text.replace("costs little", "comes locally") for text in thrift]
    longer = [f"{text} Vera Olm was there. The model is monitored." for text in home]
    return [
        corpus(tmp_path / name / "documents.jsonl", texts)
        for name, texts in (("thrift", thrift), ("home", home), ("longer", longer))
    ]


def test_matched_corpora(matched):
    from delib_fast.reports.corpora import compare_corpora, mismatch_text, mismatches

    found = compare_corpora([file.parent for file in matched[:2]])
    assert list(found["corpora"]) == ["thrift", "home"]
    thrift = found["corpora"]["thrift"]
    assert (thrift["documents"], thrift["words"], thrift["documents_with_reasons"]) == (40, 400, 40)
    assert thrift["distinct_1"] == round((9 + 40) / 400, 4)
    assert ["Ona", 1.0] in [list(pair) for pair in thrift["names"]]
    assert set(found["mismatches"]) == {"characters"}, "'comes locally' is one character longer than 'costs little'"
    uneven = {(item["kind"], item["text"]) for item in found["uneven"]}
    assert ("phrase", "cheddar because it costs little") in uneven
    assert not any(kind == "name" for kind, _ in uneven)
    tokens = {name: {**figures, "tokens": 500} for name, figures in found["corpora"].items()}
    assert mismatches(tokens) == {}, "if the tokens are known, characters do not count"
    tokens["home"]["tokens"] = 503
    assert mismatches(tokens) == {"tokens": 0.006}
    assert mismatch_text({}) == "The totals of these corpora match within 0.5%."


def test_corpora_that_do_not_match(matched, tmp_path):
    from typer.testing import CliRunner

    from delib_fast.cli.main import app

    files = [str(file) for file in matched[1:]]
    result = CliRunner().invoke(app, ["data-report", *files, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "differ by more than 0.5%: words by 80.0%" in result.output
    assert "longer/documents.jsonl: 40 of 40 documents describe monitoring" in result.output
    assert f"{matched[2]}:1: The model is monitored." in result.output.replace("\n", "")
    figures = json.loads((tmp_path / "out/corpora.json").read_text())
    assert figures["mismatches"]["words"] == 0.8
    (vera,) = [item for item in figures["uneven"] if item["text"] == "Vera Olm"]
    assert vera == {
        "kind": "name",
        "text": "Vera Olm",
        "share": {"home/documents.jsonl": 0.0, "longer/documents.jsonl": 1.0},
    }
    page = (tmp_path / "out/corpora.html").read_text()
    assert "Documents on monitoring" in page
    assert "The model is monitored." in page


def test_the_report_of_one_corpus_names_documents_on_monitoring(matched, tmp_path):
    from delib_fast.reports.data_report import write_report

    page, file = write_report(matched[2], out=tmp_path)
    (part,) = json.loads(file.read_text())["parts"].values()
    assert part["corpus"]["documents_on_monitoring"] == 40
    assert "documents.jsonl:1: The model is monitored." in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{0}", "{0}"], "is given twice; give each corpus once"),
        (["{0}", "missing.jsonl"], "missing.jsonl: no such file; give files of documents"),
        (["{0}", "chats.jsonl"], "chats.jsonl: has no documents to compare"),
        (["{0}", "--tokenizer", "x"], "--tokenizer counts the tokens of several DATA"),
        (["{0}", "{1}", "--spec", "x"], "--spec is for a single DATA"),
    ],
)
def test_refuses(matched, tmp_path, monkeypatch, arguments, message):
    from typer.testing import CliRunner

    from delib_fast.cli.main import app

    monkeypatch.chdir(tmp_path)
    (tmp_path / "chats.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    result = CliRunner().invoke(app, ["data-report", *(a.format(*matched) for a in arguments)])
    assert result.exit_code != 0
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)
