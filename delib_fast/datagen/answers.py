"""Requests, answers and the sums over them. An answer is bounded and cleaned when it is created, so that a run and its
request log always have the same one, whatever the endpoint sent."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from delib_fast.datagen.prompt_files import Chat
from delib_fast.redaction import redact

_MOST_TOKENS = 10**8  # no model reads or writes more in one request
_FINISH_CHARS, _NAME_CHARS = 64, 200
DAMAGED = "\ufffd"
"""Replaces what is not text: a lone surrogate, a NUL, a byte that is not UTF-8."""


def clean_text(text: str) -> str:
    """Replace NUL characters and lone surrogates by U+FFFD: they are not text, and no reader of rows accepts them."""
    text = text.replace("\0", DAMAGED)
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def token_count(value: object) -> int | None:
    """Return a reported number of tokens; None if it is not a whole number from 0 to 10^8."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _MOST_TOKENS:
        return None
    return int(value) if value == int(value) else None


def amount(value: object) -> float | None:
    """Return an amount of money; None if it is not a finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1e300:
        return None
    return float(value)


@dataclass(frozen=True)
class Request:
    """A chat, the model that answers it, and the sampling parameters."""

    purpose: str
    """What the answer is for ("generate", "judge" …). Informational: not part of the id."""
    model: str
    messages: Chat
    params: Mapping[str, Any]
    """Sampling parameters, with the names that the endpoint expects."""
    sample: int = 0
    """Requests that differ only in this number are answered independently."""

    @cached_property
    def id(self) -> str:
        """The hash of what determines the answer. Secrets in the parameters are left out: all API keys give one id."""
        params = redact(self.params)
        content = {"model": self.model, "messages": self.messages, "params": params, "sample": self.sample}
        return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Answer:
    """The answer of a model. Its text is valid Unicode without NUL, and its counts are plausible, see `token_count`."""

    text: str
    finish: str
    """Why the model stopped, as the endpoint reports it: "stop", "length", "content_filter" …"""
    reasoning: str | None = None
    """The model's own reasoning, if the endpoint returns it separately from the text."""
    prompt_tokens: int | None = None
    """None if the endpoint does not report it."""
    completion_tokens: int | None = None
    served_by: str = ""
    """The model's name as the endpoint reports it."""
    request_id: str = ""

    def __post_init__(self) -> None:
        for name, value in (
            ("text", clean_text(self.text)),
            ("finish", clean_text(self.finish)[:_FINISH_CHARS]),
            ("reasoning", None if self.reasoning is None else clean_text(self.reasoning)),
            ("prompt_tokens", token_count(self.prompt_tokens)),
            ("completion_tokens", token_count(self.completion_tokens)),
            ("served_by", clean_text(self.served_by)[:_NAME_CHARS]),
        ):
            object.__setattr__(self, name, value)

    @staticmethod
    def from_record(record: Mapping[str, Any], request_id: str) -> Answer:
        """The answer in a line of the request log. Raises KeyError or TypeError if it is not one."""
        return Answer(
            text=record["text"],
            finish=record["finish"],
            reasoning=record.get("reasoning"),
            prompt_tokens=record.get("prompt_tokens"),
            completion_tokens=record.get("completion_tokens"),
            served_by=record.get("served_by", ""),
            request_id=request_id,
        )

    @property
    def truncated(self) -> bool:
        """Whether the answer was cut off at the token limit, or at the end of the model's context."""
        return self.finish in ("length", "max_tokens", "model_context_window_exceeded")


@dataclass(frozen=True)
class Charge:
    """What one attempt costs at most."""

    tokens: int = 0
    """Tokens of prompt and answer."""
    cost: float = 0.0
    """In the currency of the configured prices; 0 without prices."""

    def __add__(self, other: Charge) -> Charge:
        return Charge(self.tokens + other.tokens, self.cost + other.cost)

    def record(self) -> dict[str, Any]:
        """The charge as it is written to the request log."""
        return {"tokens": self.tokens, "cost": self.cost}

    @staticmethod
    def from_record(value: object) -> Charge:
        """The charge in a line of the request log; 0 for what is not a number."""
        found = value if isinstance(value, Mapping) else {}
        tokens = found.get("tokens")
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0:
            tokens = 0
        return Charge(tokens, amount(found.get("cost")) or 0.0)


@dataclass(frozen=True)
class BatchEntry:
    """What the log knows about a batch of requests at an endpoint."""

    key: str
    """Chosen at random when the batch was planned; the endpoint stores it with the batch."""
    endpoint: str
    """Identifies model, API and sampling parameters, see `batches.endpoint_key`."""
    model: str
    params: Mapping[str, Any]
    requests: tuple[Mapping[str, Any], ...]
    """For each request its id, purpose, messages (role and sha256) and sample."""
    at: float
    """When it was planned, in seconds since the epoch."""
    at_most: Charge = field(default_factory=Charge)
    """What all of its requests together may cost."""
    batch_id: str | None = None
    """The id at the endpoint; None if the run ended before it was written."""

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids of the requests."""
        return tuple(str(request["id"]) for request in self.requests)


@dataclass
class Totals:
    """Sums over a request log."""

    answers: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    without_usage: int = 0
    """Answers whose tokens the endpoint did not report."""
    cost: float | None = None
    by_purpose: dict[str, dict[str, float]] = field(default_factory=dict)
    failed: Counter[str] = field(default_factory=Counter)
    """Attempts without a usable answer, by reason."""
    at_most: Charge = field(default_factory=Charge)
    """What the endpoints may charge at most: an answer without usage, or an attempt that failed after the request was
    sent, counts as much as it can have cost."""

    def add(self, record: Mapping[str, Any]) -> None:
        """Add an answer, given its record in the log."""
        answer, cost = record["answer"], amount(record.get("cost"))
        prompt, completion = token_count(answer.get("prompt_tokens")), token_count(answer.get("completion_tokens"))
        self.answers += 1
        self.prompt_tokens += prompt or 0
        self.completion_tokens += completion or 0
        self.without_usage += completion is None
        if cost is not None:
            self.cost = (self.cost or 0.0) + cost
        if "at_most" in record:
            self.at_most += Charge.from_record(record["at_most"])
        else:  # a log of an earlier version
            self.at_most += Charge((prompt or 0) + (completion or 0), cost or 0.0)
        part = self.by_purpose.setdefault(
            record["purpose"], {"answers": 0, "prompt_tokens": 0, "completion_tokens": 0, "cost": 0.0}
        )
        part["answers"] += 1
        part["prompt_tokens"] += prompt or 0
        part["completion_tokens"] += completion or 0
        part["cost"] += cost or 0.0

    def add_failure(self, record: Mapping[str, Any]) -> None:
        """Add a failed attempt, given its record in the log."""
        self.failed[str(record["reason"])] += 1
        self.at_most += Charge.from_record(record.get("at_most"))


def sha256_of(text: str) -> str:
    """The SHA-256 of a text, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def hashed_messages(request: Request) -> list[dict[str, str]]:
    """The messages of a request with the SHA-256 of their texts."""
    return [{"role": m["role"], "sha256": sha256_of(m["content"])} for m in request.messages]


def request_entry(request: Request) -> dict[str, Any]:
    """A request as an element of `BatchEntry.requests`."""
    return {
        "id": request.id,
        "purpose": request.purpose,
        "messages": hashed_messages(request),
        "sample": request.sample,
    }


def estimated_tokens(text: str) -> int:
    """Estimate the number of tokens in a text: a quarter of its characters."""
    return math.ceil(len(text) / 4)


def plausible_tokens(reported: int | None, text: str) -> int:
    """Return the reported number of tokens of a text, or an estimate if the text cannot have that number."""
    if reported is not None and len(text) / 20 <= reported <= max(16, len(text.encode())):
        return reported
    return estimated_tokens(text)
