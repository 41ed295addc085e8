"""Rows: what reading returns and encoding takes. A row is text, with the location that it was read from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

FINGERPRINT_HEX = 12


class DataError(ValueError):
    """Data that cannot be used for training.

    The message gives the location (`file:line`), the problem and the remedy. It never contains text of the row, which
    may be private; a fingerprint identifies the row instead.

    Args:
        reason: a short name for the kind of fault; skipped rows are counted by reason.
        location: prefixed to the message if given.
    """

    def __init__(self, message: str, *, reason: str, location: object = None) -> None:
        super().__init__(message if location is None else f"{location}: {message}")
        self.reason = reason
        self.location = None if location is None else str(location)


class Segment(IntEnum):
    """The part of a row that a token belongs to. The value is also the index into `segment_weights`."""

    PROMPT = 0
    COT = 1
    RESPONSE = 2
    DOCUMENT = 3


@dataclass(frozen=True, slots=True)
class Message:
    """A message before the reply."""

    role: str
    content: str
    cot: str | None = None
    """The chain of thought of an earlier assistant message; the chat template decides whether it is shown."""
    calls: str = ""
    """The tool calls of an earlier assistant message, as JSON (see read/tools.py)."""
    fields: str = ""
    """What else a chat template may read of the message, as a JSON object: "name" and "tool_call_id"; and "content", if
    it is not a string in the row: null, or a list of text blocks. The only block has no text, which is `content`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A document, or a prompt with its reply."""

    kind: Literal["document", "chat"]
    location: str
    """`file:line`, for error messages; the line of the heading for a section of a text file."""
    source: str
    """Name of the source under `data:`."""
    digest: str
    """Hash of the content as read. All rows of one conversation have the same digest."""
    weight: float = 1.0
    """Factor on the loss weight of each of the row's tokens."""
    text: str = ""
    """The text of a document."""
    messages: tuple[Message, ...] = ()
    """The messages of a chat before the reply."""
    cot: str | None = None
    """The chain of thought of the reply."""
    response: str = ""
    """The reply without its chain of thought."""
    calls: str = ""
    """The tool calls of the reply, as JSON (see read/tools.py)."""
    tools: str = ""
    """The tools available in the chat, as JSON."""
    fields: str = ""
    """What else a chat template may read of the reply, as for `Message.fields`."""

    @property
    def texts(self) -> tuple[str, ...]:
        """All text of the row, to train a tokenizer on or to search."""
        if self.kind == "document":
            return (self.text,)
        turns = [text for m in self.messages for text in (m.cot, m.content, m.calls)]
        return tuple(text for text in (self.tools, *turns, self.cot, self.response, self.calls) if text)


def content_digest(parts: Iterable[str | None]) -> str:
    """Hash texts to 16 hex digits. The hash also depends on where one text ends and the next begins."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = b"-" if part is None else part.encode("utf-8", "surrogatepass")
        digest.update(b"%d:" % (len(data) if part is not None else -1))
        digest.update(data)
    return digest.hexdigest()


def fingerprint(raw: bytes) -> str:
    """Hash a raw row to 12 hex digits, which identify it in messages without showing it."""
    return hashlib.blake2b(raw, digest_size=FINGERPRINT_HEX // 2).hexdigest()
