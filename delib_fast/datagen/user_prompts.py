"""The input prompts of `deliberate`, read from a file or generated from the spec."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from delib_fast.config import ConfigError
from delib_fast.data.read.formats import CHAT_KEYS, PROMPT_KEYS
from delib_fast.data.read.messages import ROLES
from delib_fast.data.read.strict_json import decode
from delib_fast.data.rows import DataError
from delib_fast.datagen.answers import DAMAGED, clean_text
from delib_fast.datagen.backends import NoAnswer
from delib_fast.datagen.dedup import NearDuplicates
from delib_fast.datagen.parsing import parse_strings
from delib_fast.datagen.session import Session
from delib_fast.datagen.settings import DeliberateSettings
from delib_fast.datagen.spec import Spec
from delib_fast.files import read_text

_MESSAGES_PER_SITUATION = 4
_MAX_SITUATIONS = 12  # per domain and round
_DOMAINS = 10
_MAX_ROUNDS = 20


@dataclass(frozen=True)
class UserPrompt:
    """An input prompt: a text, or a chat that ends with a user or tool message."""

    turns: tuple[dict[str, str], ...]
    location: str
    """`file:line`, for error messages."""
    categories: tuple[str, ...] = ()
    single: bool = True
    """Whether the row has a "prompt" instead of "messages"."""
    generated_for: Mapping[str, str] = field(default_factory=dict)
    """Domain and situation of a prompt that was generated from the spec."""
    request_ids: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    @property
    def text(self) -> str:
        """The prompt as one string, to compare with what `spec_leak.prompt_text` reads from the row."""
        return (
            self.turns[0]["content"]
            if self.single
            else json.dumps(list(self.turns), ensure_ascii=False, sort_keys=True)
        )

    @property
    def conversation(self) -> str:
        """The prompt in readable form: the text itself, or the turns with their roles."""
        if self.single:
            return self.turns[0]["content"]
        return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in self.turns)


def read_prompts(path: str | os.PathLike[str], spec: Spec | None = None) -> list[UserPrompt]:
    """Read prompts from a .jsonl, .json, .csv (with a column "prompt") or .txt (one per line) file.

    A row is {"prompt" | "question" | "instruction"}, or {"messages"} that end with a user or tool message; a final
    reply is ignored. It may have a "category": the id or title of a section of the spec, or a list of them; without a
    spec, categories are ignored.

    Raises:
        ConfigError: the file cannot be read or is empty, or a row is not a prompt or has an unknown category; the
            message has `file:line`.
    """
    path = Path(path)
    try:
        text = read_text(path, encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the prompts cannot be read: {error}") from None
    prompts = []
    for location, item in _items(path, text):
        prompts.append(_prompt_of(item, location, spec))
    if not prompts:
        raise ConfigError(f"{path}: contains no prompt")
    return prompts


def _items(path: Path, text: str) -> list[tuple[str, Any]]:
    lines = [(f"{path}:{n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if path.suffix == ".txt":
        return [(location, {"prompt": line.strip()}) for location, line in lines]
    if path.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))
        try:
            return [(f"{path}:{reader.line_num}", {k: v for k, v in row.items() if k in PROMPT_KEYS}) for row in reader]
        except csv.Error as error:
            raise ConfigError(f"{path}:{reader.line_num}: {error}") from None
    if path.suffix == ".json":
        try:
            items = decode(text)
        except DataError as error:
            raise ConfigError(f"{path}: {error}") from None
        if not isinstance(items, list):
            raise ConfigError(f"{path}: is not a list of rows; write one object per line to a .jsonl file instead")
        return [(f"{path}[{i}]", item) for i, item in enumerate(items)]
    found = []
    for location, line in lines:
        try:
            found.append((location, decode(line)))
        except DataError as error:
            raise ConfigError(
                f"{location}: {error}; prompts are .jsonl, .json, .csv, or .txt with one per line"
            ) from None
    return found


def _prompt_of(item: Any, location: str, spec: Spec | None) -> UserPrompt:
    if not isinstance(item, dict):
        raise ConfigError(f"{location}: is not an object; a row has a 'prompt' or 'messages'")
    categories = () if spec is None else _categories(item.get("category"), location, spec)
    key = next((key for key in (*CHAT_KEYS, *PROMPT_KEYS) if key in item), None)
    if key is None:
        raise ConfigError(f"{location}: has none of {', '.join(map(repr, (*PROMPT_KEYS, 'messages')))}")
    value = item[key]
    if isinstance(value, str) and key in PROMPT_KEYS:
        if not value.strip():
            raise ConfigError(f"{location}: {key!r} is empty")
        _check_text(value, f"{location}: {key!r}")
        if not item.get("system"):
            return UserPrompt(({"role": "user", "content": value},), location, categories)
        value = [{"role": "system", "content": item["system"]}, {"role": "user", "content": value}]
    turns = _turns(value, key, location)
    return UserPrompt(turns, location, categories, single=len(turns) == 1)


def _turns(value: Any, key: str, location: str) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{location}: {key!r} must be a list of messages")
    turns = []
    for i, message in enumerate(value):
        role = ROLES.get(str(message.get("role", message.get("from"))).lower()) if isinstance(message, dict) else None
        content = message.get("content", message.get("value")) if isinstance(message, dict) else None
        if role is None or not isinstance(content, str):
            raise ConfigError(f"{location}: {key}[{i}] must have a role and a content that is a string")
        _check_text(content, f"{location}: {key}[{i}]")
        turns.append({"role": role, "content": content})
    if turns[-1]["role"] == "assistant":
        turns.pop()
    if not turns or turns[-1]["role"] not in ("user", "tool"):
        raise ConfigError(f"{location}: {key!r} must end with a user or tool message")
    return tuple(turns)


def _check_text(text: str, where: str) -> None:
    """Refuse characters that no JSON request and no row of training data can contain."""
    if clean_text(text) != text:
        raise ConfigError(f"{where} contains a NUL or half of a surrogate pair (\\ud800 to \\udfff); remove it")


def _categories(value: Any, location: str, spec: Spec) -> tuple[str, ...]:
    names = [value] if isinstance(value, str) else value
    if value is None:
        return ()
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{location}: 'category' must be a section's id, or a list of ids")
    found = []
    for name in names:
        section = spec.section(name)
        if section is None:
            known = ", ".join(s.id for s in spec.sections[:20])
            raise ConfigError(
                f"{location}: the spec has no section {name!r} (it has {known}); give one of these, or "
                "omit 'category' to let the model choose"
            )
        found.append(section.id)
    return tuple(dict.fromkeys(found))


# --- generated from the spec --------------------------------------------------------------------------------------


async def generate_prompts(session: Session, settings: DeliberateSettings, count: int) -> list[UserPrompt]:
    """Generate domains → situations → user messages, in rounds, up to `count` messages without near-duplicates.

    There are fewer if a round adds no new message, or after _MAX_ROUNDS rounds. Raises NoAnswer if no list of domains
    can be parsed.
    """
    domains, request_ids = await session.ask_with_retry(
        session.generator,
        session.prompts.chat("domains", spec=session.spec.text, count=_DOMAINS),
        lambda answer: parse_strings(answer.text, min_items=2),
        purpose="domains",
    )
    session.meter.start("prompts", count)
    seen = NearDuplicates(settings.near_duplicate_prompt)
    prompts: list[UserPrompt] = []
    used: dict[str, list[str]] = {domain: [] for domain in domains}
    for _ in range(_MAX_ROUNDS):
        missing = count - len(prompts)
        if missing <= 0:
            break
        per_domain = max(1, -(-missing // (_MESSAGES_PER_SITUATION * len(domains))))
        before = len(prompts)
        for prompt in await _one_round(session, domains, used, min(per_domain, _MAX_SITUATIONS), tuple(request_ids)):
            if len(prompts) < count and seen.find_or_add(prompt.id, prompt.text) is None:
                prompts.append(prompt)
                session.meter.advance()
        if len(prompts) == before:
            break  # the model only repeats itself
    return prompts


async def _one_round(
    session: Session, domains: list[str], used: dict[str, list[str]], per_domain: int, request_ids: tuple[str, ...]
) -> list[UserPrompt]:
    """Generate prompts for `per_domain` new situations of each domain, and add the situations to `used`."""
    found: dict[str, list[UserPrompt]] = {}

    async def one_domain(domain: str) -> None:
        earlier = "\n".join(f"- {s}" for s in used[domain][-40:]) or "none"
        chat = session.prompts.chat(
            "situations", sections=session.summary_lines(), domain=domain, taken=earlier, count=per_domain
        )
        try:
            situations, more_ids = await session.ask_with_retry(
                session.generator, chat, lambda answer: parse_strings(answer.text), purpose="situations"
            )
        except NoAnswer as error:
            session.meter.drop(error.reason, str(error))
            return
        found[domain] = []
        for situation in situations[:per_domain]:
            used[domain].append(situation)
            try:
                found[domain] += await _messages(session, domain, situation, (*request_ids, *more_ids))
            except NoAnswer as error:
                session.meter.drop(error.reason, str(error))

    await session.for_each(domains, one_domain)
    # In the order of the domains, not of arrival, so that the same answers give the same prompts.
    return [prompt for domain in domains for prompt in found.get(domain, ())]


async def _messages(session: Session, domain: str, situation: str, request_ids: tuple[str, ...]) -> list[UserPrompt]:
    chat = session.prompts.chat("user_messages", domain=domain, situation=situation, count=_MESSAGES_PER_SITUATION)
    texts, more_ids = await session.ask_with_retry(
        session.generator, chat, lambda answer: parse_strings(answer.text), purpose="user_messages"
    )
    return [
        UserPrompt(
            ({"role": "user", "content": text},),
            "made from the spec",
            generated_for={"domain": domain, "situation": situation},
            request_ids=(*request_ids, *more_ids),
        )
        for text in texts[:_MESSAGES_PER_SITUATION]
        if DAMAGED not in text
    ]
