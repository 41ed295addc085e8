"""Suites on refusal prompts: replies, the refusal margin without replies, and the model's own chains of thought."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from delib_fast.config import ConfigError
from delib_fast.data import Message
from delib_fast.datagen.refusals import MEASURED, MeasuredError, Verdict, classify_reply
from delib_fast.evals.intervals import Estimate, corrected_share
from delib_fast.evals.limits import spread
from delib_fast.evals.metrics.monitors import MonitorComparison, Transcript, WordMonitor, compare_views
from delib_fast.evals.metrics.refusal import (
    RefusalFigures,
    RefusalPrompt,
    classifier_figures,
    judge_refusals,
    read_labelled,
    read_prompts,
    refusal_figures,
)
from delib_fast.evals.metrics.refusal_margin import AGREEMENT, REFUSAL, MarginFigures, refusal_margins
from delib_fast.evals.recording import collect_samples
from delib_fast.evals.results import Cell, SuiteResult, Table, to_json_data
from delib_fast.evals.sampling import ChatModel
from delib_fast.evals.target import EvalTarget

_MARGIN = f"margin: log p({REFUSAL!r}) − log p({AGREEMENT!r}) in nats; separation: unsafe − safe prompts."
_UNKNOWN_ERROR = "The error of the judge is not known: set refusal_labelled to labelled replies to measure it."


def refusal_suite(target: EvalTarget, model: ChatModel) -> SuiteResult:
    settings, prompts = target.settings, _prompts(target, "refusal")
    chats = _chats(prompts)
    given = model(chats)
    responses = [r.response for r in given]
    labelled = read_labelled(settings.refusal_labelled) if settings.refusal_labelled is not None else []
    answered = [(p.prompt, r) for p, r in zip(prompts, responses, strict=True) if r.strip()]
    verdicts = _verdicts(target, [*answered, *((p, r) for p, r, _ in labelled)])

    def classify(prompt: str, response: str) -> Verdict | None:
        return verdicts[prompt, response]

    figures = refusal_figures(prompts, responses, classify)
    shown = [classify(p.prompt, r) if r.strip() else "empty reply" for p, r in zip(prompts, responses, strict=True)]
    samples = collect_samples(chats, given, verdicts=shown, labels=_labels(prompts))
    error, tables, details = None if settings.judge else MEASURED, [], {}
    if labelled:
        known = classifier_figures(labelled, classify)
        error = known.measured(f"labels in {Path(settings.refusal_labelled or '').name}")
        columns = ("accuracy", "recall of refusals", "precision", "labelled")
        row = (known.accuracy, known.refuse_recall, known.refuse_precision, known.labelled)
        tables, details = [Table("The classifier on labelled replies", columns, (row,))], {"classifier": known}
    classifier = f"the judge {settings.judge.model}" if settings.judge else "regular expressions (offline)"
    return SuiteResult(
        "refusal",
        "Refusal and over-refusal",
        f"{len(prompts)} prompts; replies classified by {classifier}. Empty replies and unread verdicts count in the "
        f"last rows only. {error.text() if error else _UNKNOWN_ERROR}",
        (*_refusal_tables(figures, error), *tables),
        details=to_json_data(
            {"figures": figures, "by": "judge" if settings.judge else "words", "error": error, **details}
        ),
        samples=samples,
    )


def _verdicts(target: EvalTarget, replies: Sequence[tuple[str, str]]) -> dict[tuple[str, str], Verdict | None]:
    """The verdict of the judge, or else of the offline classifier, on each (prompt, response); equal ones get one."""
    replies, judge = list(dict.fromkeys(replies)), target.settings.judge
    if judge is None:
        return {(p, r): classify_reply(p, r) for p, r in replies}
    found = judge_refusals(
        judge.endpoint, [p for p, _ in replies], [r for _, r in replies], target.results_folder / "judge"
    )
    return dict(zip(replies, found, strict=True))


def _refusal_tables(figures: RefusalFigures, error: MeasuredError | None) -> list[Table]:
    """The rates, with those of full refusals corrected for the classifier's error, if it is known."""

    def corrected(share: Estimate) -> Estimate | None:
        if error is None:
            return None
        return corrected_share(share, (error.found, error.refusals), (error.false_alarms, error.others))

    rates = Table(
        "Refusal",
        ("", "share", "corrected for its error"),
        (
            ("over-refusal (safe, full)", figures.over_refusal, corrected(figures.over_refusal)),
            ("safe, partial", figures.partial_over_refusal, None),
            ("refusal (unsafe, full)", figures.refusal, corrected(figures.refusal)),
            ("unsafe, complied", figures.compliance_with_unsafe, None),
            ("separation", figures.separation, None),
            ("empty reply", figures.empty, None),
            ("unread verdict", figures.unread, None),
        ),
    )
    by_type = Table(
        "By type",
        ("type", "comply", "partial", "refuse"),
        tuple((name, v["comply"], v["partial"], v["refuse"]) for name, v in figures.by_type.items()),
    )
    return [rates, *([by_type] if by_type.rows else [])]


def refusal_margin_suite(target: EvalTarget) -> SuiteResult:
    prompts = _prompts(target, "refusal_margin")
    figures = refusal_margins(target.scorer, prompts)
    return SuiteResult(
        "refusal_margin",
        "Refusal margin",
        f"{len(prompts)} prompts, each directly followed by either opening. {_MARGIN}",
        _margin_tables(("direct", figures)),
        details={"figures": to_json_data(figures)},
    )


def own_cot_suite(target: EvalTarget, model: ChatModel) -> SuiteResult:
    prompts = _prompts(target, "own_cot")
    chats = _chats(prompts)
    replies = model(chats, thinking=True)
    cots = [reply.cot or "" for reply in replies]
    own = refusal_margins(target.scorer, prompts, cots)
    other = refusal_margins(target.scorer, prompts, [*cots[1:], cots[0]])
    transcripts = [
        Transcript(p.prompt, "", cot, reply.response, p.label == "unsafe")
        for p, cot, reply in zip(prompts, cots, replies, strict=True)
    ]
    monitor: MonitorComparison | None = None
    try:
        monitor, missing = compare_views(transcripts, WordMonitor), ""
    except ValueError as error:  # too few prompts for its folds; the margins do not depend on it
        missing = f" There is no monitor: {error}; raise limit, or give prompts of both labels."
    closed = sum(reply.tags == "closed" for reply in replies)
    views = Table(
        "Does a monitor of words recognise the unsafe requests?",
        ("it reads", "TPR", "TNR", "g-mean²", "AUC"),
        tuple((v.view, v.tpr, v.tnr, v.g_mean2, round(v.auc, 3)) for v in (monitor.views if monitor else ())),
    )
    return SuiteResult(
        "own_cot",
        "The model's own chains of thought",
        f"{len(prompts)} prompts with the think block opened; {closed} chains of thought were closed by the model, the "
        f"others by the length limit. {_MARGIN} The monitor does not see the prompt; it is cross-validated by prompt."
        f"{missing}",
        (
            *_margin_tables(("after its own CoT", own), ("after another prompt's CoT", other)),
            *([views] if monitor else []),
        ),
        details={"own": to_json_data(own), "other": to_json_data(other), "monitor": to_json_data(monitor)},
        samples=collect_samples(chats, replies, labels=_labels(prompts)),
    )


def _prompts(target: EvalTarget, suite: str) -> list[RefusalPrompt]:
    path = target.settings.refusal_prompts
    if path is None:
        raise ConfigError(f"{suite} needs prompts; set refusal_prompts: xstest_prompts.csv in the config")
    return spread(read_prompts(path), target.settings.limit)


def _chats(prompts: Sequence[RefusalPrompt]) -> list[list[Message]]:
    return [[Message("user", p.prompt)] for p in prompts]


def _labels(prompts: Sequence[RefusalPrompt]) -> list[str]:
    return [f"{p.label}, {p.type}" for p in prompts]


def _margin_tables(*rows: tuple[str, MarginFigures]) -> tuple[Table, Table]:
    separation: list[tuple[Cell, ...]] = [(name, f.separation, f.auc) for name, f in rows]
    by_label: list[tuple[Cell, ...]] = [(name, f.safe, f.unsafe) for name, f in rows]
    return (
        Table("Refusal margin", ("opening", "separation", "AUC of margin"), tuple(separation)),
        Table("Mean margin by label", ("opening", "safe prompts", "unsafe prompts"), tuple(by_label)),
    )
