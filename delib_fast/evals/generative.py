"""The suites that let the model write: from a `Subject` and a `Replier` to tables."""

from __future__ import annotations

from collections.abc import Sequence

from delib_fast.config import ConfigError
from delib_fast.data import Message, Row, read_source
from delib_fast.evals.judge import Judge, judge_refusals
from delib_fast.evals.metrics.choices import choices_from_gsm8k
from delib_fast.evals.metrics.hints import hint_figures, hint_outcomes
from delib_fast.evals.metrics.legibility import legibility, vocabulary
from delib_fast.evals.metrics.necessity import cot_necessity
from delib_fast.evals.metrics.policy import PolicyClassifier, policy_retrieval
from delib_fast.evals.metrics.refusal import (
    Verdict,
    classifier_figures,
    classify_reply,
    read_labelled,
    read_prompts,
    refusal_figures,
)
from delib_fast.evals.results import SuiteResult, Table, plain
from delib_fast.evals.sampling import Replier, Reply
from delib_fast.evals.target import EvalTarget
from delib_fast.evals.teacher_forced import limited, thinking_rows


def _questions(subject: EvalTarget) -> list[Row]:
    source = subject.settings.questions
    if source is None:
        raise ConfigError(
            "this suite needs questions with a number for an answer: questions: gsm8k_test.jsonl in the config"
        )
    return limited(subject, read_source("questions", source))


def hints(subject: EvalTarget, reply: Replier) -> SuiteResult:
    outcomes = hint_outcomes(reply, choices_from_gsm8k(_questions(subject)))
    figures = hint_figures(outcomes)
    table = Table(
        "Hints at a wrong option",
        ("hint", "pairs", "followed", "faithful", "normalised", "moved elsewhere"),
        tuple((f.kind, f.answered, f.followed, f.faithful, f.faithful_normalised, f.moved_elsewhere) for f in figures),
    )
    unread = figures[-1].unread if figures else 0
    return SuiteResult(
        "hints",
        "Hint faithfulness",
        "followed: went over to the hinted option. faithful: of those, "
        f"the chain of thought mentions the hint. {unread} pairs gave no option that could be read.",
        (table,),
        details={"figures": plain(figures), "outcomes": plain(outcomes)},
    )


def necessity(subject: EvalTarget, reply: Replier) -> SuiteResult:
    figures = cot_necessity(reply, _questions(subject), subject.settings.sampling.samples)
    rows = (
        ("with CoT", figures.with_cot),
        ("without", figures.without_cot),
        ("uplift", figures.uplift),
        *((f"cell: {name}", share) for name, share in figures.cells.items()),
    )
    return SuiteResult(
        "necessity",
        "CoT necessity",
        f"Accuracy on {figures.questions} questions, {figures.samples} "
        "sample(s) each, the think block left open or closed empty.",
        (Table("Accuracy", ("", "share"), rows),),
        details={"figures": plain(figures)},
    )


def _replies_to_rows(subject: EvalTarget, reply: Replier) -> tuple[list[Row], list[Reply]]:
    rows = thinking_rows(subject)
    return rows, reply([row.messages for row in rows], thinking=True)


def readable(subject: EvalTarget, reply: Replier) -> SuiteResult:
    rows, replies = _replies_to_rows(subject, reply)
    known = vocabulary(text for row in subject.trained_on for text in row.texts) or vocabulary(
        text for row in subject.held_out for text in row.texts
    )
    figures = legibility(replies, [row.messages[-1].content for row in rows], known)
    names = (
        ("with a CoT", figures.with_cot),
        ("broken tags", figures.broken_tags),
        ("cut off", figures.unfinished),
        ("unknown words", figures.unknown_words),
        ("repeated 4-grams", figures.repeated_ngrams),
        ("zlib ratio", figures.compression),
        ("script of the prompt", figures.same_script),
    )
    lengths = Table("Words of a CoT", tuple(figures.words_percentiles), (tuple(figures.words_percentiles.values()),))
    return SuiteResult(
        "legibility",
        "Legibility",
        f"Proxies over {figures.replies} replies to held-out prompts; "
        f"unknown words: not among {len(known):,} of the rows.",
        (Table("Proxies", ("proxy", "share"), names), *([lengths] if figures.words_percentiles else [])),
        details={"figures": plain(figures)},
    )


def policy(subject: EvalTarget, reply: Replier) -> SuiteResult:
    labelled = _labelled_cots(subject, list(subject.trained_on))
    rows, replies = _replies_to_rows(subject, reply)
    wanted = subject.categories(rows)
    pairs = [(row, answer) for row, answer in zip(rows, replies, strict=True) if row.location in wanted]
    if not pairs:
        raise ConfigError(
            f"{subject.path}: its held-out rows have no field {subject.settings.category!r}; name the "
            "field with category: in the config"
        )
    held_out = _labelled_cots(subject, rows)
    if not labelled:  # a model folder: fit on every second held-out row, measure on the others
        labelled, held_out = held_out[::2], held_out[1::2]
    classifier = PolicyClassifier(labelled, spec_words=subject.settings.spec_words)
    figures = policy_retrieval(
        [answer.cot for _, answer in pairs], [wanted[row.location] for row, _ in pairs], classifier, held_out
    )
    table = Table(
        "Policy retrieval",
        ("", "share"),
        (
            ("right category", figures.accuracy),
            ("speaks of policy", figures.mentioned),
            ("right where it does", figures.accuracy_where_mentioned),
            ("classifier's ceiling", figures.ceiling),
        ),
    )
    by = Table("By category", ("category", "right"), tuple(figures.by_category.items()))
    return SuiteResult(
        "policy",
        "Policy retrieval",
        "Whether the sampled chain of thought speaks of the policy of its "
        "prompt (arXiv 2412.16339 §4.2, with a classifier of words). Ceiling: the same classifier on "
        "reference chains of thought.",
        (table, by),
        details={"figures": plain(figures)},
    )


def _labelled_cots(subject: EvalTarget, rows: Sequence[Row]) -> list[tuple[str, tuple[str, ...]]]:
    categories = subject.categories(rows)
    return [(row.cot, categories[row.location]) for row in rows if row.cot and row.location in categories]


def refusal(subject: EvalTarget, reply: Replier) -> SuiteResult:
    settings = subject.settings
    if settings.refusal_prompts is None:
        raise ConfigError("refusal needs prompts: refusal_prompts: xstest_prompts.csv in the config")
    prompts = _spread(read_prompts(settings.refusal_prompts), settings.limit)
    responses = [r.response for r in reply([[Message("user", p.prompt)] for p in prompts])]
    asked = [(p.prompt, r) for p, r in zip(prompts, responses, strict=True) if r.strip()]
    if settings.judge is not None:
        judge = Judge(settings.judge.base_url, settings.judge.model, settings.judge.api_key_env)
        verdicts: list[Verdict] = judge_refusals(judge, [p for p, _ in asked], [r for _, r in asked])
    else:
        verdicts = [classify_reply(p, r) for p, r in asked]
    left = iter(verdicts)
    figures = refusal_figures(prompts, responses, lambda *_: next(left))
    rates = Table(
        "Refusal",
        ("", "share"),
        (
            ("over-refusal (safe, full)", figures.over_refusal),
            ("safe, partial", figures.partial_over_refusal),
            ("refusal (unsafe, full)", figures.refusal),
            ("unsafe, complied", figures.compliance_with_unsafe),
            ("separation", figures.separation),
            ("no reply at all", figures.empty),
        ),
    )
    by = Table(
        "By type",
        ("type", "comply", "partial", "refuse"),
        tuple((name, v["comply"], v["partial"], v["refuse"]) for name, v in figures.by_type.items()),
    )
    tables = [rates, *([by] if by.rows else [])]
    details = {"figures": plain(figures), "by": "judge" if settings.judge else "words"}
    if settings.refusal_labelled is not None:
        known = classifier_figures(read_labelled(settings.refusal_labelled))
        tables.append(
            Table(
                "The offline classifier on labelled replies",
                ("accuracy", "refusals found", "precision"),
                ((known.accuracy, known.refuse_recall, known.refuse_precision),),
            )
        )
        details["classifier"] = plain(known)
    who = f"judge {settings.judge.model}" if settings.judge else "words (offline)"
    return SuiteResult(
        "refusal",
        "Refusal and over-refusal",
        f"{len(prompts)} prompts, replies told apart by {who}; empty replies are in the last row and in no other.",
        tuple(tables),
        details=details,
    )


def _spread(prompts: Sequence[object], limit: int | None) -> list:
    """At most `limit` prompts, evenly over the file, so that every type is in."""
    if limit is None or len(prompts) <= limit:
        return list(prompts)
    return [prompts[k * len(prompts) // limit] for k in range(limit)]
