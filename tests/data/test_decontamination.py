"""Decontamination: evaluation rows that occur in the training data, and the spec in a prompt."""

import random
from dataclasses import replace

import numpy as np
import pytest

from delib_fast.config import SourceConfig
from delib_fast.data import DataError, Message, Row, read_source
from delib_fast.data.decontamination import (
    NGRAM_WORDS,
    find_ngram,
    find_overlap,
    ngram_hashes,
    refuse_overlap,
    refuse_spec_in_prompts,
)
from delib_fast.data.rows import content_digest


def words(seed, n):
    draw = random.Random(seed)
    return " ".join(f"w{draw.randrange(5000)}" for _ in range(n))


def row(prompt, response="fine", location="eval:1", system=None):
    messages = ([Message("system", system)] if system else []) + [Message("user", prompt)]
    return Row(
        kind="chat",
        location=location,
        source="s",
        digest=content_digest([prompt, response]),
        messages=tuple(messages),
        response=response,
    )


def test_ngram_hashes():
    assert len(ngram_hashes(words(0, 100))) == 100 - NGRAM_WORDS + 1
    assert len(ngram_hashes(words(0, 100), 8)) == 93
    assert len(ngram_hashes("three short words")) == 1
    assert len(ngram_hashes(" . ")) == 0
    assert (ngram_hashes("One, TWO: don't!") == ngram_hashes("one two dont")).all()
    assert (ngram_hashes("one two three") != ngram_hashes("three two one")).all()


def test_find_ngram_returns_the_first_known_ngram():
    known = np.unique(ngram_hashes("The quick brown fox jumps over", 3))
    assert find_ngram("a *quick* brown Fox, jumps", known, 3) == "quick brown fox"
    assert find_ngram("a quick red fox", known, 3) is None
    assert find_ngram("quick brown", known, 3) is None
    assert find_ngram("quick brown fox", known[:0], 3) is None


def test_equal_and_nearly_equal_rows_are_found_and_a_quotation_is_not():
    train = [row(words(i, 200), location=f"train:{i}") for i in range(20)]
    clean = [row(words(100 + i, 200)) for i in range(20)]
    assert find_overlap(train, clean) == []
    assert find_overlap([], clean) == find_overlap(train, []) == []
    duplicate = replace(train[3], location="eval:7")
    reworded = row("And " + words(5, 200).upper() + ". Thanks", location="eval:8")
    quoting = row(words(300, 180) + " " + words(6, 20), location="eval:9")
    found = find_overlap(train, [*clean, duplicate, reworded, quoting])
    assert [(o.location, o.duplicate_of) for o in found] == [("eval:7", "train:3"), ("eval:8", None)]
    assert 0.9 < found[1].share < 1
    with pytest.raises(
        DataError,
        match=r"eval:7: this evaluation row is also a training row \(train:3\)\. In all, 2 of 23 evaluation rows occur",
    ):
        refuse_overlap(train, [*clean, duplicate, reworded, quoting])
    with pytest.raises(
        DataError,
        match=r"eval:8: this evaluation row is contained in the training data \(9\d% of its 13-grams occur there\)",
    ):
        refuse_overlap(train, [reworded])
    refuse_overlap(train, clean)


def test_the_spec_in_a_prompt_is_refused():
    spec = [words(0, 2000), words(1, 1000)]
    refuse_spec_in_prompts([row(words(50, 300)), row("hi")], spec)
    refuse_spec_in_prompts([row(words(50, 300))], [])
    refuse_spec_in_prompts([row(words(50, 400) + " " + " ".join(words(0, 2000).split()[40:60]))], spec)  # a quotation
    for offending in (
        row(words(50, 20) + "\n" + spec[1]),
        row("hi", system="Follow this:\n" + spec[0]),
        row(words(50, 9000) + spec[0]),
        replace(row("hi"), tools=f'[{{"description": "{spec[1]}"}}]'),
    ):
        with pytest.raises(DataError, match=r"eval:1: the prompt contains text of the spec \(\d+ of its 13-grams\)"):
            refuse_spec_in_prompts([row("hi"), offending], spec)


@pytest.mark.data
def test_star1_prompts_do_not_contain_the_model_spec(shared_data):
    rows = read_source("star1", SourceConfig(path=str(shared_data / "star1.json")))
    spec = read_source("spec", SourceConfig(path=str(shared_data / "model_spec.md"), cut="headings"))
    refuse_spec_in_prompts(rows, [section.text for section in spec])
    refuse_overlap(rows[:800], rows[800:])
    with_spec = replace(rows[0], messages=(Message("system", spec[10].text), *rows[0].messages))
    with pytest.raises(DataError, match=r"star1.json:2: the prompt contains text of the spec"):
        refuse_spec_in_prompts([with_spec], [section.text for section in spec])
