"""`delib-fast document`: midtraining documents from a spec, stage by stage, up to a token budget (arXiv 2605.02087).

    spec ─▶ domains ─▶ subdomains ─▶ assertions, document types ─▶ ideas ─▶ documents [─▶ critique ─▶ rewrite]

Ideas and documents are generated in waves. The size of a wave is the remaining budget divided by the mean length of the
documents so far. A wave visits every subdomain once before it visits any again, so even a small budget covers many
subdomains. The same answers give the same documents, no matter how often the run was stopped.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from delib_fast.data.decontamination import words_of
from delib_fast.datagen.answers import Answer, clean_text, estimated_tokens, plausible_tokens
from delib_fast.datagen.backends import NoAnswer
from delib_fast.datagen.dedup import NearDuplicates
from delib_fast.datagen.filters import answer_fault, leaked_scaffolding
from delib_fast.datagen.parsing import MalformedAnswer, json_values, parse_strings, strip_thinking
from delib_fast.datagen.prompt_files import quoted
from delib_fast.datagen.session import Session
from delib_fast.datagen.settings import DocumentSettings

_FIRST_WAVE = 16  # documents in the first wave, which gives the first estimate of their mean length
_ASSUMED_TOKENS = 1000  # tokens per document, until there is a document


@dataclass(frozen=True)
class Subdomain:
    """A part of a domain of life, e.g. "rental law" of "housing"."""

    domain: str
    name: str

    def fields(self) -> dict[str, str]:
        """Return the fields of a row, which are also the placeholders of a prompt."""
        return {"domain": self.domain, "subdomain": self.name}


@dataclass
class SubdomainPlan:
    """What to write about in one subdomain."""

    assertions: tuple[str, ...]
    """Statements about the assistant's character."""
    document_types: tuple[str, ...]
    request_ids: list[str]
    ideas: dict[str, list[str]] = field(default_factory=dict)
    """The ideas so far, by document type."""


@dataclass(frozen=True)
class IdeaRequest:
    """A request for ideas: one document type of one subdomain. A round has each of them once."""

    subdomain: Subdomain
    type_number: int
    """Index into the document types of the subdomain's plan."""


@dataclass
class Document:
    """A document: planned (without text), written, or dropped."""

    subdomain: Subdomain
    document_type: str
    idea: str
    assertions: tuple[str, ...]
    request_ids: list[str]
    text: str = ""
    tokens: int = 0
    served_by: str = ""
    faults: list[str] | None = None
    """What the critique found; None if there was no critique."""
    dropped: str | None = None
    """Why it was dropped; None if it is kept."""
    detail: str = ""
    """More about why it was dropped."""


async def generate_documents(session: Session, settings: DocumentSettings) -> dict[str, Any]:
    """Generate documents into the session's folder.

    Returns the summary, which is also written to summary.json. Raises NoAnswer if there are no domains or subdomains.
    """
    generator = _DocumentGenerator(session, settings)
    await generator.plan()
    session.meter.start("documents", settings.tokens, "tokens")
    await generator.write_to_budget()
    session.meter.stop()
    return generator.finish()


class _DocumentGenerator:
    """The state of one run: the plan, and the documents so far."""

    def __init__(self, session: Session, settings: DocumentSettings) -> None:
        self.session, self.settings = session, settings
        self.emphasis = session.prompts.fragment(f"emphasis_{settings.emphasis}")
        self.subdomains: list[Subdomain] = []
        self.plans: dict[Subdomain, SubdomainPlan] = {}
        self.documents: list[Document] = []
        self.kept: list[Document] = []
        self.tokens = 0
        self._domain_request_ids: list[str] = []
        self._seen = NearDuplicates(settings.near_duplicate)

    # --- planning -------------------------------------------------------------------------------------------

    async def plan(self) -> None:
        """Request the domains and their subdomains, and shuffle the subdomains."""
        session, settings = self.session, self.settings
        domains, ids = await self._request_list("domains", spec=session.spec.text, count=settings.domains)
        self._domain_request_ids = ids
        session.write_rows("domains.jsonl", ({"domain": d, "request_ids": ids} for d in domains))
        found: dict[str, tuple[list[str], list[str]]] = {}

        async def request_subdomains(domain: str) -> None:
            try:
                found[domain] = await self._request_list(
                    "subdomains", spec=session.spec.text, domain=domain, count=settings.subdomains
                )
            except NoAnswer as error:
                session.meter.drop(error.reason, str(error))
            session.meter.advance()

        session.meter.start("subdomains", len(domains))
        await session.for_each(domains, request_subdomains)
        self.subdomains = [Subdomain(d, name) for d in domains for name in found.get(d, ([], []))[0]]
        if not self.subdomains:
            raise NoAnswer("malformed_subdomains", "the model listed no subdomains for any domain")
        session.write_rows(
            "subdomains.jsonl", ({**s.fields(), "request_ids": found[s.domain][1]} for s in self.subdomains)
        )
        random.Random(f"{settings.seed} places").shuffle(self.subdomains)

    async def _plan_subdomain(self, subdomain: Subdomain) -> None:
        """Request the assertions and document types of a subdomain, unless it has them already."""
        if subdomain in self.plans:
            return
        settings, where = self.settings, subdomain.fields()
        try:
            assertions, ids = await self._request_list(
                "assertions", spec=self.session.spec.text, emphasis=self.emphasis, count=settings.assertions, **where
            )
            types, more_ids = await self._request_list("document_types", count=settings.document_types, **where)
        except NoAnswer as error:
            self.session.meter.drop(error.reason, str(error))
        else:
            self.plans[subdomain] = SubdomainPlan(
                tuple(assertions), tuple(types[: settings.document_types]), [*ids, *more_ids]
            )

    def _idea_requests(self) -> Iterator[IdeaRequest]:
        """Yield every idea request: all subdomains, then the next document type, then the next round."""
        for _ in range(self.settings.rounds):
            for number in range(self.settings.document_types):
                for subdomain in self.subdomains:
                    yield IdeaRequest(subdomain, number)

    async def _request_list(self, name: str, **values: object) -> tuple[list[str], list[str]]:
        """Request a list of strings. Returns it, and the ids of the requests that were needed."""
        return await self.session.ask_with_retry(
            self.session.generator,
            self.session.prompts.chat(name, **values),
            lambda answer: parse_strings(answer.text),
            purpose=name,
        )

    # --- waves ----------------------------------------------------------------------------------------------

    async def write_to_budget(self) -> None:
        """Generate waves of ideas and documents until the token budget is reached, or the rounds are used up."""
        requests = self._idea_requests()
        while self.tokens < self.settings.tokens:
            missing = self.settings.tokens - self.tokens
            mean = self.tokens / len(self.kept) if self.kept else _ASSUMED_TOKENS
            wave = math.ceil(missing / mean)
            if not self.documents:
                wave = min(wave, _FIRST_WAVE)
            wave_requests = list(itertools.islice(requests, math.ceil(wave / self.settings.ideas)))
            if not wave_requests:
                self.session.meter.print(
                    f"no ideas are left after {self.settings.rounds} rounds: {self.tokens:,} of "
                    f"{self.settings.tokens:,} tokens; raise document_types, ideas or subdomains"
                )
                return
            documents = (await self._request_ideas(wave_requests))[:wave]
            first = not self.documents
            await self.session.for_each(documents, self._write_document)
            self._count(documents)
            if first and self.tokens < self.settings.tokens:
                self.session.print_yield()

    async def _request_ideas(self, requests: list[IdeaRequest]) -> list[Document]:
        """Send these requests. Returns the ideas in the order of the requests, each as a document without text."""
        found: dict[int, list[Document]] = {}

        async def request_ideas(item: tuple[int, IdeaRequest]) -> None:
            index, request = item
            plan = self.plans.get(request.subdomain)
            if plan is None or request.type_number >= len(plan.document_types):
                return
            document_type = plan.document_types[request.type_number]
            used = plan.ideas.setdefault(document_type, [])
            try:
                ideas, ids = await self._request_list(
                    "ideas",
                    **request.subdomain.fields(),
                    document_type=document_type,
                    assertions=_bullets(plan.assertions),
                    taken=_bullets(used[-30:]) or "none",
                    count=self.settings.ideas,
                )
            except NoAnswer as error:
                self.session.meter.drop(error.reason, str(error))
                return
            new = [idea for idea in ideas if idea not in used][: self.settings.ideas]
            used += new
            request_ids = [*self._domain_request_ids, *plan.request_ids, *ids]
            found[index] = [
                Document(request.subdomain, document_type, idea, plan.assertions, list(request_ids)) for idea in new
            ]

        # Plans first: two idea requests of a subdomain that planned it concurrently could get two different plans.
        await self.session.for_each(
            list(dict.fromkeys(request.subdomain for request in requests)), self._plan_subdomain
        )
        await self.session.for_each(list(enumerate(requests)), request_ideas)
        return [document for index in sorted(found) for document in found[index]]

    def _count(self, documents: list[Document]) -> None:
        """Drop the near-duplicates of a wave, count it, and write the files of every stage."""
        for document in documents:
            if document.dropped is None and self._seen.find_or_add("", document.text) is not None:
                document.dropped = "duplicate"
            if document.dropped is None:
                self.kept.append(document)
                self.tokens += document.tokens
                self.session.meter.keep(document.tokens)
            else:
                self.session.meter.drop_made(document.dropped, document.detail)
        self.documents += documents
        self._write_stages()

    # --- documents ------------------------------------------------------------------------------------------

    async def _write_document(self, document: Document) -> None:
        session = self.session
        chat = session.prompts.chat(
            "document",
            spec=session.spec.text,
            **document.subdomain.fields(),
            document_type=document.document_type,
            idea=document.idea,
            emphasis=self.emphasis,
            assertions=_bullets(document.assertions),
        )
        try:
            answer = await session.generator.ask(chat, purpose="document")
            self._set_text(document, answer)
            if self.settings.critique and document.dropped is None:
                await self._critique(document)
        except NoAnswer as error:
            document.dropped, document.detail = error.reason, str(error)
            document.request_ids += error.request_ids
        if document.dropped is None:
            session.meter.advance(document.tokens)

    def _set_text(self, document: Document, answer: Answer) -> None:
        """Set the text of a document from an answer, and drop the document if the text is unusable."""
        text = strip_thinking(answer.text).strip()
        document.request_ids.append(answer.request_id)
        document.text, document.served_by = text, answer.served_by
        with_thinking = answer.reasoning is not None or text != answer.text.strip()
        if answer.completion_tokens is None or with_thinking:
            document.tokens = estimated_tokens(text)  # the endpoint's count includes the thinking
        else:
            document.tokens = plausible_tokens(answer.completion_tokens, text)
        document.dropped = answer_fault(answer, text) or self._text_fault(text)

    def _text_fault(self, text: str) -> str | None:
        """Return the reason to drop a document with this text, or None."""
        words, name = words_of(text), words_of(self.settings.model_name)
        if leaked_scaffolding(text):
            return "leaked_scaffolding"
        if len(words) < self.settings.least_words:
            return "too_short"
        named = f" {' '.join(name)} " in f" {' '.join(words)} "
        return "not_named" if self.settings.must_name and not named else None

    async def _critique(self, document: Document) -> None:
        """Request a critique of a document, and a rewrite if the critique finds faults."""
        session = self.session
        common = {"spec": session.spec.text, "document": quoted("text", document.text), "emphasis": self.emphasis}
        chat = session.prompts.chat("critique", **common)
        document.faults, ids = await session.ask_with_retry(session.judge, chat, _parse_faults, purpose="critique")
        document.request_ids += ids
        if document.faults:
            rewrite = session.prompts.chat("rewrite", **common, faults=_bullets(document.faults))
            self._set_text(document, await session.generator.ask(rewrite, purpose="rewrite"))

    # --- writing --------------------------------------------------------------------------------------------

    def _write_stages(self) -> None:
        session, plans = self.session, [(s, self.plans[s]) for s in self.subdomains if s in self.plans]
        session.write_rows(
            "assertions.jsonl",
            ({**s.fields(), "assertions": p.assertions, "request_ids": p.request_ids} for s, p in plans),
        )
        session.write_rows(
            "document_types.jsonl",
            ({**s.fields(), "document_types": p.document_types, "request_ids": p.request_ids} for s, p in plans),
        )
        session.write_rows(
            "ideas.jsonl",
            (
                {
                    **d.subdomain.fields(),
                    "document_type": d.document_type,
                    "idea": d.idea,
                    "dropped": d.dropped,
                    **({} if d.dropped is None else {"detail": d.detail, "text": d.text}),
                    "request_ids": d.request_ids,
                }
                for d in self.documents
            ),
        )

    def finish(self) -> dict[str, Any]:
        """Write documents.jsonl, shuffled, and summary.json. Returns the summary."""
        settings, session = self.settings, self.session
        documents = list(self.kept)
        random.Random(f"{settings.seed} documents").shuffle(documents)
        versions = session.prompts.versions(
            "domains",
            "subdomains",
            "assertions",
            "document_types",
            "ideas",
            "document",
            f"emphasis_{settings.emphasis}",
            *(("critique", "rewrite") if settings.critique else ()),
        )
        session.write_rows(
            "documents.jsonl",
            (
                {
                    "text": d.text,
                    "source": d.document_type,
                    **d.subdomain.fields(),
                    "idea": d.idea,
                    "emphasis": settings.emphasis,
                    "tokens": d.tokens,
                    **({} if d.faults is None else {"critique": d.faults, "rewritten": bool(d.faults)}),
                    "spec_sha256": session.spec.sha256,
                    "generator": {"model": settings.generator.model, "served_by": d.served_by, "prompts": versions},
                    "request_ids": d.request_ids,
                }
                for d in documents
            ),
        )
        return session.write_summary(
            {
                "command": "document",
                "documents": len(documents),
                "tokens": self.tokens,
                "budget": settings.tokens,
                "emphasis": settings.emphasis,
                "places": len(self.subdomains),
                "prompt_files": versions,
            }
        )


def _bullets(items: tuple[str, ...] | list[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _parse_faults(answer: Answer) -> list[str]:
    for value in json_values(answer.text, dict):
        faults = value.get("faults")
        if isinstance(faults, list) and all(isinstance(fault, str) for fault in faults):
            return [clean_text(fault) for fault in faults if fault.strip()]
    raise MalformedAnswer('it contains no {"faults": […]}')
