"""Monitors with known rates, and the real labelled solutions."""

from __future__ import annotations

import numpy as np
import pytest
from eval_models import shared

from delib_fast.evals.intervals import wilson
from delib_fast.evals.metrics.monitors import (
    Transcript,
    WordMonitor,
    best_threshold,
    compare_views,
    g_mean2,
    step_holds,
    transcripts_from_solutions,
)


class Marker:
    """Flags exactly the texts that contain "!"."""

    def fit(self, transcripts, view):
        pass

    def scores(self, transcripts, view):
        return np.array([float("!" in t.text(view)) for t in transcripts])


def made(count=40):
    """Half should be flagged; 15 of those 20 have the mark in their CoT, as do 2 of the others. Responses are equal."""
    wrong = [Transcript(f"q{k}", "?", "!" if k < 15 else ".", "done", True) for k in range(count // 2)]
    right = [Transcript(f"r{k}", "?", "!" if k < 2 else ".", "done", False) for k in range(count // 2)]
    return wrong + right


def test_known_rates():
    found = compare_views(made(), Marker)
    response, both = found.views
    assert both.tpr == wilson(15, 20)
    assert both.tnr == wilson(18, 20)
    assert both.g_mean2.value == pytest.approx(0.75 * 0.9)
    assert response.g_mean2.value == 0  # equal responses: all flagged or none
    assert response.auc == 0.5
    assert found.cot_gain.value == pytest.approx(0.675)
    assert found.cot_gain.low > 0.4
    assert (found.transcripts, found.flagged) == (40, 20)


def test_the_word_monitor_learns_a_word_in_the_cot():
    transcripts = [
        Transcript(f"q{k}", "?", f"step {k} " + ("oops wrong" if k % 2 else "fine good"), "done", k % 2 == 1)
        for k in range(120)
    ]
    found = compare_views(transcripts, WordMonitor)
    assert found.views[1].g_mean2.value > 0.9
    assert found.views[0].g_mean2.value <= 0.4


def test_helpers():
    flags = np.array([True, True, False, False])
    assert best_threshold(flags, np.array([3.0, 2.0, 1.0, 0.0])) == 1.5
    assert g_mean2(flags, np.array([True, False, False, False])) == 0.5
    assert np.isnan(g_mean2(flags[:2], flags[:2]))
    assert best_threshold(flags, np.array([1.0, 1.0, 1.0, 1.0])) == 1.0
    assert best_threshold(flags, np.array([0.0, 1.0, 2.0, 3.0])) == 2.5


@pytest.mark.parametrize(
    ("step", "result", "holds"),
    [
        ("16-3", "13", True),
        ("2*(3+4)", "14", True),
        ("7/2", "3.5", True),
        ("16-3", "12", False),
        ("-4+6", "2", True),
        ("3/0", "1", False),
        ("2*(3", "6", False),
        ("", "1", False),
        (".5*4", "2", True),
        ("1/3", "0.33", True),
    ],
)
def test_step_holds(step, result, holds):
    assert step_holds(step, result) is holds


def test_transcripts_of_one_label_are_rejected():
    with pytest.raises(ValueError, match="all 2 transcripts have the same label"):
        compare_views(made()[:2], Marker)


@pytest.mark.data
def test_reading_the_cot_helps_on_real_solutions():
    transcripts = transcripts_from_solutions(shared("gsm8k_model_solutions.jsonl"))
    questions = list(dict.fromkeys(t.prompt for t in transcripts))
    transcripts = [t for t in transcripts if t.prompt in questions[:200]]
    assert len(transcripts) > 750
    found = compare_views(transcripts, WordMonitor)
    assert found.cot_gain.low > 0
    # the figures of the previous implementation (L-BFGS in float32 on torch); AUC to the three digits that are printed
    response, both = found.views
    assert (response.tpr, response.tnr) == (wilson(259, 502), wilson(151, 295))
    assert (both.tpr, both.tnr) == (wilson(326, 502), wilson(193, 295))
    assert (round(response.auc, 3), round(both.auc, 3)) == (0.583, 0.721)
