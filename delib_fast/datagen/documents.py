"""`delib-fast document`: midtraining documents from a spec, stage by stage, to a budget of tokens (arXiv 2605.02087).

    spec ─▶ domains ─▶ subdomains ─▶ assertions, document types ─▶ ideas ─▶ documents [─▶ critique ─▶ rewrite]

Ideas and documents come in waves: each wave is as large as the budget that is left, by the mean length of the
documents so far, and goes round all subdomains before it comes back to one. So a small budget is spread as wide as a
large one, and the same answers make the same documents, however often the run was stopped.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from delib_fast.datagen.client import NoAnswer
from delib_fast.datagen.dedup import NearDuplicates, words_of
from delib_fast.datagen.filters import leaked_scaffolding, was_cut
from delib_fast.datagen.parsing import MalformedAnswer, after_thinking, json_values, read_strings
from delib_fast.datagen.prompt_files import quoted
from delib_fast.datagen.request_log import Answer
from delib_fast.datagen.session import Session
from delib_fast.datagen.settings import DocumentSettings

_FIRST_WAVE = 16  # documents, to learn how long they are
_GUESS_TOKENS = 1000


@dataclass(frozen=True)
class Place:
    domain: str
    subdomain: str


@dataclass
class Document:
    location: Place
    document_type: str
    idea: str
    assertions: tuple[str, ...]
    request_ids: list[str]
    text: str = ""
    tokens: int = 0
    served_by: str = ""
    faults: list[str] | None = None
    """What the critique found; None if there was none."""
    dropped: str | None = None


@dataclass
class _Ground:
    """What is known of one subdomain."""

    assertions: tuple[str, ...]
    types: tuple[str, ...]
    request_ids: list[str]
    taken: dict[str, list[str]] = field(default_factory=dict)


async def make_documents(shop: Session, settings: DocumentSettings) -> dict[str, Any]:
    """Make the documents of a folder. Returns the summary, which is also in summary.json."""
    maker = _Maker(shop, settings)
    await maker.plan()
    shop.meter.begin("documents", settings.tokens, "tokens")
    await maker.write_to_budget()
    shop.meter.end()
    return maker.finish()


class _Maker:
    def __init__(self, shop: Session, settings: DocumentSettings) -> None:
        self.shop, self.settings = shop, settings
        self.emphasis = shop.prompts.fragment(f"emphasis_{settings.emphasis}")
        self.locations: list[Place] = []
        self.plan_ids: list[str] = []
        self.grounds: dict[Place, _Ground] = {}
        self.documents: list[Document] = []
        self.kept: list[Document] = []
        self.tokens = 0
        self._seen = NearDuplicates(settings.near_duplicate)

    # --- where ----------------------------------------------------------------------------------------------

    async def plan(self) -> None:
        """Domains and subdomains."""
        shop, settings = self.shop, self.settings
        domains, self.plan_ids = await self._list("domains", spec=shop.spec.text, count=settings.domains)
        shop.write_rows("domains.jsonl", ({"domain": d, "request_ids": self.plan_ids} for d in domains))
        parts: dict[str, tuple[list[str], list[str]]] = {}

        async def one(domain: str) -> None:
            try:
                parts[domain] = await self._list(
                    "subdomains", spec=shop.spec.text, domain=domain, count=settings.subdomains
                )
            except NoAnswer as error:
                shop.meter.drop(error.reason)
            shop.meter.advance()

        shop.meter.begin("subdomains", len(domains))
        await shop.for_each(domains, one)
        self.locations = [Place(d, s) for d in domains for s in parts.get(d, ([], []))[0]]
        if not self.locations:
            raise NoAnswer("malformed_subdomains", "no domain could be cut into subdomains")
        shop.write_rows(
            "subdomains.jsonl",
            (
                {"domain": d, "subdomain": s, "request_ids": parts[d][1]}
                for d in domains
                if d in parts
                for s in parts[d][0]
            ),
        )
        random.Random(f"{settings.seed} places").shuffle(self.locations)

    def _slots(self) -> Iterator[tuple[Place, int, int]]:
        """(place, number of its document type, round): all places before the next type, all types before the next
        round."""
        for turn in range(self.settings.rounds):
            for number in range(self.settings.document_types):
                for location in self.locations:
                    yield location, number, turn

    # --- what -----------------------------------------------------------------------------------------------

    async def write_to_budget(self) -> None:
        slots = self._slots()
        while self.tokens < self.settings.tokens:
            left = self.settings.tokens - self.tokens
            mean = self.tokens / len(self.kept) if self.kept else _GUESS_TOKENS
            wave = math.ceil(left / mean)
            if not self.documents:
                wave = min(wave, _FIRST_WAVE)
            wanted = [slot for _, slot in zip(range(math.ceil(wave / self.settings.ideas)), slots, strict=False)]
            if not wanted:
                self.shop.meter.say(
                    f"no ideas are left after {self.settings.rounds} rounds: {self.tokens:,} of "
                    f"{self.settings.tokens:,} tokens; raise document_types, ideas or subdomains"
                )
                return
            jobs = (await self._ideas(wanted))[:wave]
            await self.shop.for_each(jobs, self._write_one)
            self._account(jobs)

    async def _ideas(self, slots: list[tuple[Place, int, int]]) -> list[Document]:
        """The ideas of these slots, in their order, each as a document to be written."""
        found: dict[int, list[Document]] = {}

        async def one(item: tuple[int, tuple[Place, int, int]]) -> None:
            at, (location, number, _) = item
            try:
                ground = await self._ground(location)
                if number >= len(ground.types):
                    return
                kind = ground.types[number]
                taken = ground.taken.setdefault(kind, [])
                ideas, ids = await self._list(
                    "ideas",
                    domain=location.domain,
                    subdomain=location.subdomain,
                    document_type=kind,
                    assertions=_bullets(ground.assertions),
                    taken=_bullets(taken[-30:]) or "none",
                    count=self.settings.ideas,
                )
            except NoAnswer as error:
                self.shop.meter.drop(error.reason)
                return
            fresh = [idea for idea in ideas if idea not in taken][: self.settings.ideas]
            taken += fresh
            found[at] = [
                Document(location, kind, idea, ground.assertions, [*self.plan_ids, *ground.request_ids, *ids])
                for idea in fresh
            ]

        # First the grounds: two slots of one place must not ask for them at once and get two different ones.
        await self.shop.for_each(list(dict.fromkeys(location for location, _, _ in slots)), self._ground_or_none)
        await self.shop.for_each(list(enumerate(slots)), one)
        return [document for at in sorted(found) for document in found[at]]

    async def _ground_or_none(self, location: Place) -> None:
        try:
            await self._ground(location)
        except NoAnswer as error:
            self.shop.meter.drop(error.reason)

    async def _ground(self, location: Place) -> _Ground:
        if location not in self.grounds:
            where = {"domain": location.domain, "subdomain": location.subdomain}
            settings = self.settings
            assertions, ids = await self._list(
                "assertions", spec=self.shop.spec.text, emphasis=self.emphasis, count=settings.assertions, **where
            )
            types, more = await self._list("document_types", count=settings.document_types, **where)
            self.grounds[location] = _Ground(tuple(assertions), tuple(types[: settings.document_types]), [*ids, *more])
        return self.grounds[location]

    async def _list(self, name: str, **values: object) -> tuple[list[str], list[str]]:
        return await self.shop.ask_with_retry(
            self.shop.generator,
            self.shop.prompts.chat(name, **values),
            lambda answer: read_strings(answer.text),
            purpose=name,
        )

    # --- the documents --------------------------------------------------------------------------------------

    async def _write_one(self, document: Document) -> None:
        shop = self.shop
        chat = shop.prompts.chat(
            "document",
            spec=shop.spec.text,
            domain=document.location.domain,
            subdomain=document.location.subdomain,
            document_type=document.document_type,
            idea=document.idea,
            emphasis=self.emphasis,
            assertions=_bullets(document.assertions),
        )
        try:
            answer = await shop.generator.ask(chat, purpose="document")
            self._take(document, answer)
            if self.settings.critique and document.dropped is None:
                await self._critique(document)
        except NoAnswer as error:
            document.dropped = error.reason
        if document.dropped is None:
            shop.meter.advance(document.tokens)

    def _take(self, document: Document, answer: Answer) -> None:
        """Make an answer the text of a document, or say why it can't be."""
        text = after_thinking(answer.text).strip()
        document.request_ids.append(answer.request_id)
        document.text, document.served_by = text, answer.served_by
        thought = answer.reasoning is not None or text != answer.text.strip()
        exact = answer.completion_tokens is not None and not thought
        document.tokens = answer.completion_tokens if exact else math.ceil(len(text) / 4)  # type: ignore[assignment]
        name = " ".join(words_of(self.settings.model_name))
        if was_cut(answer):
            document.dropped = "truncated"
        elif answer.finish == "content_filter":
            document.dropped = "content_filter"
        elif leaked_scaffolding(text):
            document.dropped = "leaked_scaffolding"
        elif len(words_of(text)) < self.settings.least_words:
            document.dropped = "too_short"
        elif self.settings.must_name and f" {name} " not in f" {' '.join(words_of(text))} ":
            document.dropped = "not_named"

    async def _critique(self, document: Document) -> None:
        shop = self.shop
        shown = quoted("text", document.text)
        chat = shop.prompts.chat("critique", spec=shop.spec.text, document=shown, emphasis=self.emphasis)
        document.faults, ids = await shop.ask_with_retry(shop.judge, chat, _read_faults, purpose="critique")
        document.request_ids += ids
        if document.faults:
            again = shop.prompts.chat(
                "rewrite", spec=shop.spec.text, document=shown, emphasis=self.emphasis, faults=_bullets(document.faults)
            )
            self._take(document, await shop.generator.ask(again, purpose="rewrite"))

    def _account(self, jobs: list[Document]) -> None:
        """Count a wave in the order of its jobs, near-duplicates aside, and put every stage on disk."""
        for document in jobs:
            if document.dropped is None and self._seen.find_or_add("", document.text) is not None:
                document.dropped = "duplicate"
            if document.dropped is None:
                self.kept.append(document)
                self.tokens += document.tokens
                self.shop.meter.keep()
            else:
                self.shop.meter.drop(document.dropped)
        self.documents += jobs
        self._write_stages()

    # --- writing --------------------------------------------------------------------------------------------

    def _write_stages(self) -> None:
        shop = self.shop
        for name in ("assertions", "types"):
            file = "assertions.jsonl" if name == "assertions" else "document_types.jsonl"
            shop.write_rows(
                file,
                (
                    {
                        "domain": location.domain,
                        "subdomain": location.subdomain,
                        file.removesuffix(".jsonl"): getattr(g, name),
                        "request_ids": g.request_ids,
                    }
                    for location, g in self.grounds.items()
                ),
            )
        shop.write_rows(
            "ideas.jsonl",
            (
                {
                    "domain": d.location.domain,
                    "subdomain": d.location.subdomain,
                    "document_type": d.document_type,
                    "idea": d.idea,
                    "dropped": d.dropped,
                    "request_ids": d.request_ids,
                }
                for d in self.documents
            ),
        )

    def finish(self) -> dict[str, Any]:
        settings, shop = self.settings, self.shop
        order = list(self.kept)
        random.Random(f"{settings.seed} documents").shuffle(order)
        versions = shop.prompts.versions(
            "domains",
            "subdomains",
            "assertions",
            "document_types",
            "ideas",
            "document",
            f"emphasis_{settings.emphasis}",
            *(("critique", "rewrite") if settings.critique else ()),
        )
        shop.write_rows(
            "documents.jsonl",
            (
                {
                    "text": d.text,
                    "source": d.document_type,
                    "domain": d.location.domain,
                    "subdomain": d.location.subdomain,
                    "idea": d.idea,
                    "emphasis": settings.emphasis,
                    "tokens": d.tokens,
                    **({} if d.faults is None else {"critique": d.faults, "rewritten": bool(d.faults)}),
                    "spec_sha256": shop.spec.sha256,
                    "generator": {"model": settings.generator.model, "served_by": d.served_by, "prompts": versions},
                    "request_ids": d.request_ids,
                }
                for d in order
            ),
        )
        return shop.write_summary(
            {
                "command": "document",
                "documents": len(order),
                "tokens": self.tokens,
                "budget": settings.tokens,
                "emphasis": settings.emphasis,
                "places": len(self.locations),
                "prompt_files": versions,
            }
        )


def _bullets(items: tuple[str, ...] | list[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _read_faults(answer: Answer) -> list[str]:
    for value in json_values(answer.text, dict):
        faults = value.get("faults")
        if isinstance(faults, list) and all(isinstance(fault, str) for fault in faults):
            return [fault for fault in faults if fault.strip()]
    raise MalformedAnswer('holds no {"faults": […]}')
