"""The prompts that rows are made for: read from a file, or made from the spec alone."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from delib_fast.config import ConfigError
from delib_fast.data.read.formats import CHAT_KEYS, PROMPT_KEYS, ROLES
from delib_fast.data.read.strict_json import decode
from delib_fast.data.rows import DataError
from delib_fast.datagen.client import NoAnswer
from delib_fast.datagen.dedup import NearDuplicates
from delib_fast.datagen.parsing import read_strings
from delib_fast.datagen.session import Session
from delib_fast.datagen.settings import DeliberateSettings
from delib_fast.datagen.spec import Spec

_MESSAGES_A_SITUATION = 4
_DOMAINS = 10
_ROUNDS = 20


@dataclass(frozen=True)
class UserPrompt:
    """One prompt, as it was given: a text, or a chat that ends on the person's turn."""

    turns: tuple[dict[str, str], ...]
    location: str
    categories: tuple[str, ...] = ()
    single: bool = True
    """Written as "prompt" in the row; else as "messages"."""
    made: Mapping[str, str] = field(default_factory=dict)
    """Of a prompt that was made from the spec: domain and situation."""
    request_ids: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    @property
    def text(self) -> str:
        """What the row holds, as one string (guard.prompt_text reads the same from the row)."""
        return (
            self.turns[0]["content"]
            if self.single
            else json.dumps(list(self.turns), ensure_ascii=False, sort_keys=True)
        )

    @property
    def conversation(self) -> str:
        """For a reader: the text itself, or the turns one after another."""
        if self.single:
            return self.turns[0]["content"]
        return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in self.turns)


def read_prompts(path: str | os.PathLike[str], spec: Spec) -> list[UserPrompt]:
    """Prompts of a .jsonl, .json or .txt (one a line) file.

    A row is {"prompt" | "question" | "instruction"} or {"messages"} that ends on the person's turn (a reply that
    stands there is left out), and may give its "category": an id or title of a section, or a list of them.

    Raises: ConfigError with `file:line` for a row that is no prompt, or a category that the spec does not have.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the prompts can't be read: {error}") from None
    prompts = []
    for location, item in _items(path, text):
        prompts.append(_prompt_of(item, location, spec))
    if not prompts:
        raise ConfigError(f"{path}: holds no prompt")
    return prompts


def _items(path: Path, text: str) -> list[tuple[str, Any]]:
    lines = [(f"{path}:{n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if path.suffix == ".txt":
        return [(location, {"prompt": line.strip()}) for location, line in lines]
    if path.suffix == ".json":
        try:
            items = decode(text)
        except DataError as error:
            raise ConfigError(f"{path}: {error}") from None
        if not isinstance(items, list):
            raise ConfigError(f"{path}: a list of rows is expected")
        return [(f"{path}[{i}]", item) for i, item in enumerate(items)]
    found = []
    for location, line in lines:
        try:
            found.append((location, decode(line)))
        except DataError as error:
            raise ConfigError(f"{location}: {error}; prompts are .jsonl, .json, or .txt with one a line") from None
    return found


def _prompt_of(item: Any, location: str, spec: Spec) -> UserPrompt:
    if not isinstance(item, dict):
        raise ConfigError(f"{location}: an object with 'prompt' or 'messages' is expected")
    categories = _categories(item.get("category"), location, spec)
    key = next((key for key in (*CHAT_KEYS, *PROMPT_KEYS) if key in item), None)
    if key is None:
        raise ConfigError(f"{location}: has none of {', '.join(map(repr, (*PROMPT_KEYS, 'messages')))}")
    value = item[key]
    if isinstance(value, str) and key in PROMPT_KEYS:
        if not value.strip():
            raise ConfigError(f"{location}: {key!r} is empty")
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
        turns.append({"role": role, "content": content})
    if turns[-1]["role"] == "assistant":
        turns.pop()
    if not turns or turns[-1]["role"] not in ("user", "tool"):
        raise ConfigError(f"{location}: {key!r} must end on the person's turn")
    return tuple(turns)


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
                "leave 'category' out to have the model choose"
            )
        found.append(section.id)
    return tuple(dict.fromkeys(found))


# --- from the spec alone --------------------------------------------------------------------------------------


async def make_prompts(shop: Session, settings: DeliberateSettings, count: int) -> list[UserPrompt]:
    """Domains → situations → user messages, in rounds, near-duplicates left out, until there are `count`."""
    domains, ids = await shop.ask_with_retry(
        shop.generator,
        shop.prompts.chat("domains", spec=shop.spec.text, count=_DOMAINS),
        lambda answer: read_strings(answer.text, least=2),
        purpose="domains",
    )
    shop.meter.begin("prompts", count)
    seen = NearDuplicates(settings.near_duplicate_prompt)
    made: list[UserPrompt] = []
    taken: dict[str, list[str]] = {domain: [] for domain in domains}
    for _ in range(_ROUNDS):
        missing = count - len(made)
        if missing <= 0:
            break
        a_domain = max(1, -(-missing // (_MESSAGES_A_SITUATION * len(domains))))
        before = len(made)
        for prompt in await _one_round(shop, domains, taken, min(a_domain, 12), tuple(ids)):
            if len(made) < count and seen.find_or_add(prompt.id, prompt.text) is None:
                made.append(prompt)
                shop.meter.advance()
        if len(made) == before:
            break  # the model has no more to give
    return made


async def _one_round(
    shop: Session, domains: list[str], taken: dict[str, list[str]], a_domain: int, ids: tuple[str, ...]
) -> list[UserPrompt]:
    found: dict[str, list[UserPrompt]] = {}

    async def one_domain(domain: str) -> None:
        earlier = "\n".join(f"- {s}" for s in taken[domain][-40:]) or "none"
        chat = shop.prompts.chat(
            "situations", sections=shop.summary_lines(), domain=domain, taken=earlier, count=a_domain
        )
        try:
            situations, more = await shop.ask_with_retry(
                shop.generator, chat, lambda a: read_strings(a.text), purpose="situations"
            )
        except NoAnswer as error:
            shop.meter.drop(error.reason)
            return
        found[domain] = []
        for situation in situations[:a_domain]:
            taken[domain].append(situation)
            with contextlib.suppress(NoAnswer):
                found[domain] += await _messages(shop, domain, situation, (*ids, *more))

    await shop.for_each(domains, one_domain)
    # In the order of the domains, not of arrival: the same answers make the same prompts.
    return [prompt for domain in domains for prompt in found.get(domain, ())]


async def _messages(shop: Session, domain: str, situation: str, ids: tuple[str, ...]) -> list[UserPrompt]:
    chat = shop.prompts.chat("user_messages", domain=domain, situation=situation, count=_MESSAGES_A_SITUATION)
    texts, more = await shop.ask_with_retry(
        shop.generator, chat, lambda a: read_strings(a.text), purpose="user_messages"
    )
    return [
        UserPrompt(
            ({"role": "user", "content": text},),
            "made from the spec",
            made={"domain": domain, "situation": situation},
            request_ids=(*ids, *more),
        )
        for text in texts[:_MESSAGES_A_SITUATION]
    ]
