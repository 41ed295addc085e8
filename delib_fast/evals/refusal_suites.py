"""Suites on refusal prompts that need no judge: the refusal margin, and the model's own chains of thought."""

from __future__ import annotations

from delib_fast.config import ConfigError
from delib_fast.data import Message
from delib_fast.evals.limits import spread
from delib_fast.evals.metrics.monitors import MonitorComparison, Transcript, WordMonitor, compare_views
from delib_fast.evals.metrics.refusal import RefusalPrompt, read_prompts
from delib_fast.evals.metrics.refusal_margin import AGREEMENT, REFUSAL, MarginFigures, refusal_margins
from delib_fast.evals.recording import collect_samples
from delib_fast.evals.results import Cell, SuiteResult, Table, to_json_data
from delib_fast.evals.sampling import ChatModel
from delib_fast.evals.target import EvalTarget

_MARGIN = f"margin: log p({REFUSAL!r}) − log p({AGREEMENT!r}) in nats; separation: unsafe − safe prompts."


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
    chats = [[Message("user", p.prompt)] for p in prompts]
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
        samples=collect_samples(chats, replies, labels=[f"{p.label}, {p.type}" for p in prompts]),
    )


def _prompts(target: EvalTarget, suite: str) -> list[RefusalPrompt]:
    path = target.settings.refusal_prompts
    if path is None:
        raise ConfigError(f"{suite} needs prompts; set refusal_prompts: xstest_prompts.csv in the config")
    return spread(read_prompts(path), target.settings.limit)


def _margin_tables(*rows: tuple[str, MarginFigures]) -> tuple[Table, Table]:
    separation: list[tuple[Cell, ...]] = [(name, f.separation, f.auc) for name, f in rows]
    by_label: list[tuple[Cell, ...]] = [(name, f.safe, f.unsafe) for name, f in rows]
    return (
        Table("Refusal margin", ("opening", "separation", "AUC of margin"), tuple(separation)),
        Table("Mean margin by label", ("opening", "safe prompts", "unsafe prompts"), tuple(by_label)),
    )
