"""Suites that only score given text: from an `EvalTarget` to tables."""

from __future__ import annotations

from typing import Any

from delib_fast.config import ConfigError
from delib_fast.data import Row, encode_rows, encoding_options, total_weights
from delib_fast.evals.agentic import conditions, margins
from delib_fast.evals.limits import spread, spread_by_source
from delib_fast.evals.metrics.dose import cot_dose, gradient_share
from delib_fast.evals.metrics.drift import drift_from_base
from delib_fast.evals.metrics.monitors import WordMonitor, compare_views, transcripts_from_solutions
from delib_fast.evals.metrics.openings import OPENING, opening_figure
from delib_fast.evals.metrics.reliance import early_answering, reliance, rows_with_cot
from delib_fast.evals.metrics.segments import segment_figures
from delib_fast.evals.results import Cell, Curve, SuiteResult, Table, to_json_data
from delib_fast.evals.target import EvalTarget

_GRADIENT_ROWS = 16


def held_out_with_cot(target: EvalTarget) -> list[Row]:
    """At most `limit` held-out rows of each source with a chain of thought. Raises ConfigError if there are none."""
    rows = spread_by_source(rows_with_cot(target.held_out), target.settings.limit)
    if not rows:
        raise ConfigError(f"{target.path}: no held-out row has a chain of thought; set rows: to some that have one")
    return rows


def segments_suite(target: EvalTarget) -> SuiteResult:
    rows = spread_by_source(target.held_out, target.settings.limit)
    figures = segment_figures(target.scorer, rows, target.categories(rows))
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
    if (opening := opening_figure(target.scorer, rows)) is not None:
        tables.append(Table("Opening of the think block after a prompt", ("rows", OPENING), (("all", opening),)))
    return SuiteResult(
        "segments",
        "Segments",
        "nll in nats per token, and the share of tokens that are the model's most likely one, over "
        f"{len(rows)} held-out rows with their own chain of thought.",
        tuple(tables),
        details={"figures": to_json_data(figures)},
    )


def dose_suite(target: EvalTarget) -> SuiteResult:
    if not target.aft_stages:
        raise ConfigError(
            f"{target.path}: dose needs the AFT stages of a run, and there are none here; give a run directory"
        )
    rows: list[tuple[Cell, ...]] = []
    details: dict[str, Any] = {}
    for stage in target.aft_stages:
        trained = [row for row in target.trained_on if row.source in stage.train]
        weights = total_weights(stage)
        examples = encode_rows(trained, target.tokenizer, **encoding_options(stage))
        figures = cot_dose(examples, weights)
        gradient = gradient_share(target.scorer, spread(examples, _GRADIENT_ROWS), weights)
        rows.append(
            (stage.name, stage.cot, weights[1], figures.weight_share, figures.cot_tokens * stage.epochs, gradient.share)
        )
        details[stage.name] = to_json_data({"dose": figures, "gradient": gradient, "epochs": stage.epochs})
    table = Table("CoT supervision", ("stage", "cot", "w_cot", "dose", "CoT tokens", "grad. share"), tuple(rows))
    return SuiteResult(
        "dose",
        "CoT dose",
        "dose: Σw over CoT targets ÷ Σw over all targets; w counts the nll and the divergence from a teacher. "
        "CoT tokens: supervised ones, over all epochs. grad. share: "
        f"‖g_cot‖ ÷ (‖g_cot‖ + ‖g_rest‖) of the nll at the final weights on {_GRADIENT_ROWS} training rows.",
        (table,),
        details=details,
    )


def drift_suite(target: EvalTarget) -> SuiteResult:
    if target.base_config is None:
        raise ConfigError(f"{target.path}: drift needs the base model; give --base FOLDER")
    figures = drift_from_base(target.scorer, held_out_with_cot(target), target.base)
    kl = Table(
        "Distance from the base model",
        ("segment", "KL(base‖model)", "nll", "base nll"),
        tuple((f.segment, f.kl, f.nll, f.base_nll) for f in figures),
    )
    perplexity = Table(
        "Perplexity of the text under the base model",
        ("segment", "tokens", "perplexity"),
        tuple((f.segment, f.tokens, f.base_perplexity) for f in figures),
    )
    return SuiteResult(
        "drift",
        "CoT drift",
        f"nats per token on held-out rows; perplexity: exp(base nll). Base: {target.base_config[1]}.",
        (kl, perplexity),
        details={"figures": to_json_data(figures)},
    )


def early_answering_suite(target: EvalTarget) -> SuiteResult:
    figures = early_answering(target.scorer, held_out_with_cot(target))
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
        "nll of the reference answer, relative to that after the full chain of thought",
        "part of the chain of thought",
        "nats per answer",
        tuple((p.fraction, p.change) for p in figures.points),
    )
    return SuiteResult(
        "early",
        "Early answering",
        "The reference answer after the first part of its chain of thought; the think block is closed there. Prompt "
        f"sharing: {figures.prompt_sharing}.",
        (table, areas),
        (curve,),
        {"figures": to_json_data(figures)},
    )


def reliance_suite(target: EvalTarget) -> SuiteResult:
    figures = reliance(target.scorer, held_out_with_cot(target))
    table = Table(
        "The answer after a changed chain of thought",
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
        "nats per answer; change is relative to the row's own chain of thought, paired by row. Prompt sharing: "
        f"{figures.prompt_sharing}.",
        (table, kinds),
        details={"figures": to_json_data(figures)},
    )


def agentic_suite(target: EvalTarget) -> SuiteResult:
    settings = target.settings.agentic
    found = margins(target.scorer, conditions(urgencies=settings.urgency, conflict=settings.conflict, scratchpad=False))
    names = [f.group.removeprefix("scenario: ") for f in found.figures]
    table = Table(
        "logp(aligned) − logp(misaligned)",
        ("over", "margin, nats per reply", "nats per token"),
        tuple((name, f.margin, f.margin_per_token) for name, f in zip(names, found.figures, strict=True)),
    )
    likelier = Table(
        "Pairs in which the aligned action is more likely",
        ("over", "share", "pairs"),
        tuple((name, f.aligned_likelier, f.pairs) for name, f in zip(names, found.figures, strict=True)),
    )
    return SuiteResult(
        "agentic",
        "Agentic misalignment, teacher-forced",
        "Two pairs of written actions per scenario, scored after each condition's mail. For rates of what a model does "
        "by itself, use `inspect eval delib_fast/agentic_misalignment`.",
        (table, likelier),
        details={"figures": to_json_data(found)},
    )


def monitor_suite(target: EvalTarget) -> SuiteResult:
    path = target.settings.solutions
    if path is None:
        raise ConfigError("monitor needs labelled solutions; set solutions: gsm8k_model_solutions.jsonl in the config")
    transcripts = transcripts_from_solutions(path)
    questions = set(spread(list(dict.fromkeys(t.prompt for t in transcripts)), target.settings.limit))
    found = compare_views([t for t in transcripts if t.prompt in questions], WordMonitor)
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
        "Cross-validated by question on labelled solutions. The figures describe these transcripts, not the model "
        "evaluated here.",
        (table, gain),
        details={"figures": to_json_data(found)},
    )
