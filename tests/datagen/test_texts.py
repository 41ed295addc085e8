"""The functions on text: spec, parsing, format filter, duplicates, citations and spec guard."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from generation_runs import settings_for
from hypothesis import given
from hypothesis import strategies as st
from scripted_model import SPEC

from delib_fast.config import ConfigError
from delib_fast.data.decontamination import words_of
from delib_fast.data.read.cot_tags import TAGS
from delib_fast.datagen.citations import cited, labels_of_names, labels_of_spec, mentions_spec
from delib_fast.datagen.dedup import NearDuplicates
from delib_fast.datagen.filters import format_fault
from delib_fast.datagen.parsing import MalformedAnswer, json_values, parse_scores, parse_strings, split_answer
from delib_fast.datagen.request_log import Answer
from delib_fast.datagen.spec import Spec, first_sentence
from delib_fast.datagen.spec_leak import SpecGuard, SpecLeakError

EXAMPLES = Path(__file__).parents[2] / "examples" / "data"


# --- spec ---------------------------------------------------------------------------------------------------------


def test_spec_is_cut_at_headings_and_rules(spec: Spec) -> None:
    assert [s.id for s in spec.sections] == ["conduct-of-quill", "v1-honesty", "v2-care", "rule-1", "rule-2", "rule-3"]
    assert spec.sections[1].path == ("Conduct of Quill", "Values")
    assert spec.sections[4].title == "Do not help with harm to others"
    assert (
        spec.sections[4].line
        == SPEC.split("\n").index(
            "2. **Do not help with harm to others.** Decline help whose "
            "likely use is to injure or cheat somebody. (From V2.)"
        )
        + 1
    )
    assert "{model_name}" not in spec.text
    assert "Quill is made by Fern" in spec.text
    assert spec.section("V1. Honesty") is spec.sections[1]
    assert spec.section("rule-2") is spec.sections[4]
    assert spec.section("privacy") is None


def test_every_line_of_the_spec_is_in_one_section() -> None:
    spec = Spec.read(EXAMPLES / "spec.md", model_name="a", provider_name="b")
    assert len(spec.sections) == 18
    bare = [line for line in spec.text.split("\n") if line.strip() and not line.startswith("## ")]
    together = "\n".join(s.text for s in spec.sections).split("\n")
    assert [line for line in together if line.strip() and not line.startswith("## ")] == bare


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Just be kind.", ["spec"]),
        ("Title\n=====\n\nBe kind.\n\nMore\n----\n\nBe plain.", ["title", "more"]),
        ("# A {#kind level=root}\nBe kind.\n# A\nBe plain.\n# A\nBe brief.", ["kind", "a", "a-2"]),
        ("# A\n```\n# not a heading\n```\n# B\ntext", ["a", "b"]),
        ("# Rules\n1. Be kind.\n2. Be plain.\n3. Be brief.", ["rule-1", "rule-2", "rule-3"]),
        ("# How\nThis explains at length what happens and in what order it does.\n1. one\n2. two\n3. three", ["how"]),
        ("# Empty\n\n# Full\ntext", ["full"]),
    ],
)
def test_sections_have_ids(text: str, ids: list[str]) -> None:
    assert [s.id for s in Spec.of(text).sections] == ids


def test_only_relevant_sections_are_included_in_full(spec: Spec) -> None:
    given = spec.for_categories(["rule-2"], {s.id: f"summary of {s.id}" for s in spec.sections})
    for section in spec.sections:
        assert f"summary of {section.id}" in given
    assert "Decline help whose likely use is to injure" in given
    assert "Separate what is known" not in given, "only the relevant sections are included in full"
    assert first_sentence(spec.sections[1]).startswith("Quill says what it believes")


def test_empty_spec_is_refused() -> None:
    with pytest.raises(ConfigError, match="the spec is empty"):
        Spec.of("  \n")


# --- parsing ------------------------------------------------------------------------------------------------------

GOOD = '{"compliance": 9, "helpfulness": 7.5, "reasoning": "8", "why": "fine {really}"}'


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"```json\n{GOOD}\n```",
        f"Sure! Here it is:\n{GOOD}\nHope that helps.",
        f"<think>{{maybe 3?}}</think>\n{GOOD}",
        f'My notes: {{"note": 1}} and then {GOOD}',
        f"{GOOD}\n\nAgain: {GOOD}",
        f"a {{ brace {GOOD}",
        '<think>{"compliance": 1, "helpfulness": 1, "reasoning": 1}</think>' + GOOD,
    ],
)
def test_scores_are_found_among_prose(text: str) -> None:
    scores, why = parse_scores(text)
    assert scores == {"compliance": 9.0, "helpfulness": 7.5, "reasoning": 8.0}
    assert why == "fine {really}"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "9/10",
        "[9, 9, 9]",
        GOOD[:-1],
        GOOD.replace("9", "0"),
        GOOD.replace("9", "10.5"),
        GOOD.replace("9", "null"),
        GOOD.replace("9", "false"),
        GOOD.replace("9", "Infinity"),
        GOOD.replace("9", '"nine"'),
        GOOD.replace("9", "-9"),
        GOOD + GOOD.replace("9", "3"),
        '{"compliance": 9}',
        '{"scores": 9}',
    ],
)
def test_bad_scores_are_malformed(text: str) -> None:
    with pytest.raises(MalformedAnswer):
        parse_scores(text)


@given(st.text(alphabet='{}[]",:0123456789 complianceNaN\\n\n', max_size=80))
def test_any_text_gives_scores_or_is_malformed(text: str) -> None:
    try:
        scores, _ = parse_scores(text)
    except MalformedAnswer:
        return
    assert all(1 <= score <= 10 for score in scores.values())


def test_only_the_axes_that_were_asked_for_are_parsed() -> None:
    """A judge that does not see the CoT gives no score for the reasoning; if it does, the score is ignored."""
    axes = ("compliance", "helpfulness")
    text = '{"why": "short", "compliance": 9, "helpfulness": 8}'
    assert parse_scores(text, axes) == ({"compliance": 9.0, "helpfulness": 8.0}, "short")
    assert parse_scores(text.replace("}", ', "reasoning": 11}'), axes) == parse_scores(text, axes)
    with pytest.raises(MalformedAnswer, match="reasoning is missing"):
        parse_scores(text)


def test_json_is_found_among_prose() -> None:
    assert json_values('x {"a": {"b": 1}} y {"c": 2}', dict) == [{"a": {"b": 1}}, {"c": 2}]
    assert parse_strings('First [1] then\n```\n["a  b", "c", "a b", " "]\n```') == ["a b", "c"]
    with pytest.raises(MalformedAnswer):
        parse_strings('["only one"]', min_items=2)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("<deliberation>a b</deliberation>\n<reply>c</reply>", ("a b", "c", None)),
        ("<think>hm</think><deliberation>a</deliberation><reply>c</reply>", ("a", "c", None)),
        ("<deliberation>a</deliberation><reply>c", ("a", None, "truncated")),
        ("<deliberation>a", (None, None, "truncated")),
        ("<deliberation>a</deliberation><reply>c</reply><reply>d</reply>", (None, None, "leaked_scaffolding")),
        ("no tags", (None, None, None)),
    ],
)
def test_answers_are_split_at_our_tags(text: str, parts: tuple) -> None:
    found = split_answer(Answer(text, "stop"), "tags")
    assert (found.cot, found.response, found.fault) == parts


@pytest.mark.parametrize(
    ("text", "reasoning", "parts"),
    [
        ("the answer", "the thought", ("the thought", "the answer", None)),
        ("<think>\nthe thought\n</think>\n\nthe answer", None, ("the thought", "the answer", None)),
        ("the thought\n</think>\nthe answer", None, ("the thought", "the answer", None)),
        ("<think>\nthe thou", None, (None, None, "truncated")),
        ("the answer", None, (None, "the answer", None)),
    ],
)
def test_answers_are_split_at_the_models_own_reasoning(text: str, reasoning: str | None, parts: tuple) -> None:
    found = split_answer(Answer(text, "stop", reasoning), "reasoning")
    assert (found.cot, found.response, found.fault) == parts


# --- format filter and citations ------------------------------------------------------------------------------------

COT = "I want them to be able to judge for themselves, so I say what I only guess at here."


@pytest.mark.parametrize(
    ("cot", "response", "fault"),
    [
        (COT, "Here you are.", None),
        ("", "Here you are.", "no_cot"),
        (COT, "", "no_response"),
        ("Too short.", "Here.", "cot_too_short"),
        (COT, "Here. </deliberation2><|im_end|>", "leaked_scaffolding"),
        (COT, "Hello {model_name}", "leaked_scaffolding"),
        (COT + " <conversation 12ab34cd>", "Here.", "leaked_scaffolding"),
        (COT, "[/INST] Here.", "leaked_scaffolding"),
        *((f"{COT} {tag} Good.", "Here.", "leaked_scaffolding") for pair in TAGS for tag in pair),
        *((COT, f"Here {tag} it is.", "leaked_scaffolding") for pair in TAGS for tag in pair),
        (COT + " According to the spec, yes.", "Here.", "mentions_spec"),
        (COT + " Rule 2 decides.", "Here.", "mentions_spec"),
        (COT + " V1 decides.", "Here.", "mentions_spec"),
        (COT, "Our content policy forbids it.", "mentions_spec"),
        (COT + " I decline help whose likely use is to injure or cheat.", "Here.", "mentions_spec"),
        (COT + " The policy covers water damage.", "Here.", None),  # the user asked about an insurance policy
    ],
)
def test_format_filter_of_style_internal(cot: str, response: str, fault: str | None, spec: Spec, model) -> None:
    answer = Answer(f"<deliberation>{cot}</deliberation><reply>{response}</reply>", "stop")
    parted = split_answer(answer, "tags")
    asked = "Does my insurance policy cover this?" if "water" in cot else "Can you help?"
    assert format_fault(answer, parted, settings_for(model), labels_of_spec(spec), asked) == fault


@pytest.mark.parametrize(
    ("cot", "fault"),
    [
        (COT, "no_citation"),
        (COT + " V2 matters most.", None),
        (COT + " By rule-3 I answer first.", None),
        (COT + " It says to decline help whose likely use is to injure somebody.", None),
    ],
)
def test_format_filter_of_style_cite(cot: str, fault: str | None, spec: Spec, model) -> None:
    answer = Answer(f"<deliberation>{cot}</deliberation><reply>Here.</reply>", "stop")
    settings = settings_for(model, style="cite")
    assert format_fault(answer, split_answer(answer, "tags"), settings, labels_of_spec(spec), "") == fault


def test_example_rows_have_their_style() -> None:
    """The example rows of style `cite` name a section, and those of style `internal` mention none."""
    labels = labels_of_spec(Spec.read(EXAMPLES / "spec.md", model_name="the assistant", provider_name="b"))
    right = total = 0
    for line in (EXAMPLES / "deliberation.jsonl").read_text().splitlines():
        row = json.loads(line)
        found = cited(row["cot"], labels)
        if row["style"] == "internal":
            assert not found
            assert mentions_spec(row["cot"], labels, prompt=row["prompt"]) is None
        else:
            assert found
            right += row["category"] in found
            total += row["category"].startswith("rule-")
    assert right / total > 0.95


def test_categories_are_cited_by_name() -> None:
    labels = labels_of_names(["Self-Harm", "Violence / Physical Harm"])
    found = cited("The self-harm policy applies, and violence does not.", labels)
    assert found == ["Self-Harm", "Violence / Physical Harm"]
    assert cited("unharmed and nonviolent", labels) == []


# --- duplicates ---------------------------------------------------------------------------------------------------


def test_minhash_agrees_with_exact_comparison() -> None:
    """No pair at or above the threshold is missed, and none below is reported, compared with all pairs."""
    rng = random.Random(0)
    vocabulary = [f"w{i}" for i in range(300)]
    texts: list[str] = []
    for _ in range(60):
        base = rng.choices(vocabulary, k=80)
        texts.append(" ".join(base))
        for changes in (1, 2, 4, 8, 16):
            copy = list(base)
            for at in rng.sample(range(80), changes):
                copy[at] = rng.choice(vocabulary)
            texts.append(" ".join(copy))

    def shingles(text: str) -> set[tuple[str, ...]]:
        words = words_of(text)
        return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}

    seen = NearDuplicates(0.8)
    kept: list[str] = []
    for text in texts:
        mine = shingles(text)
        exact = [k for k in kept if len(mine & shingles(k)) / len(mine | shingles(k)) >= 0.8]
        found = seen.find_or_add(text, text)
        assert (found is not None) == bool(exact)
        if found is None:
            kept.append(text)
        else:
            assert found[0] in exact
    assert 60 <= len(kept) < len(texts)


def test_case_and_punctuation_do_not_matter() -> None:
    seen = NearDuplicates(0.9)
    assert seen.find_or_add("first", "Don't panic: it's fine!") is None
    assert seen.find_or_add("second", "dont PANIC, its fine") == ("first", 1.0)
    assert seen.find_or_add("third", "something else") is None
    assert seen.find_or_add("fourth", "") is None
    assert seen.find_or_add("fifth", " .") == ("fourth", 1.0)


# --- guard --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "leaks"),
    [
        ("Can you help me with my garden?", False),
        ("Quill says what it believes and marks how sure it is, no?", True),
        ("quill SAYS what it *believes*,\n and marks how... sure", True),
        ("Put the answer before any concern", False),
        ("What does 'Decline help whose likely use is to injure or cheat somebody' mean?", True),
        ("Say how sure you are.", True),  # a whole sentence of five words
        ("Answer first, please", False),  # two words that are also the title of a rule
    ],
)
def test_spec_guard_finds_text_of_the_spec(prompt: str, leaks: bool, spec: Spec) -> None:
    assert (SpecGuard(spec).find_leak(prompt) is not None) == leaks


def test_spec_guard_reads_the_file_back(spec: Spec, tmp_path: Path) -> None:
    guard, path = SpecGuard(spec), tmp_path / "rows.jsonl"
    leaky = "x Quill says what it believes and marks how sure it is"
    rows = [{"prompt": "fine", "prompt_id": "a"}, {"prompt": leaky, "prompt_id": "b"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SpecLeakError, match=r"rows\.jsonl:2: the prompt contains text of the spec: 'quill says what"):
        guard.check_file(path, {"a": "fine", "b": leaky})
    with pytest.raises(SpecLeakError, match=r":1: the prompt differs from the input prompt 'a'; this is a bug"):
        guard.check_file(path, {"a": "fine before", "b": leaky})
    chat = [{"role": "system", "content": leaky}, {"role": "user", "content": "hi"}]
    path.write_text(json.dumps({"messages": [*chat, {"role": "assistant", "content": "x"}], "prompt_id": "a"}) + "\n")
    with pytest.raises(SpecLeakError, match="contains text of the spec"):
        guard.check_file(path, {"a": json.dumps(chat, sort_keys=True)})
