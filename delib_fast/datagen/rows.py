"""`delib-fast deliberate`: rows of prompt, CoT and response, generated with a spec in the context but not in the rows.

    prompt ──spec guard, duplicates──▶ classify ──▶ n × (generate ──▶ format filter ──▶ judge k times, min)
           ──▶ threshold ──▶ best of n ──▶ duplicates ──▶ strip ──▶ rows.jsonl ──read back──▶ spec guard

Every answer is in the request log before it is used, so the rows are a function of the log and the settings. To resume
a run, or to try another threshold, run the command again on the same folder.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from delib_fast.datagen.answers import Answer, estimated_tokens
from delib_fast.datagen.backends import NoAnswer
from delib_fast.datagen.citations import labels_of_spec
from delib_fast.datagen.dedup import NearDuplicates, text_key
from delib_fast.datagen.filters import format_fault
from delib_fast.datagen.judge import Judgement, judge_row
from delib_fast.datagen.parsing import MalformedAnswer, json_values, split_answer
from delib_fast.datagen.prompt_files import quoted
from delib_fast.datagen.session import Session
from delib_fast.datagen.settings import DeliberateSettings
from delib_fast.datagen.spec_leak import SpecGuard
from delib_fast.datagen.stopping import LowYield
from delib_fast.datagen.user_prompts import UserPrompt, generate_prompts, read_prompts

_MAX_CATEGORIES = 4


@dataclass
class Sample:
    """One generated answer and its outcome."""

    prompt: UserPrompt
    number: int
    categories: Sequence[str]
    request_ids: list[str]
    cot: str | None = None
    response: str | None = None
    served_by: str = ""
    judgement: Judgement = field(default_factory=Judgement)
    answer: str = ""
    """The answer that could not be split or used, if there is one."""
    dropped: str | None = None
    """Why it was dropped; None if it is kept."""
    detail: str = ""
    """More about why it was dropped."""

    @property
    def tokens(self) -> int:
        """An estimate of the tokens of CoT and response."""
        return estimated_tokens(f"{self.cot}{self.response}")


async def generate_rows(session: Session, settings: DeliberateSettings, prompts_file: Path | None) -> dict[str, Any]:
    """Generate rows into the session's folder.

    Args:
        prompts_file: see `read_prompts`; None to use only prompts generated from the spec (`prompts_from_spec`).
    Returns:
        The summary, which is also written to summary.json.
    Raises:
        ConfigError: a prompt in the file is not valid.
        SpecLeakError: a generated row contains text of the spec in its prompt.
    """
    prompts = [] if prompts_file is None else read_prompts(prompts_file, session.spec)
    by_section = settings.classify == "model" or settings.prompts_from_spec is not None
    if by_section or any(prompt.categories for prompt in prompts):
        await session.summarize()
    if settings.prompts_from_spec is not None:
        prompts += await generate_prompts(session, settings, settings.prompts_from_spec)
    guard = SpecGuard(session.spec, words=settings.guard_words)
    prompts, filtered = _filter_prompts(session, settings, prompts, guard)
    generator = _RowGenerator(session, settings)
    session.meter.start("prompts done", len(prompts))
    try:
        await session.probe_first(prompts, generator.run, probe_items=math.ceil(settings.probe_size / settings.samples))
    except LowYield:
        _write_dropped(session, [*filtered, *(s for own in generator.samples.values() for s in own)])
        raise
    session.meter.stop()
    samples = [sample for prompt in prompts for sample in generator.samples.get(prompt.id, ())]
    kept = _drop_duplicates(session, settings, samples)
    _write_dropped(session, [*filtered, *samples])
    return _write(session, settings, kept, samples, prompts, guard)


def _filter_prompts(
    session: Session, settings: DeliberateSettings, prompts: Sequence[UserPrompt], guard: SpecGuard
) -> tuple[list[UserPrompt], list[Sample]]:
    """Drop near-duplicate prompts, and prompts that contain text of the spec, before any answer is paid for.

    Returns the usable prompts, and a sample without an answer for each of the others.
    """
    seen = NearDuplicates(settings.near_duplicate_prompt)
    usable, filtered = [], []
    for prompt in prompts:
        reason = ""
        if any(guard.find_leak(turn["content"]) for turn in prompt.turns):
            reason = "spec_in_prompt"
        elif seen.find_or_add(prompt.id, prompt.conversation) is not None:
            reason = "duplicate_prompt"
        if reason:
            session.meter.drop(reason)
            filtered.append(Sample(prompt, 0, prompt.categories, list(prompt.request_ids), dropped=reason))
        else:
            usable.append(prompt)
    session.write_rows(
        "prompts.jsonl",
        (
            {
                "prompt_id": p.id,
                **_prompt_fields(p),
                "category": list(p.categories),
                "place": p.location,
                **p.generated_for,
            }
            for p in usable
        ),
    )
    return usable, filtered


class _RowGenerator:
    """Generates and judges the samples of prompts, and collects them in `samples` by the id of the prompt."""

    def __init__(self, session: Session, settings: DeliberateSettings) -> None:
        self.session, self.settings, self.labels = session, settings, labels_of_spec(session.spec)
        self.samples: dict[str, list[Sample]] = {}

    async def run(self, prompt: UserPrompt) -> None:
        """Generate, judge and select the samples of a prompt."""
        session, settings = self.session, self.settings
        try:
            categories, request_ids = await self._classify(prompt)
        except NoAnswer as error:
            sample = Sample(prompt, 0, (), [*prompt.request_ids, *error.request_ids], answer=error.text)
            sample.dropped, sample.detail = error.reason, str(error)
            samples = [sample]
        else:
            spec = session.spec
            spec_text = spec.for_categories(categories, session.summaries) if categories else spec.text
            samples = await asyncio.gather(
                *(
                    self._sample(prompt, number, categories, spec_text, [*prompt.request_ids, *request_ids])
                    for number in range(settings.samples)
                )
            )
        _keep_best(samples, settings.best_of)
        for sample in samples:
            if sample.dropped is None:
                session.meter.keep(sample.tokens)
            else:
                session.meter.drop_made(sample.dropped, sample.detail)
        self.samples[prompt.id] = samples
        session.meter.advance()

    async def _classify(self, prompt: UserPrompt) -> tuple[list[str], list[str]]:
        """Return the ids of the sections that a prompt is about, and of the requests that determined them."""
        if prompt.categories or self.settings.classify == "none":
            return list(prompt.categories), []
        session = self.session
        known = {section.id for section in session.spec.sections}
        chat = session.prompts.chat(
            "classify", sections=session.summary_lines(), conversation=quoted("conversation", prompt.conversation)
        )

        def parse(answer: Answer) -> list[str]:
            for value in json_values(answer.text, dict):
                names = value.get("categories")
                if isinstance(names, list):
                    named = [name for name in dict.fromkeys(map(str, names)) if name in known]
                    if named:
                        return named[:_MAX_CATEGORIES]
            raise MalformedAnswer("it names no section of the spec")

        return await session.ask_with_retry(session.generator, chat, parse, purpose="classify")

    async def _sample(
        self, prompt: UserPrompt, number: int, categories: Sequence[str], spec_text: str, request_ids: list[str]
    ) -> Sample:
        session, settings = self.session, self.settings
        chat = session.prompts.chat(
            f"generate_{settings.style}",
            spec=spec_text,
            answer_form=session.prompts.fragment(f"answer_form_{settings.cot_from}"),
            conversation=quoted("conversation", prompt.conversation),
        )
        sample = Sample(prompt, number, categories, list(request_ids))
        try:
            answer = await session.generator.ask(chat, purpose="generate", sample=number)
            sample.request_ids.append(answer.request_id)
            sample.served_by = answer.served_by
            parts = split_answer(answer, settings.cot_from)
            sample.cot, sample.response = parts.cot, parts.response
            if parts.cot is None or parts.response is None:
                sample.answer = answer.text
            sample.dropped = format_fault(answer, parts, settings, self.labels, prompt.conversation)
            if sample.dropped is None:
                assert parts.cot is not None
                assert parts.response is not None
                sample.judgement = await judge_row(
                    session,
                    settings,
                    spec_text=spec_text,
                    conversation=prompt.conversation,
                    cot=parts.cot,
                    response=parts.response,
                )
                sample.request_ids += sample.judgement.request_ids
                if below := sample.judgement.below(settings.thresholds()):
                    sample.dropped = f"low_{below[0]}"
        except NoAnswer as error:
            sample.dropped, sample.detail = error.reason, str(error)
            sample.request_ids += error.request_ids
            sample.answer = sample.answer or error.text
        return sample


def _keep_best(samples: Sequence[Sample], best_of: int | None) -> None:
    """Keep the `best_of` samples of a prompt with the highest minimum score, then the highest sum; drop the others."""
    passed = [s for s in samples if s.dropped is None]
    passed.sort(key=lambda s: (-s.judgement.scores["min"], -sum(s.judgement.scores.values()), s.number))
    for sample in passed[best_of:] if best_of is not None else ():
        sample.dropped = "not_best"


def _drop_duplicates(session: Session, settings: DeliberateSettings, samples: Sequence[Sample]) -> list[Sample]:
    """Drop samples with an equal answer, and near-duplicates of prompt, CoT and response together."""
    seen = NearDuplicates(settings.near_duplicate)
    answers: set[bytes] = set()
    kept = []
    for sample in samples:
        if sample.dropped is not None:
            continue
        answer = text_key(f"{sample.cot}\n{sample.response}")
        if answer in answers or seen.find_or_add("", f"{sample.prompt.conversation}\n{sample.cot}\n{sample.response}"):
            sample.dropped = "duplicate"
            session.meter.drop_kept("duplicate", sample.tokens)
        else:
            answers.add(answer)
            kept.append(sample)
    return kept


# --- writing --------------------------------------------------------------------------------------------------


def _write(
    session: Session,
    settings: DeliberateSettings,
    kept: Sequence[Sample],
    samples: Sequence[Sample],
    prompts: Sequence[UserPrompt],
    guard: SpecGuard,
) -> dict[str, Any]:
    rows = [_row(session, settings, sample) for sample in kept]
    prompt_texts = {prompt.id: prompt.text for prompt in prompts}
    files = {"rows.jsonl": rows}
    if settings.also_no_cot:
        files["rows_no_cot.jsonl"] = [_without_cot(row) for row in rows]
    checks = {}
    for name, content in files.items():
        # The guard checks the file on disk, so the file only gets its final name after the check.
        unchecked = session.write_rows(f"{name}.unchecked", content)
        checks[name] = guard.check_file(unchecked, prompt_texts)
        unchecked.replace(session.out / name)
    return session.write_summary(
        {
            "command": "deliberate",
            "rows": len(rows),
            "prompts": len(prompts),
            "samples": len(samples),
            "style": settings.style,
            "guard": checks,
            "prompt_files": _prompt_versions(session, settings),
        }
    )


def _write_dropped(session: Session, samples: Sequence[Sample]) -> None:
    """Write dropped.jsonl: each dropped sample with its texts, the reason, and the requests that led to it."""
    session.write_rows(
        "dropped.jsonl",
        (
            {
                "prompt_id": s.prompt.id,
                "reason": s.dropped,
                "detail": s.detail,
                "sample": s.number,
                **_prompt_fields(s.prompt),
                "cot": s.cot,
                "response": s.response,
                "answer": s.answer,
                "category": list(s.categories),
                "votes": s.judgement.votes,
                "request_ids": s.request_ids,
            }
            for s in samples
            if s.dropped is not None
        ),
    )


def _row(session: Session, settings: DeliberateSettings, sample: Sample) -> dict[str, Any]:
    versions = _prompt_versions(session, settings)
    generator, judge = settings.generator, settings.judge_or_generator()
    return {
        **_prompt_fields(sample.prompt, reply=sample),
        "cot": sample.cot,
        "response": sample.response,
        "category": list(sample.categories),
        "style": settings.style,
        "spec_sha256": session.spec.sha256,
        "scores": sample.judgement.scores,
        "samples": {"number": sample.number, "of": settings.samples},
        "generator": {
            "model": generator.model,
            "served_by": sample.served_by,
            "prompts": {k: v for k, v in versions.items() if not k.startswith("judge")},
        },
        "judge": {
            "model": judge.model,
            "votes": sample.judgement.votes,
            "prompts": {k: v for k, v in versions.items() if k.startswith("judge")},
        },
        "request_ids": sample.request_ids,
        "prompt_id": sample.prompt.id,
        **({"made": dict(sample.prompt.generated_for)} if sample.prompt.generated_for else {}),
    }


def _prompt_fields(prompt: UserPrompt, reply: Sample | None = None) -> dict[str, Any]:
    """Return {"prompt"}, or {"messages"} for a chat; `reply` is appended to a chat as the last message."""
    if prompt.single:
        return {"prompt": prompt.turns[0]["content"]}
    turns: list[dict[str, Any]] = [dict(turn) for turn in prompt.turns]
    if reply is not None:
        turns.append({"role": "assistant", "reasoning_content": reply.cot, "content": reply.response})
    return {"messages": turns}


def _without_cot(row: Mapping[str, Any]) -> dict[str, Any]:
    copy = {key: value for key, value in row.items() if key != "cot"}
    if "messages" in copy:
        copy["messages"] = [{k: v for k, v in turn.items() if k != "reasoning_content"} for turn in copy["messages"]]
    return copy


def _prompt_versions(session: Session, settings: DeliberateSettings) -> dict[str, str]:
    """Return the version of each prompt file in use."""
    from_spec = ("domains", "situations", "user_messages") if settings.prompts_from_spec else ()
    summarize = ("summarize",) if settings.summaries == "model" else ()
    return session.prompts.versions(
        *from_spec,
        *summarize,
        *(("classify",) if settings.classify == "model" else ()),
        f"generate_{settings.style}",
        f"answer_form_{settings.cot_from}",
        "judge",
        f"judge_style_{settings.style}",
    )
