"""What rows and documents are both made with: the folder, the client, the spec and its summaries."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from delib_fast.config.load import redact
from delib_fast.datagen.backends import Backend, Secrets
from delib_fast.datagen.client import Client, Endpoint, NoAnswer, for_each
from delib_fast.datagen.filters import was_cut
from delib_fast.datagen.parsing import MalformedAnswer, after_thinking
from delib_fast.datagen.progress import Meter
from delib_fast.datagen.prompt_files import PromptFiles
from delib_fast.datagen.request_log import Answer, FolderLock, RequestLedger
from delib_fast.datagen.settings import EndpointSettings, RunSettings
from delib_fast.datagen.spec import Section, Spec, first_sentence

T = TypeVar("T")
_SHORT_SECTION_WORDS = 30


class Session:
    """One run on one folder. Use `async with Session.open(...)`."""

    def __init__(self, out: Path, spec: Spec, settings: RunSettings, client: Client, secrets: Secrets) -> None:
        self.out, self.spec, self.settings, self.client = out, spec, settings, client
        self.meter = client.meter
        self.prompts = PromptFiles(
            settings.prompts, model_name=settings.model_name, provider_name=settings.provider_name
        )
        self.generator: Endpoint = client.endpoint(settings.generator)
        self.judge: Endpoint = client.endpoint(settings.judge_or_generator())
        self.summaries: dict[str, str] = {}
        self._scrub = secrets.scrub

    @staticmethod
    @contextlib.asynccontextmanager
    async def open(
        out: Path,
        spec: Spec,
        settings: RunSettings,
        *,
        meter: Meter | None = None,
        backends: Callable[[EndpointSettings], Backend] | None = None,
    ) -> AsyncIterator[Session]:
        """Lock the folder, read its ledger, and see to it that both end well whatever happens between."""
        lock = FolderLock(out)
        secrets = Secrets()
        ledger = RequestLedger(out / "requests.jsonl", scrub=secrets.scrub)
        try:
            meter = meter or Meter()
            meter.ledger = ledger
            client = Client(ledger, meter, secrets, max_cost=settings.max_cost, backends=backends)
            shop = Session(out, spec, settings, client, secrets)
            async with client.running():
                try:
                    shop.write_settings()
                    yield shop
                finally:
                    meter.end()
        finally:
            ledger.close()
            lock.release()

    # --- asking ---------------------------------------------------------------------------------------------

    async def ask_with_retry(
        self,
        endpoint: Endpoint,
        chat: tuple[dict[str, str], ...],
        read: Callable[[Answer], T],
        *,
        purpose: str,
        first_sample: int = 0,
    ) -> tuple[T, list[str]]:
        """Ask until `read` accepts an answer; what it refuses (Malformed) is asked anew, as another sample.

        Returns: what was read, and the ids of every request it took. Raises: NoAnswer, reason `malformed_<purpose>`.
        """
        ids: list[str] = []
        fault: Exception | None = None
        for attempt in range(self.settings.list_attempts):
            answer = await endpoint.ask(chat, purpose=purpose, sample=first_sample + attempt)
            ids.append(answer.request_id)
            try:
                if was_cut(answer):
                    raise MalformedAnswer("the answer was cut at the limit of tokens")
                return read(answer), ids
            except MalformedAnswer as error:
                fault = error
        raise NoAnswer(f"malformed_{purpose}", f"{purpose}: {fault}")

    async def for_each(self, items: Iterable[T], work: Callable[[T], Any]) -> None:
        ends = {id(e): e.settings.concurrency for e in (self.generator, self.judge)}
        await for_each(items, work, self.client, at_once=2 * sum(ends.values()))

    async def summarize(self) -> None:
        """A short summary of each section; one that is short already is its own."""
        sections = self.spec.sections
        if self.settings.summaries == "first_sentence":
            self.summaries = {s.id: first_sentence(s) for s in sections}
            return
        self.meter.begin("summaries", len(sections))
        await self.for_each(sections, self._summarize_one)
        # A summary that could not be had is the opening sentence: the section stays in view.
        self.summaries = {s.id: self.summaries.get(s.id) or first_sentence(s) for s in sections}

    async def _summarize_one(self, section: Section) -> None:
        body = re.sub(r"^#+.*\n?|[*`]|^\d+[.)]\s+", "", section.text, flags=re.MULTILINE)
        if len(body.split()) <= _SHORT_SECTION_WORDS:
            self.summaries[section.id] = " ".join(body.split()) or section.title
        else:
            chat = self.prompts.chat(
                "summarize", title=" › ".join((*section.path, section.title)), section=section.text
            )
            with contextlib.suppress(NoAnswer):
                self.summaries[section.id], _ = await self.ask_with_retry(
                    self.generator, chat, _one_line, purpose="summarize"
                )
        self.meter.advance()

    def summary_lines(self) -> str:
        return "\n".join(f"- {s.id} ({s.title}): {self.summaries[s.id]}" for s in self.spec.sections)

    # --- writing --------------------------------------------------------------------------------------------

    def write_settings(self) -> None:
        tree = redact(self.settings.model_dump(mode="json"))
        self.write("settings.yaml", yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=110))

    def write(self, name: str, text: str) -> Path:
        """A file that is either the old one or the new one, never half of it."""
        path = self.out / name
        partial = path.with_name(f".{name}.partial")
        with partial.open("w", encoding="utf-8", errors="replace") as file:
            file.write(self._scrub(text))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        return path

    def write_rows(self, name: str, rows: Iterable[Mapping[str, Any]]) -> Path:
        return self.write(name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def write_summary(self, more: Mapping[str, Any]) -> dict[str, Any]:
        totals, meter = self.client.ledger.totals, self.meter
        summary = {
            **more,
            "spec_sha256": self.spec.sha256,
            "dropped": dict(meter.dropped.most_common()),
            "paid": {
                "answers": totals.answers,
                "prompt_tokens": totals.prompt_tokens,
                "completion_tokens": totals.completion_tokens,
                "cost": totals.cost,
                "answers_without_usage": totals.without_usage,
                "by_purpose": totals.by_purpose,
            },
            "this_run": {"answers": meter.answers, "reused": meter.reused, "retries": dict(meter.retries)},
        }
        self.write("summary.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
        return summary


def _one_line(answer: Answer) -> str:
    text = " ".join(after_thinking(answer.text).split())
    if not 3 <= len(text.split()) <= 80:
        raise MalformedAnswer("a summary is one sentence")
    return text
