"""`delib-fast deliberate`: prompts and a spec in; rows of prompt, CoT and response, without the spec, out.

    prompt ──spec guard, duplicates──▶ classify ──▶ n × (generate ──▶ format filter ──▶ judge k times, min)
           ──▶ threshold ──▶ best of n ──▶ duplicates ──▶ strip ──▶ rows.jsonl ──read back──▶ spec guard

Every answer is in the ledger before it is used, so the rows are a function of the ledger and the settings: to go
on after a stop, or to try another threshold, is to run the same thing again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from delib_fast.datagen.citations import Label, labels_of_spec
from delib_fast.datagen.client import NoAnswer
from delib_fast.datagen.dedup import NearDuplicates, text_key
from delib_fast.datagen.filters import format_fault
from delib_fast.datagen.judge import Judgement, judge_row
from delib_fast.datagen.parsing import MalformedAnswer, json_values, part_answer
from delib_fast.datagen.prompt_files import quoted
from delib_fast.datagen.request_log import Answer
from delib_fast.datagen.session import Session
from delib_fast.datagen.settings import DeliberateSettings
from delib_fast.datagen.spec_leak import SpecGuard
from delib_fast.datagen.user_prompts import UserPrompt, make_prompts, read_prompts

_MOST_CATEGORIES = 4


@dataclass
class Sample:
    """One generated answer and what became of it."""

    prompt: UserPrompt
    number: int
    categories: Sequence[str]
    request_ids: list[str]
    cot: str | None = None
    response: str | None = None
    served_by: str = ""
    judgement: Judgement = field(default_factory=Judgement)
    dropped: str | None = None
    """The reason, or None while it stands."""


async def deliberate(shop: Session, settings: DeliberateSettings, prompts_file: Path | None) -> dict[str, Any]:
    """Make the rows of a folder. Returns the summary, which is also in summary.json."""
    await shop.summarize()
    prompts = await _prompts(shop, settings, prompts_file)
    guard = SpecGuard(shop.spec, words=settings.guard_words)
    wanted = _usable(shop, settings, prompts, guard)
    maker = _Maker(shop, settings, labels_of_spec(shop.spec))
    shop.meter.begin("prompts done", len(wanted))
    await shop.for_each(wanted, maker.one_prompt)
    shop.meter.end()
    samples = [sample for prompt in wanted for sample in maker.done.get(prompt.id, ())]
    kept = _without_duplicates(shop, settings, samples)
    return _write(shop, settings, kept, samples, wanted, guard)


async def _prompts(shop: Session, settings: DeliberateSettings, file: Path | None) -> list[UserPrompt]:
    prompts = [] if file is None else read_prompts(file, shop.spec)
    if settings.prompts_from_spec is not None:
        prompts += await make_prompts(shop, settings, settings.prompts_from_spec)
    return prompts


def _usable(
    shop: Session, settings: DeliberateSettings, prompts: Sequence[UserPrompt], guard: SpecGuard
) -> list[UserPrompt]:
    """Before anything is paid for: no repeated prompt, and none that brings spec text along."""
    seen = NearDuplicates(settings.near_duplicate_prompt)
    usable = []
    for prompt in prompts:
        if any(guard.leak(turn["content"]) for turn in prompt.turns):
            shop.meter.drop("spec_in_prompt")
        elif seen.find_or_add(prompt.id, prompt.conversation) is not None:
            shop.meter.drop("duplicate_prompt")
        else:
            usable.append(prompt)
    shop.write_rows(
        "prompts.jsonl",
        (
            {"prompt_id": p.id, **_prompt_fields(p), "category": list(p.categories), "place": p.location, **p.made}
            for p in usable
        ),
    )
    return usable


class _Maker:
    """From one prompt to its judged samples."""

    def __init__(self, shop: Session, settings: DeliberateSettings, labels: Sequence[Label]) -> None:
        self.shop, self.settings, self.labels = shop, settings, labels
        self.done: dict[str, list[Sample]] = {}

    async def one_prompt(self, prompt: UserPrompt) -> None:
        shop, settings = self.shop, self.settings
        try:
            categories, ids = await self._classify(prompt)
        except NoAnswer as error:
            samples = [Sample(prompt, 0, (), list(prompt.request_ids), dropped=error.reason)]
        else:
            spec_text = shop.spec.for_categories(categories, shop.summaries)
            samples = await asyncio.gather(
                *(
                    self._sample(prompt, number, categories, spec_text, [*prompt.request_ids, *ids])
                    for number in range(settings.samples)
                )
            )
        _best_of(samples, settings.best_of)
        for sample in samples:
            shop.meter.keep() if sample.dropped is None else shop.meter.drop(sample.dropped)
        self.done[prompt.id] = samples
        shop.meter.advance()

    async def _classify(self, prompt: UserPrompt) -> tuple[list[str], list[str]]:
        if prompt.categories:
            return list(prompt.categories), []
        known = {section.id for section in self.shop.spec.sections}
        chat = self.shop.prompts.chat(
            "classify", sections=self.shop.summary_lines(), conversation=quoted("conversation", prompt.conversation)
        )

        def read(answer: Answer) -> list[str]:
            for value in json_values(answer.text, dict):
                names = value.get("categories")
                if isinstance(names, list):
                    named = [name for name in dict.fromkeys(map(str, names)) if name in known]
                    if named:
                        return named[:_MOST_CATEGORIES]
            raise MalformedAnswer("names no section of the spec")

        return await self.shop.ask_with_retry(self.shop.generator, chat, read, purpose="classify")

    async def _sample(
        self, prompt: UserPrompt, number: int, categories: Sequence[str], spec_text: str, ids: list[str]
    ) -> Sample:
        shop, settings = self.shop, self.settings
        form = shop.prompts.fragment(f"answer_form_{settings.cot_from}")
        chat = shop.prompts.chat(
            f"generate_{settings.style}",
            spec=spec_text,
            answer_form=form,
            conversation=quoted("conversation", prompt.conversation),
        )
        sample = Sample(prompt, number, categories, list(ids))
        try:
            answer = await shop.generator.ask(chat, purpose="generate", sample=number)
            sample.request_ids.append(answer.request_id)
            sample.served_by = answer.served_by
            parted = part_answer(answer, settings.cot_from)
            sample.cot, sample.response = parted.cot, parted.response
            sample.dropped = format_fault(answer, parted, settings, self.labels, prompt.conversation)
            if sample.dropped is None:
                assert parted.cot is not None
                assert parted.response is not None
                sample.judgement = await judge_row(
                    shop,
                    settings,
                    spec_text=spec_text,
                    cot=parted.cot,
                    conversation=prompt.conversation,
                    response=parted.response,
                )
                sample.request_ids += sample.judgement.request_ids
                if below := sample.judgement.below(settings.thresholds()):
                    sample.dropped = f"low_{below[0]}"
        except NoAnswer as error:
            sample.dropped = error.reason
        return sample


def _best_of(samples: Sequence[Sample], best_of: int | None) -> None:
    """Keep the `best_of` samples of one prompt with the highest scores: by the lowest axis, then by the sum."""
    standing = [s for s in samples if s.dropped is None]
    standing.sort(key=lambda s: (-s.judgement.scores["min"], -sum(s.judgement.scores.values()), s.number))
    for sample in standing[best_of:] if best_of is not None else ():
        sample.dropped = "not_best"


def _without_duplicates(shop: Session, settings: DeliberateSettings, samples: Sequence[Sample]) -> list[Sample]:
    """Of rows that say the same, the first stays. Prompt, CoT and response are compared together."""
    seen = NearDuplicates(settings.near_duplicate)
    exact: set[bytes] = set()
    kept = []
    for sample in samples:
        if sample.dropped is not None:
            continue
        answer = text_key(f"{sample.cot}\n{sample.response}")
        if answer in exact or seen.find_or_add("", f"{sample.prompt.conversation}\n{sample.cot}\n{sample.response}"):
            sample.dropped = "duplicate"
            shop.meter.kept -= 1
            shop.meter.drop("duplicate")
        else:
            exact.add(answer)
            kept.append(sample)
    return kept


# --- writing --------------------------------------------------------------------------------------------------


def _write(
    shop: Session,
    settings: DeliberateSettings,
    kept: Sequence[Sample],
    samples: Sequence[Sample],
    prompts: Sequence[UserPrompt],
    guard: SpecGuard,
) -> dict[str, Any]:
    rows = [_row(shop, settings, sample) for sample in kept]
    given = {prompt.id: prompt.text for prompt in prompts}
    # The guard reads what is on disk, under a name that nobody takes for rows; only then is it rows.jsonl.
    written = {"rows.jsonl": rows}
    if settings.also_no_cot:
        written["rows_no_cot.jsonl"] = [_without_cot(row) for row in rows]
    proof = {}
    for name, content in written.items():
        unproven = shop.write_rows(f"{name}.unproven", content)
        proof[name] = guard.prove(unproven, given)
        unproven.replace(shop.out / name)
    shop.write_rows(
        "dropped.jsonl",
        (
            {
                "prompt_id": s.prompt.id,
                "reason": s.dropped,
                "sample": s.number,
                "category": list(s.categories),
                "votes": s.judgement.votes,
                "request_ids": s.request_ids,
            }
            for s in samples
            if s.dropped is not None
        ),
    )
    return shop.write_summary(
        {
            "command": "deliberate",
            "rows": len(rows),
            "prompts": len(prompts),
            "samples": len(samples),
            "style": settings.style,
            "guard": proof,
            "prompt_files": _prompt_versions(shop, settings),
        }
    )


def _row(shop: Session, settings: DeliberateSettings, sample: Sample) -> dict[str, Any]:
    versions = _prompt_versions(shop, settings)
    generator, judge = settings.generator, settings.judge_or_generator()
    return {
        **_prompt_fields(sample.prompt, reply=sample),
        "cot": sample.cot,
        "response": sample.response,
        "category": list(sample.categories),
        "style": settings.style,
        "spec_sha256": shop.spec.sha256,
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
        **({"made": dict(sample.prompt.made)} if sample.prompt.made else {}),
    }


def _prompt_fields(prompt: UserPrompt, reply: Sample | None = None) -> dict[str, Any]:
    """{"prompt"} or {"messages"}; a chat ends with the reply, as chat formats have it."""
    if prompt.single:
        return {"prompt": prompt.turns[0]["content"]}
    turns: list[dict[str, Any]] = [dict(turn) for turn in prompt.turns]
    if reply is not None:
        turns.append({"role": "assistant", "reasoning_content": reply.cot, "content": reply.response})
    return {"messages": turns}


def _without_cot(row: Mapping[str, Any]) -> dict[str, Any]:
    twin = {key: value for key, value in row.items() if key != "cot"}
    if "messages" in twin:
        twin["messages"] = [{k: v for k, v in turn.items() if k != "reasoning_content"} for turn in twin["messages"]]
    return twin


def _prompt_versions(shop: Session, settings: DeliberateSettings) -> dict[str, str]:
    made = ("domains", "situations", "user_messages") if settings.prompts_from_spec else ()
    summarize = ("summarize",) if settings.summaries == "model" else ()
    return shop.prompts.versions(
        *made,
        *summarize,
        "classify",
        f"generate_{settings.style}",
        f"answer_form_{settings.cot_from}",
        "judge",
        f"judge_style_{settings.style}",
    )
