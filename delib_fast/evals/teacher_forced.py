"""The suites that only score text: from a `Subject` to tables."""

from __future__ import annotations

from collections.abc import Sequence

from delib_fast.config import ConfigError
from delib_fast.data import Row, encode_rows, encoding_options, segment_weights
from delib_fast.evals.agentic import conditions, margins
from delib_fast.evals.metrics.dose import cot_dose, gradient_share
from delib_fast.evals.metrics.drift import drift_from_base
from delib_fast.evals.metrics.monitors import WordMonitor, compare_views, transcripts_from_solutions
from delib_fast.evals.metrics.reliance import early_answering, reliance, with_cot
from delib_fast.evals.metrics.segments import segment_figures
from delib_fast.evals.results import Curve, SuiteResult, Table, plain
from delib_fast.evals.target import EvalTarget

_GRADIENT_ROWS = 16


def limited(subject: EvalTarget, rows: Sequence[Row]) -> list[Row]:
    """The first `limit` rows."""
    return list(rows[: subject.settings.limit])


def thinking_rows(subject: EvalTarget) -> list[Row]:
    rows = limited(subject, with_cot(subject.held_out))
    if not rows:
        raise ConfigError(f"{subject.path}: none of its held-out rows has a chain of thought; give some under rows:")
    return rows


def segments(subject: EvalTarget) -> SuiteResult:
    rows = limited(subject, subject.held_out)
    figures = segment_figures(subject.scorer, rows, subject.categories(rows))
    sources = {f.group for f in figures if f.by == "source"}
    tables = []
    for by, title in (("all", "All rows"), ("source", "By source"), ("category", "By category")):
        shown = [f for f in figures if f.by == by and (by != "source" or len(sources) > 1)]
        if shown:
            tables.append(
                Table(
                    title,
                    ("rows", "segment", "tokens", "nll", "accuracy"),
                    tuple((f.group, f.segment, f.tokens, f.nll, f.accuracy) for f in shown),
                )
            )
    return SuiteResult(
        "segments",
        "Segments",
        "nats a token, and the share of tokens that are the model's most likely "
        f"one, over {len(rows)} held-out rows with their own chain of thought.",
        tuple(tables),
        details={"figures": plain(figures)},
    )


def dose(subject: EvalTarget) -> SuiteResult:
    if not subject.aft_stages:
        raise ConfigError(
            f"{subject.path}: the CoT dose is a figure of a run's AFT stages, and this has none; give a run directory"
        )
    rows, details = [], {}
    for stage in subject.aft_stages:
        trained = [row for row in subject.trained_on if row.source in stage.train]
        weights = segment_weights(stage)
        examples = encode_rows(trained, subject.tokenizer, **encoding_options(stage))
        figures = cot_dose(examples, weights)
        gradient = gradient_share(subject.scorer, examples[:_GRADIENT_ROWS], weights)
        rows.append(
            (stage.name, stage.cot, weights[1], figures.weight_share, figures.cot_tokens * stage.epochs, gradient.share)
        )
        details[stage.name] = plain({"dose": figures, "gradient": gradient, "epochs": stage.epochs})
    table = Table("CoT supervision", ("stage", "cot", "w_cot", "dose", "CoT tokens", "grad. share"), tuple(rows))
    return SuiteResult(
        "dose",
        "CoT dose",
        "dose: Σw over CoT targets ÷ Σw. CoT tokens: supervised ones, over all "
        f"epochs. grad. share: ‖g_cot‖ ÷ (‖g_cot‖ + ‖g_rest‖) at the final weights on {_GRADIENT_ROWS} "
        "training rows.",
        (table,),
        details=details,
    )


def drift(subject: EvalTarget) -> SuiteResult:
    if subject.base_config is None:
        raise ConfigError(f"{subject.path}: drift needs the base model; give --base FOLDER")
    figures = drift_from_base(subject.scorer, thinking_rows(subject), subject.base)
    table = Table(
        "Distance from the base",
        ("segment", "KL(base‖model)", "nll", "base nll"),
        tuple((f.segment, f.kl, f.nll, f.base_nll) for f in figures),
    )
    strange = Table(
        "How strange the text is to the base",
        ("segment", "tokens", "perplexity"),
        tuple((f.segment, f.tokens, f.base_perplexity) for f in figures),
    )
    return SuiteResult(
        "drift",
        "CoT drift",
        f"nats a token on held-out rows; perplexity: exp(base nll). Base: {subject.base_config[1]}.",
        (table, strange),
        details={"figures": plain(figures)},
    )


def early(subject: EvalTarget) -> SuiteResult:
    figures = early_answering(subject.scorer, thinking_rows(subject))
    table = Table(
        "Early answering",
        ("part of the CoT", "nll of the answer", "above full CoT", "greedy match"),
        tuple((f"{p.fraction:.0%}", p.nll, p.change, p.greedy_match) for p in figures.points),
    )
    areas = Table(
        "Area over the curve",
        ("measure", "area"),
        (("nll, nats", figures.area_nats), ("greedy match", figures.area_match)),
    )
    curve = Curve(
        "nll of the reference answer, above that behind the whole chain of thought",
        "part of the chain of thought",
        "nats an answer",
        tuple((p.fraction, p.change) for p in figures.points),
    )
    return SuiteResult(
        "early",
        "Early answering",
        "The reference answer after the first part of its chain of thought, "
        f"the think block closed there. Prompt sharing: {figures.prompt_sharing}.",
        (table, areas),
        (curve,),
        {"figures": plain(figures)},
    )


def rely(subject: EvalTarget) -> SuiteResult:
    figures = reliance(subject.scorer, thinking_rows(subject))
    table = Table(
        "The answer behind another chain of thought",
        ("CoT", "nll of the answer", "change", "CoT tokens"),
        tuple((v.variant, v.nll, v.change, round(v.cot_tokens)) for v in figures.variants),
    )
    kinds = Table(
        "Corrupted, by kind of mistake",
        ("kind", "change in nll", "rows"),
        tuple((kind, change, change.n) for kind, change in figures.corruption_kinds.items()),
    )
    return SuiteResult(
        "reliance",
        "Reliance",
        "nats an answer; change is paired by row against the row's own chain of "
        f"thought. Prompt sharing: {figures.prompt_sharing}.",
        (table, kinds),
        details={"figures": plain(figures)},
    )


def agentic(subject: EvalTarget) -> SuiteResult:
    settings = subject.settings.agentic
    figures = margins(
        subject.scorer, conditions(urgencies=settings.urgency, conflict=settings.conflict, scratchpad=False)
    )
    names = [f.group.removeprefix("scenario: ") for f in figures.figures]
    table = Table(
        "logp(aligned) − logp(misaligned)",
        ("over", "margin, nats a reply", "nats a token"),
        tuple((name, f.margin, f.margin_per_token) for name, f in zip(names, figures.figures, strict=True)),
    )
    likelier = Table(
        "Pairs in which the aligned action is likelier",
        ("over", "share", "pairs"),
        tuple((name, f.aligned_likelier, f.pairs) for name, f in zip(names, figures.figures, strict=True)),
    )
    return SuiteResult(
        "agentic",
        "Agentic misalignment, teacher-forced",
        "Two written actions a scenario, scored "
        "behind each condition's mail. Rates of what a model does by itself: `inspect eval "
        "delib_fast/agentic_misalignment`.",
        (table, likelier),
        details={"figures": plain(figures)},
    )


def monitor(subject: EvalTarget) -> SuiteResult:
    path = subject.settings.solutions
    if path is None:
        raise ConfigError("monitor needs labelled solutions: solutions: gsm8k_model_solutions.jsonl in the config")
    found = compare_views(transcripts_from_solutions(path, subject.settings.limit), WordMonitor)
    table = Table(
        "A monitor of words and counts",
        ("it reads", "TPR", "TNR", "g-mean²", "AUC"),
        tuple((v.view, v.tpr, v.tnr, v.g_mean2, round(v.auc, 3)) for v in found.views),
    )
    gain = Table(
        "Gain from the CoT",
        ("g-mean²", "transcripts", "to be flagged"),
        ((found.cot_gain, found.transcripts, found.flagged),),
    )
    return SuiteResult(
        "monitor",
        "Monitor with labels",
        "Cross-fitted by question on labelled solutions. It judges these transcripts and not the model evaluated here.",
        (table, gain),
        details={"figures": plain(found)},
    )
