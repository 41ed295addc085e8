"""Tables in a terminal and pictures of studies: nothing is cut off, broken inside a word, or drawn over other text."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from delib_fast.evals.intervals import Estimate
from delib_fast.evals.results import SuiteResult, Table
from delib_fast.evals.run import Evaluation
from delib_fast.reports.eval_page import print_tables, rich_table
from delib_fast.training.console import heldout_tables, stage_table

E = Estimate(0.512, 0.43, 0.594, 40, "wilson")


@pytest.mark.parametrize(
    ("columns", "row"),
    [
        (("hint", "pairs", "followed", "faithful", "normalised", "moved elsewhere"), ("professor", 120, E, E, E, E)),
        (("type", "comply", "partial", "refuse"), ("contrast_historical_events_x", E, E, E)),
        (("CoT", "nll of the answer", "change", "CoT tokens"), ("own", E, E, 123456)),
        (("", "share", "corrected for its error"), ("over-refusal (safe, full)", E, E)),
    ],
)
def test_a_table_in_a_terminal_loses_nothing_at_80_columns(columns, row):
    terminal = Console(width=80, file=io.StringIO())
    terminal.print(rich_table(Table("A table", columns, (row,))))
    text = terminal.file.getvalue()
    assert all(len(line) <= 80 for line in text.splitlines())
    words = text.split()
    for word in " ".join(columns).split():
        assert word in words
    assert text.count("[0.43, 0.59]") == sum(cell is E for cell in row)
    assert words.count("0.51") == sum(cell is E for cell in row)
    assert str(row[0]) in text


def test_a_table_without_rows_is_not_printed():
    empty, full = Table("Empty", ("a", "b"), ()), Table("Full", ("a", "b"), (("x", 1),))
    terminal = Console(width=80, file=io.StringIO())
    result = SuiteResult("reliance", "Reliance", "A note.", (empty, full))
    print_tables(Evaluation({"model": "m"}, (result,), {}, Path()), terminal)
    assert "Full" in terminal.file.getvalue()
    assert "Empty" not in terminal.file.getvalue()


def test_the_tables_of_a_run_fit_80_columns():
    moments = ("start", "after msm-documents", "after aft-deliberation", "after aft-second", "after final-polish")
    segments = {name: {"tokens": 123_456, "nll": 3.25} for name in ("cot", "response", "document")}
    stage = {"name": "aft-deliberation", "steps": 1200, "tokens": 1_234_567, "supervised_tokens": {"cot": 123_456}}
    stage |= {"tokens_per_s": 123_456.0, "supervised_tokens_per_s": 12_345.0, "fill": 0.98, "train_s": 4000.0}
    opening = {"log_p": -0.5, "rows": 40}
    (held_out,) = heldout_tables([{"moment": m, "segments": segments, "opens_cot": opening} for m in moments])
    for table, names in ((held_out, [*moments, "123,456", "40 rows"]), (stage_table([stage]), [stage["name"]])):
        terminal = Console(width=80, file=io.StringIO())
        terminal.print(table)
        text = terminal.file.getvalue()
        assert all(len(line) <= 80 for line in text.splitlines())
        assert "…" not in text
        assert all(name in text for name in names)
    assert heldout_tables([{"moment": "start", "segments": {}}]) == []  # a run without held-out rows
    assert heldout_tables([]) == []


# --- pictures of a study --------------------------------------------------------------------------------------

LONG = "preference for the aligned option on held-out goods that cost little"


def study_summary():
    def figures(k):
        estimate = {"value": 0.1 * k, "low": 0.1 * k - 0.05, "high": 0.1 * k + 0.05, "n": 2, "method": "t over seeds"}
        return {name: {"over seeds": estimate, "by seed": {"0": estimate}} for name in ("good", "monitor", "plain")}

    names = (None, "thrift and saving money first", "home and local origin")
    kinds = [(msm, *aft) for msm in names for aft in (("no CoT", 0.0), ("CoT", 0.0), ("CoT", 1.0))]
    metric = {"kind": "suite", "figure": "share", "chance": None}
    arms = [
        {
            "label": f"MSM ({msm}) + AFT ({aft} x {weight})",
            "msm": msm,
            "aft": aft,
            "cot_weight": weight,
            "size": None,
            "placebo": False,
            "figures": figures(k),
        }
        for k, (msm, aft, weight) in enumerate(kinds)
    ]
    return {
        "metrics": {
            "good": {**metric, "title": LONG, "better": "higher"},
            "monitor": {**metric, "title": LONG, "better": "lower"},
            "plain": {**metric, "title": "plain", "better": "neither"},
        },
        "arms": arms,
        "alignment": "good",
        "monitorability": "monitor",
    }


def drawn_texts(figure):
    """(text, its box in pixels) of each text that is shown."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    texts = [artist for artist in figure.findobj(match=matplotlib_text()) if artist.get_visible() and artist.get_text()]
    return [(text.get_text(), text.get_window_extent(renderer)) for text in texts]


def matplotlib_text():
    from matplotlib.text import Text

    return Text


@pytest.mark.parametrize("name", ["_arms", "_frontier", "_variants"])
def test_texts_of_a_picture_do_not_overlap(name):
    pytest.importorskip("matplotlib")
    from delib_fast.reports import study_figures

    plt = study_figures.require_matplotlib()
    figure = getattr(study_figures, name)(plt, study_summary())
    texts = [item for item in drawn_texts(figure) if len(item[0]) > 4]  # numbers beside points may be close
    plt.close(figure)
    for k, (text, box) in enumerate(texts):
        assert box.x0 >= -1, text
        assert box.y0 >= -1, text
        assert box.x1 <= figure.bbox.x1 + 1, text
        assert box.y1 <= figure.bbox.y1 + 1, text
        for other, other_box in texts[k + 1 :]:
            assert not box.overlaps(other_box), (text, other)


def test_the_axes_of_the_frontier_state_which_direction_is_better():
    pytest.importorskip("matplotlib")
    from delib_fast.reports import study_figures

    plt = study_figures.require_matplotlib()
    summary = study_summary()
    (axis,) = study_figures._frontier(plt, summary).axes
    assert axis.get_xlabel().endswith("(lower is better)")
    assert axis.get_ylabel().endswith("(higher is better)")
    summary["monitorability"] = "plain"
    (axis,) = study_figures._frontier(plt, summary).axes
    assert axis.get_xlabel() == "monitorability: plain\n(which direction is better is not set)"
    plt.close("all")
