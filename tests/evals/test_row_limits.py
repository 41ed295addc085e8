"""The limit on evaluated rows holds for each source, and selects rows from all of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from eval_models import ROOT

from delib_fast.config import SourceConfig
from delib_fast.data import read_source
from delib_fast.evals.limits import spread, spread_by_source
from delib_fast.evals.teacher_forced import held_out_with_cot, segments_suite


@pytest.mark.parametrize(
    ("limit", "chosen"),
    [(None, [0, 1, 2, 3, 4, 5, 6]), (9, [0, 1, 2, 3, 4, 5, 6]), (7, [0, 1, 2, 3, 4, 5, 6]), (3, [0, 2, 4]), (1, [0])],
)
def test_items_are_spread_evenly(limit, chosen):
    assert spread(range(7), limit) == chosen


class Target:
    """A target with 40 documents before 6 chats, as a run whose first source is a corpus holds them out."""

    def __init__(self, scorer, rows, limit):
        document = read_source("spec", SourceConfig(path=str(ROOT / "examples/data/spec.md")))[0]
        documents = [replace(document, text=f"Document {k} of a corpus.", location=f"d:{k}") for k in range(40)]
        self.scorer, self.held_out, self.path = scorer, [*documents, *rows], "run"
        self.settings = type("Settings", (), {"limit": limit})

    @staticmethod
    def categories(rows):
        return {}


def test_many_documents_do_not_hide_the_chats(scorer, rows):
    target = Target(scorer, rows, 3)
    chosen = spread_by_source(target.held_out, 3)
    assert [row.location for row in chosen] == ["d:0", "d:13", "d:26", *(rows[k].location for k in (0, 2, 4))]
    result = segments_suite(target)
    tables = {table.title: [row[:2] for row in table.rows] for table in result.tables}
    assert tables["All rows"] == [("all", "cot"), ("all", "response"), ("all", "document")]
    assert tables["By source"] == [("held", "cot"), ("held", "response"), ("spec", "document")]
    assert "over 6 held-out rows" in result.note
    assert [row.location for row in held_out_with_cot(target)] == [rows[k].location for k in (0, 2, 4)]
