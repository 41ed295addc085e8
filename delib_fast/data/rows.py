"""What reading yields and encoding takes: rows of text, each with the place it came from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

FINGERPRINT_HEX = 12


class DataError(ValueError):
    """Data that can't be trained on: says the place (`file:line`), what is wrong there and the remedy.

    The message never holds text of the row, which may be private; a fingerprint tells two rows apart.
    `reason` is a short name of the kind of fault, under which skipped rows are counted.
    """

    def __init__(self, message: str, *, reason: str, location: object = None) -> None:
        super().__init__(message if location is None else f"{location}: {message}")
        self.reason = reason
        self.location = None if location is None else str(location)


class Segment(IntEnum):
    """What a token is part of; also its index in `segment_weights`."""

    PROMPT = 0
    COT = 1
    RESPONSE = 2
    DOCUMENT = 3


@dataclass(frozen=True, slots=True)
class Message:
    """One turn before the reply."""

    role: str
    content: str
    cot: str | None = None
    """The chain of thought of an earlier assistant turn; the chat template says whether it is shown."""
    calls: str = ""
    """The tools that an earlier assistant turn calls, as JSON (tools.py)"""
    name: str = ""
    """of the tool whose result it is"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One document, or one prompt with its reply."""

    kind: Literal["document", "chat"]
    location: str
    """`file:line` (or the heading's line), for messages"""
    source: str
    """the name under `data:`"""
    digest: str
    """hash of the content as read; the turns of one conversation share it"""
    weight: float = 1.0
    """factor on the loss weight of each of its tokens"""
    text: str = ""
    """of a document"""
    messages: tuple[Message, ...] = ()
    """of a chat: everything before the reply"""
    cot: str | None = None
    """chain of thought of the reply"""
    response: str = ""
    """the reply itself, without its chain of thought"""
    calls: str = ""
    """the tools that the reply calls, as JSON (tools.py)"""
    tools: str = ""
    """the tools that it may call, as JSON"""

    @property
    def texts(self) -> tuple[str, ...]:
        """All the text of the row, to train a tokenizer on or to search."""
        if self.kind == "document":
            return (self.text,)
        turns = [text for m in self.messages for text in (m.cot, m.content, m.calls)]
        return tuple(text for text in (self.tools, *turns, self.cot, self.response, self.calls) if text)


def content_digest(parts: Iterable[str | None]) -> str:
    """16 hex digits that depend on the parts and on where one ends and the next begins."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = b"-" if part is None else part.encode("utf-8", "surrogatepass")
        digest.update(b"%d:" % (len(data) if part is not None else -1))
        digest.update(data)
    return digest.hexdigest()


def fingerprint(raw: bytes) -> str:
    """Tells two rows apart without showing either."""
    return hashlib.blake2b(raw, digest_size=FINGERPRINT_HEX // 2).hexdigest()


def _what_it_is_about(row: Row) -> bytes:
    opening = next((m.content for m in row.messages if m.role == "user"), None)
    return (row.digest if opening is None else content_digest([opening])).encode()


def split_holdout(rows: Sequence[Row], share: float) -> tuple[list[Row], list[Row]]:
    """Part the rows into (train, held out) by a hash of a document's text, or of the message a chat begins with.

    Args:
        rows: any rows; equal ones, several replies to one prompt, and the turns of one conversation land on the
            same side: what is held out was never trained on in another version.
        share: how much is held out, 0 ≤ share < 1; about so many rows, since each is judged alone.
    Returns:
        Two lists in the order of the rows. Adding or removing rows never moves another one.
    Raises:
        ValueError: share is out of range, or one side would be empty though both were asked for.
    """
    if not 0 <= share < 1:
        raise ValueError(f"the held-out share is {share}; it must be at least 0 and below 1")
    train: list[Row] = []
    held_out: list[Row] = []
    for row in rows:
        (held_out if is_held_out(row, share) else train).append(row)
    if rows:
        refuse_empty_side(rows[0].source, share, len(train), len(held_out))
    return train, held_out


def is_held_out(row: Row, share: float) -> bool:
    """Whether `split_holdout` holds the row out."""
    if share == 0:
        return False
    # A second hash, so that the held-out share has nothing in common with other uses of the digest.
    judged = hashlib.blake2b(_what_it_is_about(row), digest_size=8, person=b"holdout").digest()
    return int.from_bytes(judged, "big") < int(share * 2**64)


def refuse_empty_side(source: str, share: float, train: int, held_out: int) -> None:
    """Raise ValueError if rows were to be held out and one side of the split has none."""
    if share > 0 and not (train and held_out):
        empty = "training" if not train else "evaluation"
        raise ValueError(
            f"holdout: {share} of the {train + held_out} rows of source {source!r} leaves none "
            f"for {empty}; use another share, or more rows"
        )
