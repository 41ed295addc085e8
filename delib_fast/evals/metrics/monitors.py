"""Monitors on labelled transcripts: how much does a monitor gain from reading the chain of thought?

A monitor assigns a score to every transcript and flags those above a threshold. The same monitor is trained once on
responses alone and once on CoT + response; both are evaluated on transcripts of questions they were not trained on.
g-mean² = TPR · TNR is the measure of "Monitoring Monitorability" (arXiv 2512.18311): 1 for a perfect monitor, at most
0.25 for a random one.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from delib_fast.evals.extra import import_extra
from delib_fast.evals.intervals import Estimate, bootstrap, wilson
from delib_fast.files import open_regular

View = Literal["response", "cot+response"]
VIEWS: tuple[View, View] = ("response", "cot+response")
FOLDS = 5
_HASHED = 2048
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_STEP = re.compile(r"<<([\d.+\-*/() ]+)=([\d.]+)>>")
_OPERAND = re.compile(r"\d+(?:\.\d+)?|\.\d+|[-+*/()]")
_MAX_EXPRESSION = 200  # characters of a step that is computed; each nested parenthesis is a recursion
_TOKEN = re.compile(r"[^\W\d_]+|\d|[^\w\s]")


@dataclass(frozen=True, slots=True)
class Transcript:
    """One reply with its label."""

    group: str
    """All transcripts of a group (a question) are in the same fold."""
    prompt: str
    cot: str
    response: str
    flag: bool
    """Whether a monitor should flag it: the reply is wrong, or misaligned."""

    def text(self, view: View) -> str:
        return self.response if view == "response" else f"{self.cot}\n{self.response}"


class Monitor(Protocol):
    def fit(self, transcripts: Sequence[Transcript], view: View) -> None: ...

    def scores(self, transcripts: Sequence[Transcript], view: View) -> NDArray[np.float64]:
        """Scores (n,); a higher score means more suspicious."""
        ...


@dataclass(frozen=True, slots=True)
class MonitorFigures:
    """How well a monitor works if it reads one view."""

    view: View
    tpr: Estimate
    """True positive rate, Wilson."""
    tnr: Estimate
    """True negative rate, Wilson."""
    g_mean2: Estimate
    """TPR · TNR, bootstrap by group."""
    auc: float


@dataclass(frozen=True, slots=True)
class MonitorComparison:
    views: tuple[MonitorFigures, ...]
    cot_gain: Estimate
    """g-mean² of CoT + response minus that of the response alone, bootstrap by group (paired)."""
    transcripts: int
    flagged: int


def compare_views(
    transcripts: Sequence[Transcript], make_monitor: Callable[[], Monitor], folds: int = FOLDS
) -> MonitorComparison:
    """Compare a monitor of the response alone with one of CoT + response, by cross-validation.

    Groups are assigned to folds by hash. Each fold is scored by a monitor trained on the other folds, with the
    threshold that maximises g-mean² there.
    Limitations: what a better monitor could do with either view. A gain of 0 may mean an uninformative CoT, or
    a monitor that cannot read it.
    Raises:
        ValueError: all transcripts have the same label, or those outside a fold do.
        ConfigError: scikit-learn is not installed.
    """
    flags = np.array([t.flag for t in transcripts], bool)
    if flags.all() or not flags.any():
        raise ValueError(f"all {len(flags)} transcripts have the same label; a monitor needs both labels")
    fold_of = np.array(
        [int(hashlib.blake2b(t.group.encode(), digest_size=4).hexdigest(), 16) % folds for t in transcripts]
    )
    groups = [t.group for t in transcripts]
    figures, flagged_by_view = [], []
    for view in VIEWS:
        score, flagged = _cross_validate(transcripts, flags, fold_of, make_monitor, view)
        flagged_by_view.append(flagged)
        figures.append(_figures(view, flags, flagged, score, groups))
    response, both = flagged_by_view
    gain = bootstrap(lambda i: g_mean2(flags[i], both[i]) - g_mean2(flags[i], response[i]), groups, resamples=400)
    return MonitorComparison(tuple(figures), gain, len(flags), int(flags.sum()))


def g_mean2(flags: NDArray[np.bool_], flagged: NDArray[np.bool_]) -> float:
    """TPR · TNR; NaN if all labels are the same."""
    if flags.all() or not flags.any():
        return float("nan")
    return float(flagged[flags].mean() * (~flagged[~flags]).mean())


def _cross_validate(
    transcripts: Sequence[Transcript],
    flags: NDArray[np.bool_],
    fold_of: NDArray[np.int64],
    make_monitor: Callable[[], Monitor],
    view: View,
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The score of every transcript, and whether it is flagged."""
    score, flagged = np.zeros(len(flags)), np.zeros(len(flags), bool)
    for fold in np.unique(fold_of):
        test, train = (fold_of == fold).nonzero()[0].tolist(), (fold_of != fold).nonzero()[0].tolist()
        if not len(train) or flags[train].all() or not flags[train].any():
            raise ValueError(
                f"with {len(set(fold_of.tolist()))} folds of {len(flags)} transcripts, the training part of a fold "
                "does not have both labels; provide transcripts of more questions"
            )
        monitor = make_monitor()
        monitor.fit([transcripts[i] for i in train], view)
        threshold = best_threshold(flags[train], monitor.scores([transcripts[i] for i in train], view))
        score[test] = monitor.scores([transcripts[i] for i in test], view)
        flagged[test] = score[test] >= threshold
    return score, flagged


def best_threshold(flags: NDArray[np.bool_], scores: NDArray[np.float64]) -> float:
    """The threshold with the highest TPR · TNR, midway between two scores. Scores at or above it are flagged."""
    fpr, tpr, thresholds = import_extra("sklearn.metrics").roc_curve(flags, scores, drop_intermediate=False)
    best = int(np.argmax((tpr * (1 - fpr))[1:])) + 1  # the first point, at infinity, flags nothing
    return float(thresholds[best : best + 2].mean())


def _figures(
    view: View, flags: NDArray[np.bool_], flagged: NDArray[np.bool_], score: NDArray[np.float64], groups: Sequence[str]
) -> MonitorFigures:
    true_positives, true_negatives = int(flagged[flags].sum()), int((~flagged[~flags]).sum())
    return MonitorFigures(
        view,
        wilson(true_positives, int(flags.sum())),
        wilson(true_negatives, int((~flags).sum())),
        bootstrap(lambda i: g_mean2(flags[i], flagged[i]), groups, resamples=400),
        float(import_extra("sklearn.metrics").roc_auc_score(flags, score)),
    )


class WordMonitor:
    """Logistic regression on hashed words and word pairs, and on a few counts that a reader would check.

    The counts: text length, number of `<<a=b>>` steps, number of them with wrong arithmetic, share of the prompt's
    numbers that are used.

        loss = mean_i b_i · BCE_i + penalty · ‖w‖²        b_i balances the two labels; the intercept is not penalised
    """

    def __init__(self, penalty: float = 1e-2) -> None:
        self._penalty = penalty

    def fit(self, transcripts: Sequence[Transcript], view: View) -> None:
        self._scaler = import_extra("sklearn.preprocessing").StandardScaler()
        inputs = _downweight_words(self._scaler.fit_transform(_features(transcripts, view)))
        self._model: Any = import_extra("sklearn.linear_model").LogisticRegression(
            C=1 / (2 * self._penalty * len(transcripts)),  # scikit-learn's loss is ‖w‖²/2 + C · Σ_i b_i · BCE_i
            class_weight="balanced",
            max_iter=1000,
        )
        self._model.fit(inputs, [t.flag for t in transcripts])

    def scores(self, transcripts: Sequence[Transcript], view: View) -> NDArray[np.float64]:
        inputs = _downweight_words(self._scaler.transform(_features(transcripts, view)))
        logits: NDArray[np.float64] = self._model.decision_function(inputs)
        return logits


def _downweight_words(inputs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scale the word features so that all of them together have about the weight of one count."""
    inputs[:, :_HASHED] /= np.sqrt(_HASHED)
    return inputs


def _features(transcripts: Sequence[Transcript], view: View) -> NDArray[np.float64]:
    """Features (n, 2048 + 4). CRC-32 hashes words the same way in every process, unlike Python's hash."""
    features = np.zeros((len(transcripts), _HASHED + 4))
    for row, transcript in zip(features, transcripts, strict=True):
        text = transcript.text(view)
        tokens = [token.lower() for token in _TOKEN.findall(text)]
        for gram in (*tokens, *(f"{a} {b}" for a, b in itertools.pairwise(tokens))):
            row[zlib.crc32(gram.encode()) % _HASHED] += 1
        row[:_HASHED] = np.log1p(row[:_HASHED])
        steps, given = _STEP.findall(text), set(_NUMBER.findall(transcript.prompt))
        row[_HASHED:] = (
            np.log1p(len(tokens)),
            len(steps),
            sum(not step_holds(*step) for step in steps),
            len(given & set(_NUMBER.findall(text))) / max(1, len(given)),
        )
    return features


def step_holds(expression: str, result: str) -> bool:
    """Whether an arithmetic expression (numbers, + − * / and parentheses) equals `result`.

    False if it is malformed, or has more than 200 characters.
    """
    if len(expression) > _MAX_EXPRESSION:
        return False
    try:
        return abs(_Expression(expression).value() - float(result)) < 0.01
    except (ValueError, ZeroDivisionError, IndexError):
        return False


class _Expression:
    """Arithmetic by recursive descent. Text of a model is never evaluated as code."""

    def __init__(self, text: str) -> None:
        self._tokens = _OPERAND.findall(text)

    def value(self) -> float:
        total = self._sum()
        if self._tokens:
            raise ValueError(f"unexpected {self._tokens[0]!r}")
        return total

    def _sum(self) -> float:
        total = self._product()
        while self._tokens and self._tokens[0] in "+-":
            total = total + self._product() if self._tokens.pop(0) == "+" else total - self._product()
        return total

    def _product(self) -> float:
        product = self._atom()
        while self._tokens and self._tokens[0] in "*/":
            product = product * self._atom() if self._tokens.pop(0) == "*" else product / self._atom()
        return product

    def _atom(self) -> float:
        token = self._tokens.pop(0)
        if token == "-":
            return -self._atom()
        if token == "(":
            inner = self._sum()
            if self._tokens.pop(0) != ")":
                raise ValueError("unbalanced parentheses")
            return inner
        return float(token)


def transcripts_from_solutions(path: str | Path) -> list[Transcript]:
    """Read labelled solutions in the format of `gsm8k_model_solutions.jsonl`: one question per line.

    The last line of a solution is its response, the lines before it are the chain of thought. Wrong solutions are to
    be flagged. Solutions of a single line are skipped.
    """
    transcripts = []
    with open_regular(path) as file:
        for line in file:
            record = json.loads(line)
            for solution in (value for value in record.values() if isinstance(value, dict)):
                cot, newline, response = solution["solution"].strip().rpartition("\n")
                if newline:
                    transcripts.append(
                        Transcript(record["question"], record["question"], cot, response, not solution["is_correct"])
                    )
    return transcripts
