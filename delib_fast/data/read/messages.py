"""Turn one message of a chat, in OpenAI's or ShareGPT's format, into a turn."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from delib_fast.data.read.cot_tags import split_cot, starts_with_cot, tag_around
from delib_fast.data.read.fields import Fields, fail, type_name
from delib_fast.data.read.tools import read_call_text, read_calls
from delib_fast.data.read.unread import COT_KEYS, is_switch, settle

ROLES = {
    "system": "system", "developer": "developer", "user": "user", "assistant": "assistant", "tool": "tool",
    "human": "user", "gpt": "assistant", "model": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "observation": "tool", "function_response": "tool", "tool_response": "tool", "function": "tool",
}  # fmt: skip
_CALL_ROLES = ("function_call", "tool_call")
Tags = tuple[tuple[str, str], ...]


@dataclass(slots=True)
class Turn:
    """A message, before it is known whether it is a reply."""

    role: str
    content: str
    cot: str | None = None
    weight: float = 1.0
    calls: str = ""
    fields: str = ""


def read_turn(message: Any, where: str, tags: Tags, ignored: Counter[str]) -> Turn:
    """Read a message.

    Args:
        message: the decoded object.
        where: its location in the row, e.g. `messages[2]`.
        tags: pairs of tags around a chain of thought.
        ignored: counts the ignored fields.
    Raises:
        DataError: without a location.
    """
    if not isinstance(message, dict):
        fail("wrong_type", f"{where} is {type_name(message)}, but a message is expected")
    fields = Fields(message, where)
    role_key = fields.optional_key(("role", "from"))
    if role_key is None:
        fail("missing_field", f"{where} has no 'role' (or 'from', as in ShareGPT)")
    given_role = fields.string(role_key).lower()
    is_call = given_role in _CALL_ROLES
    role = "assistant" if is_call else ROLES.get(given_role)
    if role is None:
        fail(
            "bad_role",
            f"{where} has an unknown role; known: {', '.join(sorted(set(ROLES.values())))} (and ShareGPT's human, gpt)",
        )
    turn = Turn(role, "", calls=_calls(fields))
    if turn.calls and role != "assistant":
        fail("tools", f"{where} is a {role} message with tool calls, but only assistant messages may call tools")
    more: dict[str, Any] = {key: fields.string(key) for key in ("name", "tool_call_id") if key in fields}
    thoughts = _read_content(turn, fields, more, ignored)
    if is_call:
        if turn.calls:
            fail("ambiguous", f"{where} has its tool calls twice: in the content and in a field of its own; keep one")
        turn.calls, turn.content = read_call_text(turn.content, where), ""
        more["content"] = None
    if role == "assistant":
        turn.weight = fields.loss_weight()
        turn.cot, turn.content = _cot_of(turn, fields, thoughts, tags)
        if len(more.get("content") or ()) > 1:
            more["content"] = _blocks_of_rest(more["content"], turn.content)
    else:
        _refuse_loss_and_cot(fields, role)
    turn.fields = json.dumps(more, ensure_ascii=False) if more else ""
    has_cot = role != "assistant" or turn.cot is not None
    settle(fields, "message", ignored, prefix=f"{where.split('[')[0]}[].", has_cot=has_cot)
    return turn


def _refuse_loss_and_cot(fields: Fields, role: str) -> None:
    """Refuse a message that is not the assistant's if it asks to be trained on, or has a chain of thought."""
    if asks := fields.asks_for_loss():
        fail(
            "bad_weight",
            f"{asks} asks to train on a {role} message, but only assistant messages are trained on; remove it",
        )
    if key := next((key for key in COT_KEYS if str(fields.get(key) or "").strip()), None):
        fail(
            "bad_block",
            f"{fields.where} is a {role} message with {key!r}, but only assistant messages may have a chain of thought",
        )


def _calls(fields: Fields) -> str:
    """The calls of OpenAI's `tool_calls`, or of its older `function_call`."""
    calls = read_calls(fields.get("tool_calls"), fields.name("tool_calls"))
    old = fields.get("function_call")
    if old:
        if calls:
            fail("ambiguous", f"{fields.where} has both 'tool_calls' and 'function_call'; keep one")
        calls = read_calls([old], fields.name("function_call"))
    return calls


def _cot_of(turn: Turn, fields: Fields, thoughts: str | None, tags: Tags) -> tuple[str | None, str]:
    """The chain of thought and the content of an assistant message."""
    given, key = fields.text(COT_KEYS), fields.text_key(COT_KEYS)
    if given is not None and thoughts is not None:
        fail("ambiguous", f"{fields.where} has its chain of thought twice: as {key!r} and in the content")
    return join_cot(given if given is not None else thoughts, turn.content, key, fields.where, tags)


def join_cot(given: str | None, content: str, key: str | None, where: str, tags: Tags) -> tuple[str | None, str]:
    """Combine a chain of thought that has a field of its own with what the content may contain between tags.

    Args:
        given: the text of the field; None if it is absent or blank.
        key: the name of the field, for messages.
        where: the location of the message; "" for a row.
    Returns:
        The chain of thought or None, and the content without it.
    Raises:
        DataError: both contain a chain of thought, and they differ; or the one of the field has tags around it.
    """
    if given is None:
        return split_cot(content, tags)
    prefix = f"{where} has" if where else "has"
    if is_switch(given):
        fail("ambiguous", f"{prefix} no chain of thought in {key!r}, but a switch; rename or remove it")
    if tag := tag_around(given, tags):
        place = "a reasoning block" if key is None else repr(key)
        fail("cot_tags", f"{prefix} {tag} in {place}, which holds the chain of thought without tags; remove the tags")
    if not starts_with_cot(content, tags):
        return given, content
    inner, rest = split_cot(content, tags)
    if inner is not None and inner.strip() != given.strip():
        where_else = "in a reasoning block" if key is None else f"as {key!r}"
        fail("ambiguous", f"{prefix} its chain of thought twice: {where_else} and in the content")
    return given, rest


def _read_content(turn: Turn, fields: Fields, more: dict[str, Any], ignored: Counter[str]) -> str | None:
    """Read the text of a message, and add its form to `more` if it is not a string (`Message.fields`).

    Returns the text of its reasoning blocks, None without any.
    """
    key = fields.optional_key(("content", "value"))
    if key is None:
        if not turn.calls:  # OpenAI: the content of a call is null
            fail("missing_field", f"{fields.where} has no 'content' (or 'value', as in ShareGPT)")
        more["content"] = None
        return None
    blocks = fields.peek(key)
    if not isinstance(blocks, list):
        turn.content = fields.string(key)
        return None
    fields.get(key)
    texts: list[str] = []
    thoughts: list[str] = []
    for i, block in enumerate(blocks):
        kind, text = _read_block(block, f"{fields.where}.{key}[{i}]", ignored)
        if kind != "text" and texts:
            fail(
                "bad_block",
                f"{fields.where}.{key}[{i}] is a reasoning block after a text, but a chain of thought must begin the "
                "reply",
            )
        (texts if kind == "text" else thoughts).append(text)
    if thoughts and turn.role != "assistant":
        fail(
            "bad_block",
            f"{fields.where} is a {turn.role} message with a reasoning block, but only assistant messages may have one",
        )
    turn.content = "\n".join(texts)
    more["content"] = [{"type": "text", "text": text} for text in texts] if len(texts) > 1 else [{"type": "text"}]
    return "\n".join(thoughts) if any(thought.strip() for thought in thoughts) else None


def _blocks_of_rest(blocks: list[dict[str, str]], content: str) -> list[dict[str, str]]:
    """The text blocks of a message without its chain of thought. `content` is the text of the result."""
    cut = len("\n".join(block["text"] for block in blocks)) - len(content)
    kept = []
    for block in blocks:
        if cut < len(block["text"]) or cut <= 0:
            kept.append({"type": "text", "text": block["text"][max(cut, 0) :]})
        cut -= len(block["text"]) + 1
    return kept if len(kept) > 1 else [{"type": "text"}]


def _read_block(block: Any, where: str, ignored: Counter[str]) -> tuple[str, str]:
    """The kind of a content block, and its text."""
    if not isinstance(block, dict):
        fail("wrong_type", f"{where} is {type_name(block)}, but a content block is expected")
    fields = Fields(block, where)
    kind = fields.get("type") or "text"
    if kind not in ("text", "reasoning", "thinking"):
        fail("bad_block", f"{where} is not text; only blocks of type text, reasoning and thinking are supported")
    keys = ("text", "value", "content") if kind == "text" else (kind, "text", "value", "content")
    text = fields.string(fields.optional_key(keys) or keys[0])
    settle(fields, "block", ignored, prefix=f"{where.split('[')[0]}[].content[].")
    return kind, text
