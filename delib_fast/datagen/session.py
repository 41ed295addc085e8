"""A session: what the pipelines for rows and documents share in one run, such as the client, the spec and the files."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from delib_fast.config.yaml_text import dump_yaml
from delib_fast.datagen.answers import Answer
from delib_fast.datagen.backends import Backend, NoAnswer
from delib_fast.datagen.client import Client, Endpoint, for_each
from delib_fast.datagen.parsing import MalformedAnswer, strip_thinking
from delib_fast.datagen.progress import MADE, Meter
from delib_fast.datagen.prompt_files import Chat, PromptFiles
from delib_fast.datagen.request_log import RequestLog, WriteError, lock_folder
from delib_fast.datagen.settings import EndpointSettings, RunSettings
from delib_fast.datagen.spec import Section, Spec, first_sentence
from delib_fast.datagen.spending import YieldCheck
from delib_fast.digests import seal
from delib_fast.files import write_atomic
from delib_fast.redaction import redact

T = TypeVar("T")
_SHORT_SECTION_WORDS = 30  # a section of at most this many words is its own summary


class Session:
    """One run on one folder. Create it with `async with Session.open(...)`."""

    def __init__(self, out: Path, spec: Spec, settings: RunSettings, client: Client, log: RequestLog) -> None:
        self.out, self.spec, self.settings, self.client, self.log = out, spec, settings, client, log
        self.meter = client.meter
        self.prompts = PromptFiles(
            settings.prompts, model_name=settings.model_name, provider_name=settings.provider_name
        )
        self.generator: Endpoint = client.endpoint(settings.generator)
        self.judge: Endpoint = client.endpoint(settings.judge_or_generator())
        self.summaries: dict[str, str] = {}

    @staticmethod
    @contextlib.asynccontextmanager
    async def open(
        out: Path,
        spec: Spec,
        settings: RunSettings,
        *,
        meter: Meter | None = None,
        make_backend: Callable[[EndpointSettings], Backend] | None = None,
    ) -> AsyncIterator[Session]:
        """Lock the folder `out`, and open its request log. Both are released at the end of the block, also on errors.

        Raises ConfigError if the folder is in use or cannot be written, or its log is damaged; WriteError if a file
        cannot be written. An error in the block is never replaced by one that follows from closing.
        """
        async with contextlib.AsyncExitStack() as stack:
            lock = lock_folder(out)
            stack.callback(lock.release)
            log = RequestLog(out / "requests.jsonl")
            stack.push(_closing(log))
            meter = meter or Meter()
            meter.log = log
            stack.callback(meter.stop)
            client = Client(
                log,
                meter,
                max_cost=settings.max_cost,
                max_paid_tokens=settings.max_paid_tokens,
                yield_check=YieldCheck(meter, log.totals, settings.probe_size, settings.least_yield),
                make_backend=make_backend,
            )
            session = Session(out, spec, settings, client, log)
            await stack.enter_async_context(client.running())
            session.write_settings()
            yield session

    # --- requests -------------------------------------------------------------------------------------------

    async def ask_with_retry(
        self, endpoint: Endpoint, chat: Chat, parse: Callable[[Answer], T], *, purpose: str, first_sample: int = 0
    ) -> tuple[T, list[str]]:
        """Call `Endpoint.ask_with_retry` with `list_attempts` attempts. A truncated answer counts as malformed."""

        def parse_whole(answer: Answer) -> T:
            if answer.truncated:
                raise MalformedAnswer("the answer was cut off at the token limit")
            return parse(answer)

        attempts = self.settings.list_attempts
        try:
            found = await endpoint.ask_with_retry(
                chat, parse_whole, purpose=purpose, attempts=attempts, first_sample=first_sample
            )
        except NoAnswer:
            self.meter.share(f"answers for {purpose!r}", False)
            raise
        self.meter.share(f"answers for {purpose!r}", True)
        return found

    async def for_each(self, items: Iterable[T], work: Callable[[T], Awaitable[Any]]) -> None:
        """Await `work(item)` for every item, with enough items in progress to keep the endpoints busy."""
        limits = {id(e): e.settings.concurrency for e in (self.generator, self.judge)}
        await for_each(items, work, self.client, concurrency=2 * sum(limits.values()))

    async def probe_first(self, items: Sequence[T], work: Callable[[T], Awaitable[Any]], *, probe_items: int) -> None:
        """Await `work(item)` for every item; for the first `probe_items` before the others, to report their yield."""
        await self.for_each(items[:probe_items], work)
        if len(items) > probe_items:
            self.print_yield()
        await self.for_each(items[probe_items:], work)

    def print_yield(self) -> None:
        """Print how many of the first samples or documents are usable, and what they cost; not if nothing was paid."""
        check = self.client.yield_check
        made = self.meter.shares.get(MADE)
        if made is not None and check is not None and self.meter.answers:
            self.meter.print(f"{made.usable} of the first {made.total} are usable; {check.figures()}")

    async def summarize(self) -> None:
        """Set `summaries`, one sentence per section, by section id. A short section is its own summary."""
        sections = self.spec.sections
        if self.settings.summaries == "first_sentence":
            self.summaries = {s.id: first_sentence(s) for s in sections}
            return
        self.meter.start("summaries", len(sections))
        await self.for_each(sections, self._summarize_one)
        # A section without a summary from the model is represented by its first sentence.
        self.summaries = {s.id: self.summaries.get(s.id) or first_sentence(s) for s in sections}

    async def _summarize_one(self, section: Section) -> None:
        body = re.sub(r"^#+.*\n?|[*`]|^\d+[.)]\s+", "", section.text, flags=re.MULTILINE)
        if len(body.split()) <= _SHORT_SECTION_WORDS:
            self.summaries[section.id] = " ".join(body.split()) or section.title
        else:
            chat = self.prompts.chat(
                "summarize", title=" › ".join((*section.path, section.title)), section=section.text
            )
            try:
                self.summaries[section.id], _ = await self.ask_with_retry(
                    self.generator, chat, _parse_summary, purpose="summarize"
                )
            except NoAnswer as error:
                self.meter.drop("no_summary", str(error))
        self.meter.advance()

    def summary_lines(self) -> str:
        """Return one line per section: its id, title and summary."""
        return "\n".join(f"- {s.id} ({s.title}): {self.summaries[s.id]}" for s in self.spec.sections)

    # --- files ----------------------------------------------------------------------------------------------

    def write_settings(self) -> None:
        """Write settings.yaml, without secrets."""
        self.write("settings.yaml", dump_yaml(redact(self.settings.model_dump(mode="json"))))

    def write(self, name: str, text: str) -> Path:
        """Write a file in the folder atomically. Returns its path. Raises WriteError if that fails."""
        path = self.out / name
        try:
            write_atomic(path, text)
        except OSError as error:
            raise WriteError(path, error) from None
        return path

    def write_rows(self, name: str, rows: Iterable[Mapping[str, Any]]) -> Path:
        """Write a JSONL file in the folder."""
        return self.write(name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def write_summary(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Write summary.json, with a digest: these fields, the counts of dropped rows, and the cost of the answers."""
        totals, meter = self.log.totals, self.meter
        summary = {
            **fields,
            "spec_sha256": self.spec.sha256,
            "dropped": dict(meter.dropped.most_common()),
            "paid": {
                "answers": totals.answers,
                "prompt_tokens": totals.prompt_tokens,
                "completion_tokens": totals.completion_tokens,
                "cost": totals.cost,
                "answers_without_usage": totals.without_usage,
                "at_most": totals.at_most.record(),
                "by_purpose": totals.by_purpose,
            },
            "failed_attempts": dict(totals.failed.most_common()),
            "usable": {what: asdict(share) for what, share in meter.shares.items()},
            "usable_tokens": meter.kept_tokens,
            "first_drop": meter.first_drop,
            "this_run": {"answers": meter.answers, "reused": meter.reused, "retries": dict(meter.retries)},
        }
        self.write("summary.json", seal(summary, indent=1) + "\n")
        return summary


def _closing(log: RequestLog) -> Callable[..., None]:
    """An exit callback that closes the log. Its error is raised unless there is one already, which gets a note."""

    def close(kind: Any, error: BaseException | None, traceback: Any) -> None:
        try:
            log.close()
        except WriteError as fault:
            if error is None:
                raise
            error.add_note(str(fault))

    return close


def _parse_summary(answer: Answer) -> str:
    text = " ".join(strip_thinking(answer.text).split())
    if not 3 <= len(text.split()) <= 80:
        raise MalformedAnswer("a summary has 3 to 80 words")
    return text
