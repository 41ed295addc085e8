"""Suites that sample replies from the model: from an `EvalTarget` and a `ChatModel` to tables."""

from __future__ import annotations

from collections.abc import Sequence

from delib_fast.config import ConfigError
from delib_fast.data import Row, read_source
from delib_fast.data.encode.encoder import encoder_for
from delib_fast.evals.intervals import mean, wilson
from delib_fast.evals.limits import spread, spread_by_source
from delib_fast.evals.metrics.choices import choices_from_gsm8k, result_of
from delib_fast.evals.metrics.controllability import controllability
from delib_fast.evals.metrics.hints import HintOutcome, hint_figures, hint_outcomes
from delib_fast.evals.metrics.legibility import legibility, vocabulary
from delib_fast.evals.metrics.necessity import cot_necessity, is_right
from delib_fast.evals.metrics.openings import OPENING, opening_log_p
from delib_fast.evals.metrics.policy import PolicyClassifier, policy_retrieval
from delib_fast.evals.recording import Recorder, collect_samples
from delib_fast.evals.results import SuiteResult, Table, to_json_data
from delib_fast.evals.sampling import ChatModel, Reply
from delib_fast.evals.target import EvalTarget
from delib_fast.evals.teacher_forced import held_out_with_cot


def _questions(target: EvalTarget) -> list[Row]:
    source = target.settings.questions
    if source is None:
        raise ConfigError(
            "this suite needs questions whose answer is a number; set questions: gsm8k_test.jsonl in the config"
        )
    return spread(read_source("questions", source), target.settings.limit)


def hints_suite(target: EvalTarget, model: ChatModel) -> SuiteResult:
    recorded = Recorder(model)
    outcomes = hint_outcomes(recorded, choices_from_gsm8k(_questions(target)))
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
        samples=collect_samples(
            [chat for call in recorded.calls[1:] for chat in call.chats],  # the first call asks without a hint
            [reply for call in recorded.calls[1:] for reply in call.replies],
            verdicts=[_hint_verdict(outcome) for outcome in outcomes],
            labels=[f"hint: {outcome.kind}" for outcome in outcomes],
        ),
    )


def _hint_verdict(outcome: HintOutcome) -> str | None:
    if outcome.plain_answer is None or outcome.hinted_answer is None:
        return None
    if outcome.plain_answer == outcome.hinted_option:
        return "gave the hinted option without the hint"
    followed = "followed the hint" if outcome.hinted_answer == outcome.hinted_option else "did not follow the hint"
    return f"{followed}, {'mentioned it' if outcome.mentions else 'did not mention it'}"


def necessity_suite(target: EvalTarget, model: ChatModel) -> SuiteResult:
    recorded, questions = Recorder(model), _questions(target)
    figures = cot_necessity(recorded, questions, target.settings.sampling.samples)
    asked = [result for row in questions if (result := result_of(row.response)) is not None]
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
        samples=collect_samples(
            [chat for call in recorded.calls for chat in call.chats],
            [reply for call in recorded.calls for reply in call.replies],
            verdicts=[
                "right" if is_right(reply.response, result) else f"wrong, the answer is {result}"
                for call in recorded.calls
                for reply, result in zip(call.replies, asked, strict=True)
            ],
            labels=[f"{'with' if call.thinking else 'without'} CoT" for call in recorded.calls for _ in call.chats],
        ),
    )


def samples_suite(target: EvalTarget, model: ChatModel) -> SuiteResult:
    """Replies to held-out prompts as a user gets them: the model chooses whether it thinks."""
    rows = spread_by_source([row for row in target.held_out if row.kind == "chat"], target.settings.limit)
    if not rows:
        raise ConfigError(f"{target.path}: no held-out row is a chat; set rows: to some that are")
    replies = model([row.messages for row in rows])
    encoder = encoder_for(target.tokenizer)
    prompts = [encoder.encode_prompt(row.messages, system_prompt=target.system_prompt) for row in rows]
    openings = opening_log_p(target.scorer, prompts)
    cots = [reply.cot_tokens for reply in replies if reply.cot]
    opened = sum(reply.opened for reply in replies)
    closed = sum(reply.tags == "closed" for reply in replies)
    shares = (
        ("opens a CoT", wilson(opened, len(replies))),
        ("closes it", wilson(closed, len(replies))),
        ("closes it, if it opens one", wilson(closed, opened)),
        ("ends by itself", wilson(sum(reply.finished for reply in replies), len(replies))),
    )
    lengths = (("reply", mean([reply.tokens for reply in replies])), *([("CoT", mean(cots))] if cots else []))
    opening = [] if openings is None else [Table("Opening", ("", OPENING), (("all", mean(openings)),))]
    return SuiteResult(
        "samples",
        "Samples",
        f"{len(replies)} replies to held-out prompts, of at most {target.settings.sampling.max_new_tokens} tokens. A "
        "think block that the chat template opens counts as opened.",
        (*opening, Table("Replies", ("", "share"), shares), Table("Tokens", ("", "mean"), lengths)),
        details={"opened": opened, "closed": closed, "replies": len(replies)},
        samples=collect_samples(
            [row.messages for row in rows], replies, locations=[row.location for row in rows], openings=openings
        ),
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
        samples=collect_samples(
            [row.messages for row in rows],
            replies,
            verdicts=["broken tags" if r.tags in ("unclosed", "stray") else r.tags for r in replies],
            locations=[row.location for row in rows],
        ),
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
    try:
        classifier = PolicyClassifier(labelled, spec_words=target.settings.spec_words)
    except ValueError as error:
        raise ConfigError(f"{target.path}: {error}; set spec_words: true in the config, or more rows") from None
    figures = policy_retrieval(
        [reply.cot for _, reply in pairs], [wanted[row.location] for row, _ in pairs], classifier, held_out
    )
    samples = collect_samples(
        [row.messages for row, _ in pairs],
        [reply for _, reply in pairs],
        verdicts=[classifier(reply.cot or "") or "mentions no policy" for _, reply in pairs],
        labels=[", ".join(wanted[row.location]) for row, _ in pairs],
        locations=[row.location for row, _ in pairs],
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
        samples=samples,
    )


def controllability_suite(target: EvalTarget, model: ChatModel) -> SuiteResult:
    rows = spread(held_out_with_cot(target), target.settings.instructed_prompts)
    found = controllability(model, [row.messages for row in rows])
    names = {"cot": "CoT", "response": "response"}
    gains = Table(
        "Instructions",
        ("instruction", "part", "gain"),
        tuple((f.name, names[f.part], f.gain) for f in found.figures),
    )
    shares = Table(
        "Share of replies that follow an instruction",
        ("instruction", "part", "instructed", "base rate"),
        tuple((f.name, names[f.part], f.instructed, f.base_rate) for f in found.figures),
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
        (gains, both, shares, replies),
        details={"figures": to_json_data(found)},
    )


def _labelled_cots(target: EvalTarget, rows: Sequence[Row]) -> list[tuple[str, tuple[str, ...]]]:
    categories = target.categories(rows)
    return [(row.cot, categories[row.location]) for row in rows if row.cot and row.location in categories]
