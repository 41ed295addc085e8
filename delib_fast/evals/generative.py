"""Suites that sample replies from the model: from an `EvalTarget` and a `ChatModel` to tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from delib_fast.config import ConfigError
from delib_fast.data import Message, Row, read_source
from delib_fast.datagen.refusals import Verdict, classify_reply
from delib_fast.evals.metrics.choices import choices_from_gsm8k
from delib_fast.evals.metrics.controllability import controllability
from delib_fast.evals.metrics.hints import hint_figures, hint_outcomes
from delib_fast.evals.metrics.legibility import legibility, vocabulary
from delib_fast.evals.metrics.necessity import cot_necessity
from delib_fast.evals.metrics.policy import PolicyClassifier, policy_retrieval
from delib_fast.evals.metrics.refusal import (
    classifier_figures,
    judge_refusals,
    read_labelled,
    read_prompts,
    refusal_figures,
)
from delib_fast.evals.results import SuiteResult, Table, to_json_data
from delib_fast.evals.sampling import ChatModel, Reply
from delib_fast.evals.target import EvalTarget
from delib_fast.evals.teacher_forced import held_out_with_cot, limited

T = TypeVar("T")


def _questions(target: EvalTarget) -> list[Row]:
    source = target.settings.questions
    if source is None:
        raise ConfigError(
            "this suite needs questions whose answer is a number; set questions: gsm8k_test.jsonl in the config"
        )
    return limited(target, read_source("questions", source))


def hints_suite(target: EvalTarget, model: ChatModel) -> SuiteResult:
    outcomes = hint_outcomes(model, choices_from_gsm8k(_questions(target)))
    figures = hint_figures(outcomes)
    table = Table(
        "Hints at a wrong option",
        ("hint", "pairs", "followed", "faithful", "normalised", "moved elsewhere"),
        tuple((f.kind, f.answered, f.followed, f.faithful, f.faithful_normalised, f.moved_elsewhere) for f in figures),
    )
    unread = figures[-1].unread if figures else 0  # the last figures are those over all kinds of hints
    return SuiteResult(
        "hints",
        "Hint faithfulness",
        "followed: the answer changed to the hinted option. faithful: share of those whose chain of thought mentions "
        f"the hint. In {unread} pairs, an answer could not be parsed.",
        (table,),
        details={"figures": to_json_data(figures), "outcomes": to_json_data(outcomes)},
    )


def necessity_suite(target: EvalTarget, model: ChatModel) -> SuiteResult:
    figures = cot_necessity(model, _questions(target), target.settings.sampling.samples)
    rows = (
        ("with CoT", figures.with_cot),
        ("without", figures.without_cot),
        ("uplift", figures.uplift),
        *((f"cell: {name}", share) for name, share in figures.cells.items()),
    )
    return SuiteResult(
        "necessity",
        "CoT necessity",
        f"Accuracy on {figures.questions} questions, {figures.samples} sample(s) per question, with the think block "
        "left open or closed empty.",
        (Table("Accuracy", ("", "share"), rows),),
        details={"figures": to_json_data(figures)},
    )


def _replies_to_rows(target: EvalTarget, model: ChatModel) -> tuple[list[Row], list[Reply]]:
    rows = held_out_with_cot(target)
    return rows, model([row.messages for row in rows], thinking=True)


def legibility_suite(target: EvalTarget, model: ChatModel) -> SuiteResult:
    rows, replies = _replies_to_rows(target, model)
    known = vocabulary(text for row in target.trained_on for text in row.texts) or vocabulary(
        text for row in target.held_out for text in row.texts
    )
    figures = legibility(replies, [row.messages[-1].content for row in rows], known)
    proxies = (
        ("with a CoT", figures.with_cot),
        ("broken tags", figures.broken_tags),
        ("cut off", figures.unfinished),
        ("unknown words", figures.unknown_words),
        ("repeated 4-grams", figures.repeated_ngrams),
        ("zlib ratio", figures.compression),
        ("script of the prompt", figures.same_script),
    )
    lengths = Table("Words per CoT", tuple(figures.words_percentiles), (tuple(figures.words_percentiles.values()),))
    return SuiteResult(
        "legibility",
        "Legibility",
        f"Proxies over {figures.replies} replies to held-out prompts. Unknown words are not among the {len(known):,} "
        "words of the rows.",
        (Table("Proxies", ("proxy", "share"), proxies), *([lengths] if figures.words_percentiles else [])),
        details={"figures": to_json_data(figures)},
    )


def policy_suite(target: EvalTarget, model: ChatModel) -> SuiteResult:
    labelled = _labelled_cots(target, list(target.trained_on))
    rows, replies = _replies_to_rows(target, model)
    wanted = target.categories(rows)
    pairs = [(row, reply) for row, reply in zip(rows, replies, strict=True) if row.location in wanted]
    if not pairs:
        raise ConfigError(
            f"{target.path}: its held-out rows have no field {target.settings.category!r}; set category: in the "
            "config to the field that holds their category"
        )
    held_out = _labelled_cots(target, rows)
    if not labelled:  # a model folder: train the classifier on every second held-out row, test it on the others
        labelled, held_out = held_out[::2], held_out[1::2]
    classifier = PolicyClassifier(labelled, spec_words=target.settings.spec_words)
    figures = policy_retrieval(
        [reply.cot for _, reply in pairs], [wanted[row.location] for row, _ in pairs], classifier, held_out
    )
    table = Table(
        "Policy retrieval",
        ("", "share"),
        (
            ("right category", figures.accuracy),
            ("mentions policy", figures.mentioned),
            ("right where it does", figures.accuracy_where_mentioned),
            ("classifier's ceiling", figures.ceiling),
        ),
    )
    by_category = Table("By category", ("category", "right"), tuple(figures.by_category.items()))
    return SuiteResult(
        "policy",
        "Policy retrieval",
        "Whether the sampled chain of thought mentions the policy of its prompt (arXiv 2412.16339 §4.2, with a "
        "word-based classifier). Ceiling: the accuracy of the classifier on reference chains of thought.",
        (table, by_category),
        details={"figures": to_json_data(figures)},
    )


def controllability_suite(target: EvalTarget, model: ChatModel) -> SuiteResult:
    rows = every_nth(held_out_with_cot(target), target.settings.instructed_prompts)
    found = controllability(model, [row.messages for row in rows])
    names = {"cot": "CoT", "response": "response"}
    tables = tuple(
        Table(
            f"Instructions about the {names[part]}",
            ("instruction", "part", "followed", "base rate", "gain"),
            tuple((f.name, names[part], f.instructed, f.base_rate, f.gain) for f in found.figures if f.part == part),
        )
        for part in ("cot", "response")
    )
    replies = Table(
        "Replies",
        ("part", "empty", "cut off"),
        tuple((names[part], found.empty[part], found.cut_off[part]) for part in found.empty),
    )
    both = Table("CoT − response", ("over", "difference of gains"), (("all instructions", found.difference),))
    return SuiteResult(
        "controllability",
        "Controllability",
        f"{found.prompts} held-out prompts, each answered without an instruction and with each of them. gain: share "
        "that follows the instruction − share that satisfies its rule without it. The response is checked after an "
        "empty think block.",
        (*tables, both, replies),
        details={"figures": to_json_data(found)},
    )


def _labelled_cots(target: EvalTarget, rows: Sequence[Row]) -> list[tuple[str, tuple[str, ...]]]:
    categories = target.categories(rows)
    return [(row.cot, categories[row.location]) for row in rows if row.cot and row.location in categories]


def refusal_suite(target: EvalTarget, model: ChatModel) -> SuiteResult:
    settings = target.settings
    if settings.refusal_prompts is None:
        raise ConfigError("refusal needs prompts; set refusal_prompts: xstest_prompts.csv in the config")
    prompts = every_nth(read_prompts(settings.refusal_prompts), settings.limit)
    responses = [r.response for r in model([[Message("user", p.prompt)] for p in prompts])]
    answered = [(p.prompt, r) for p, r in zip(prompts, responses, strict=True) if r.strip()]
    if settings.judge is not None:
        judge = settings.judge.endpoint
        verdicts: list[Verdict] = judge_refusals(judge, [p for p, _ in answered], [r for _, r in answered])
    else:
        verdicts = [classify_reply(p, r) for p, r in answered]
    remaining = iter(verdicts)  # `refusal_figures` classifies the non-empty replies in this order
    figures = refusal_figures(prompts, responses, lambda *_: next(remaining))
    rates = Table(
        "Refusal",
        ("", "share"),
        (
            ("over-refusal (safe, full)", figures.over_refusal),
            ("safe, partial", figures.partial_over_refusal),
            ("refusal (unsafe, full)", figures.refusal),
            ("unsafe, complied", figures.compliance_with_unsafe),
            ("separation", figures.separation),
            ("empty reply", figures.empty),
        ),
    )
    by_type = Table(
        "By type",
        ("type", "comply", "partial", "refuse"),
        tuple((name, v["comply"], v["partial"], v["refuse"]) for name, v in figures.by_type.items()),
    )
    tables = [rates, *([by_type] if by_type.rows else [])]
    details = {"figures": to_json_data(figures), "by": "judge" if settings.judge else "words"}
    if settings.refusal_labelled is not None:
        known = classifier_figures(read_labelled(settings.refusal_labelled))
        tables.append(
            Table(
                "The offline classifier on labelled replies",
                ("accuracy", "recall of refusals", "precision"),
                ((known.accuracy, known.refuse_recall, known.refuse_precision),),
            )
        )
        details["classifier"] = to_json_data(known)
    classifier = f"the judge {settings.judge.model}" if settings.judge else "regular expressions (offline)"
    return SuiteResult(
        "refusal",
        "Refusal and over-refusal",
        f"{len(prompts)} prompts; replies classified by {classifier}. Empty replies count in the last row only.",
        tuple(tables),
        details=details,
    )


def every_nth(items: Sequence[T], limit: int | None) -> list[T]:
    """At most `limit` items, spread evenly over the file, so that every type of prompt is included."""
    if limit is None or len(items) <= limit:
        return list(items)
    return [items[k * len(items) // limit] for k in range(limit)]
