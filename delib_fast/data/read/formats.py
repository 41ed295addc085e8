"""Turn one decoded object (a line of JSONL, an item of a JSON list, a Parquet row) into rows.

The keys determine the format:

    {"text"}                                              a document
    {"prompt" | "question" | "instruction"[, "input"],
     "response" | "answer" | "completion" | "output"
     [, "cot"][, "system"]}                               one prompt and its reply
    {"messages" | "conversation" | "conversations"}       a chat; the last assistant turn is the reply

A reply without a "cot" field may contain its chain of thought between tags (cot_tags.py) or, as in GSM8K, as the steps
before a line `#### result`. A chat may have "tools", and assistant messages "tool_calls" (tools.py); then the last
message and every call since the user's last message become rows of their own. "weight" or "loss_weight" scales the loss
of a row or a message. Other keys ("id", "score", "category" …) are ignored.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from delib_fast.data.read.cot_tags import TAGS, split_cot
from delib_fast.data.read.strict_json import SAFE_KEY
from delib_fast.data.read.tools import read_call_text, read_calls, read_tools
from delib_fast.data.rows import DataError, Message, Row, content_digest

PROMPT_KEYS = ("prompt", "question", "instruction")
RESPONSE_KEYS = ("response", "answer", "completion", "output")
COT_KEYS = ("cot", "reasoning_content", "reasoning", "thinking")
CHAT_KEYS = ("messages", "conversation", "conversations")
ROLES = {
    "system": "system", "developer": "developer", "user": "user", "assistant": "assistant", "tool": "tool",
    "human": "user", "gpt": "assistant", "model": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "observation": "tool", "function_response": "tool",
}  # fmt: skip
_WEIGHT_KEYS = ("weight", "loss_weight")
_GSM8K_RESULT = re.compile(r"^#### ", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class FormatSettings:
    """How the objects of one source become rows."""

    source: str
    turns: str = "last"
    """Which assistant messages of a chat become replies: the "last", or "each" in a row of its own."""
    tags: tuple[tuple[str, str], ...] = TAGS
    """Pairs of tags around a chain of thought."""


@dataclass(slots=True)
class _Turn:
    role: str
    content: str
    cot: str | None = None
    weight: float = 1.0
    calls: str = ""
    name: str = ""


def rows_of(item: Any, settings: FormatSettings, location: str) -> list[Row]:
    """Turn one object into rows. Raises DataError without a location; the caller adds it, and a fingerprint."""
    if not isinstance(item, dict):
        _fail("not_an_object", f"{_type_name(item)}, but an object with named fields is expected")
    return list(_format_of(item)(item, settings, location))


def _format_of(item: Mapping[str, Any]) -> Callable[[Mapping[str, Any], FormatSettings, str], Iterator[Row]]:
    chat = [key for key in CHAT_KEYS if key in item]
    prompt = [key for key in PROMPT_KEYS if key in item]
    text = [key for key in ("text",) if key in item]
    kinds = [keys for keys in (chat, prompt, text) if keys]
    if len(kinds) > 1:
        _fail(
            "ambiguous",
            "has both "
            + " and ".join(f"{keys[0]!r}" for keys in kinds)
            + ": which of them is the row is ambiguous; keep one",
        )
    if not kinds:
        _fail("missing_field", _unknown_keys(item))
    return _chat_rows if chat else _pair_rows if prompt else _document_rows


def _unknown_keys(item: Mapping[str, Any]) -> str:
    known = (*CHAT_KEYS, *PROMPT_KEYS, "text")
    keys = [key if SAFE_KEY.fullmatch(key) else "(a key that is not a name)" for key in item][:8]
    close = [(key, near[0]) for key in keys if (near := difflib.get_close_matches(key, known, n=1, cutoff=0.75))]
    hint = f"; did you mean {close[0][1]!r} instead of {close[0][0]!r}?" if close else ""
    has = f"its fields are {', '.join(map(repr, keys))}" if keys else "it is empty"
    return f"has none of the fields 'text', 'prompt', 'question', 'instruction' or 'messages': {has}{hint}"


def document_row(text: str, *, source: str, location: str, weight: float = 1.0) -> Row:
    """Create the row of a document."""
    return Row(
        kind="document",
        location=location,
        source=source,
        digest=content_digest(["document", text]),
        weight=weight,
        text=text,
    )


# --- the three formats --------------------------------------------------------------------------------------


def _document_rows(item: Mapping[str, Any], settings: FormatSettings, location: str) -> Iterator[Row]:
    text = _string(item, "text")
    if not text.strip():
        _fail("empty", "'text' is empty: there is nothing to train on")
    if (weight := _weight(item)) == 0:
        _fail("nothing_supervised", "its weight is 0: there is nothing to train on")
    yield document_row(text, source=settings.source, location=location, weight=weight)


def _pair_rows(item: Mapping[str, Any], settings: FormatSettings, location: str) -> Iterator[Row]:
    prompt_key = _single_key(item, PROMPT_KEYS)
    response_key = _single_key(item, RESPONSE_KEYS, because=f"{prompt_key!r} has no reply")
    cot_key = _single_key(item, COT_KEYS, required=False)
    turns = _prompt_turns(item, prompt_key)
    reply = _reply(item, response_key, cot_key, settings)
    tools = read_tools(item.get("tools")) if isinstance(item[prompt_key], list) else ""
    yield from _rows_of_turns([*turns, reply], _weight(item), FormatSettings(settings.source), location, tools)


def _prompt_turns(item: Mapping[str, Any], key: str) -> list[_Turn]:
    turns = []
    if item.get("system") is not None:
        turns.append(_Turn("system", _string(item, "system")))
    if isinstance(item[key], list):
        return turns + [_turn(message, f"{key}[{i}]", TAGS) for i, message in enumerate(item[key])]
    prompt = _string(item, key)
    if key == "instruction" and item.get("input") is not None and _string(item, "input").strip():
        prompt = f"{prompt}\n\n{_string(item, 'input')}"
    if not prompt.strip():
        _fail("empty", f"{key!r} is empty")
    return [*turns, _Turn("user", prompt)]


def _reply(item: Mapping[str, Any], key: str, cot_key: str | None, settings: FormatSettings) -> _Turn:
    if isinstance(item[key], list):  # TRL's conversational {"prompt": [...], "completion": [...]}
        if len(item[key]) != 1:
            _fail("wrong_type", f"{key!r} has {len(item[key])} messages, but exactly one reply is expected")
        reply = _turn(item[key][0], f"{key}[0]", settings.tags)
        if reply.role != "assistant":
            _fail("bad_role", f"{key}[0] is a {reply.role} message, but the reply must be an assistant message")
        return reply
    response = _string(item, key)
    if cot_key is not None and item[cot_key] is not None:
        return _Turn("assistant", response, _string(item, cot_key))
    cot, response = split_cot(response, settings.tags)
    if cot is None and key == "answer":
        cot, response = _split_gsm8k(response)
    return _Turn("assistant", response, cot)


def _split_gsm8k(answer: str) -> tuple[str | None, str]:
    """Split an answer into its steps, which are the chain of thought, and its last part, `#### result`."""
    results = list(_GSM8K_RESULT.finditer(answer))
    if not results:
        return None, answer
    at = results[-1].start()
    return answer[:at].strip() or None, answer[at:]


def _chat_rows(item: Mapping[str, Any], settings: FormatSettings, location: str) -> Iterator[Row]:
    key = _single_key(item, CHAT_KEYS)
    if not isinstance(item[key], list):
        _fail("wrong_type", f"{key!r} is {_type_name(item[key])}, but a list of messages is expected")
    if not item[key]:
        _fail("empty", f"{key!r} is an empty list")
    turns = [_turn(message, f"{key}[{i}]", settings.tags) for i, message in enumerate(item[key])]
    if item.get("system") is not None and turns[0].role != "system":
        turns.insert(0, _Turn("system", _string(item, "system")))
    yield from _rows_of_turns(turns, _weight(item), settings, location, read_tools(item.get("tools")))


def _rows_of_turns(
    turns: list[_Turn], weight: float, settings: FormatSettings, location: str, tools: str = ""
) -> Iterator[Row]:
    parts = [part for t in turns for part in (t.role, t.cot, t.content, *([t.calls] if t.calls else []))]
    digest = content_digest([*parts, tools] if tools else parts)
    replies = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
    if turns[-1].role != "assistant":
        _fail("no_reply", f"the last message is a {turns[-1].role} message: there is no reply")
    first_question = min((i for i, turn in enumerate(turns) if turn.role in ("user", "tool")), default=len(turns))
    if replies[-1] < first_question:
        _fail("no_prompt", "there is no user message before the reply, so there is no prompt")
    last_question = max(
        (i for i, turn in enumerate(turns[: replies[-1]]) if turn.role == "user"), default=first_question
    )
    chosen = (
        [i for i in replies if i > first_question]
        if settings.turns == "each"
        else [i for i in replies if i > last_question and (turns[i].calls or i == replies[-1])]
    )
    rows = 0
    for i in chosen:
        reply = turns[i]
        if weight * reply.weight == 0:
            continue  # a message (or row) that is marked as not to be trained on
        if not reply.content.strip() and not (reply.cot or "").strip() and not reply.calls:
            which = f" (message {i})" if len(turns) > 2 else ""
            _fail("empty", f"the reply is empty{which}: there is nothing to train on")
        rows += 1
        yield Row(
            kind="chat",
            location=location if len(chosen) == 1 else f"{location} (message {i})",
            source=settings.source,
            digest=digest,
            weight=weight * reply.weight,
            messages=tuple(Message(t.role, t.content, t.cot, t.calls, t.name) for t in turns[:i]),
            cot=reply.cot if (reply.cot or "").strip() else None,
            response=reply.content,
            calls=reply.calls,
            tools=tools,
        )
    if not rows:
        _fail("nothing_supervised", "every reply has weight 0: there is nothing to train on")


# --- messages -----------------------------------------------------------------------------------------------


def _turn(message: Any, where: str, tags: tuple[tuple[str, str], ...]) -> _Turn:
    if not isinstance(message, dict):
        _fail("wrong_type", f"{where} is {_type_name(message)}, but a message is expected")
    role_key = "role" if "role" in message else "from"
    content_key = "content" if "content" in message else "value" if "value" in message else "content"
    if role_key not in message:
        _fail("missing_field", f"{where} has no 'role' (or 'from', as in ShareGPT)")
    given_role = _string(message, role_key, where).lower()
    is_call = given_role == "function_call"
    role = "assistant" if is_call else ROLES.get(given_role)
    if role is None:
        _fail(
            "bad_role",
            f"{where} has an unknown role; known: {', '.join(sorted(set(ROLES.values())))} (and ShareGPT's human, gpt)",
        )
    turn = _Turn(role, "", weight=_message_weight(message, where), calls=read_calls(message.get("tool_calls"), where))
    if turn.calls and role != "assistant":
        _fail("tools", f"{where} is a {role} message with tool calls, but only assistant messages may call tools")
    if not (turn.calls and message.get(content_key) is None):  # OpenAI: the content of a call is null
        _read_content(turn, message, content_key, where)
    if is_call:
        turn.calls, turn.content = read_call_text(turn.content, where), ""
    if role == "tool" and message.get("name") is not None:
        turn.name = _string(message, "name", where)
    if role != "assistant":
        return turn
    cot_key = _single_key(message, COT_KEYS, required=False, where=where)
    if cot_key is not None and message[cot_key] is not None:
        if turn.cot is not None:
            _fail("ambiguous", f"{where} has its chain of thought twice: as {cot_key!r} and in the content")
        turn.cot = _string(message, cot_key, where)
    elif turn.cot is None:
        turn.cot, turn.content = split_cot(turn.content, tags)
    return turn


def _read_content(turn: _Turn, message: Mapping[str, Any], key: str, where: str) -> None:
    if key not in message:
        _fail("missing_field", f"{where} has no 'content' (or 'value', as in ShareGPT)")
    if not isinstance(message[key], list):
        turn.content = _string(message, key, where)
        return
    texts: list[str] = []
    thoughts: list[str] = []
    for i, block in enumerate(message[key]):
        block_name = f"{where}.{key}[{i}]"
        if not isinstance(block, dict):
            _fail("wrong_type", f"{block_name} is {_type_name(block)}, but a content block is expected")
        kind = block.get("type", "text")
        if kind not in ("text", "reasoning", "thinking"):
            _fail(
                "bad_block", f"{block_name} is not text; only blocks of type text, reasoning and thinking are supported"
            )
        fields = ("text", "value", "content") if kind == "text" else (kind, "text", "value", "content")
        name = next((f for f in fields if f in block), fields[0])
        (texts if kind == "text" else thoughts).append(_string(block, name, block_name))
    if thoughts and turn.role != "assistant":
        _fail(
            "bad_block",
            f"{where} is a {turn.role} message with a reasoning block, but only assistant messages may have one",
        )
    turn.content = "\n".join(texts)
    turn.cot = "\n".join(thoughts) if thoughts else None


# --- fields -------------------------------------------------------------------------------------------------


def _single_key(
    item: Mapping[str, Any], keys: tuple[str, ...], *, required: bool = True, because: str = "", where: str = ""
) -> Any:
    found = [key for key in keys if key in item]
    prefix = f"{where} " if where else ""
    if len(found) > 1:
        _fail(
            "ambiguous",
            f"{prefix}has both {found[0]!r} and {found[1]!r}: which of them counts is ambiguous; keep one",
        )
    if not found and required:
        why = f": {because}" if because else ""
        _fail("missing_field", f"{prefix}has none of {', '.join(map(repr, keys))}{why}")
    return found[0] if found else None


def _string(item: Mapping[str, Any], key: str, where: str = "") -> str:
    value = item.get(key)
    name = f"{where}.{key}" if where else repr(key)
    if key not in item:
        _fail("missing_field", f"{name} is missing")
    if not isinstance(value, str):
        _fail("wrong_type", f"{name} is {_type_name(value)}, but a string is expected")
    if "\0" in value:
        _fail("nul", f"{name} contains a NUL character: the file is damaged, or is not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        _fail(
            "surrogate",
            f"{name} contains half of a surrogate pair (a single \\ud800 … \\udfff escape): the "
            "text was cut inside a character",
        )
    return value


def _weight(item: Mapping[str, Any]) -> float:
    return _number(item, _single_key(item, _WEIGHT_KEYS, required=False), "")


def _message_weight(message: Mapping[str, Any], where: str) -> float:
    if "loss" in message:
        if not isinstance(message["loss"], bool):
            _fail("bad_weight", f"{where}.loss is {_type_name(message['loss'])}, but true or false is expected")
        if not message["loss"]:
            return 0.0
    return _number(message, _single_key(message, _WEIGHT_KEYS, required=False, where=where), where)


def _number(item: Mapping[str, Any], key: str | None, where: str) -> float:
    if key is None or item[key] is None:
        return 1.0
    value = item[key]
    name = f"{where}.{key}" if where else repr(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        _fail("bad_weight", f"{name} is {_type_name(value)}, but a number is expected")
    if not math.isfinite(value) or value < 0 or value > 1e6:
        _fail("bad_weight", f"{name} is {value:g}; a weight must be a number from 0 to 1e6")
    return float(value)


def _type_name(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "true or false",
        int: "a number",
        float: "a number",
        type(None): "null",
        bytes: "bytes",
    }
    return names.get(type(value), f"a {type(value).__name__}")


def _fail(reason: str, message: str) -> NoReturn:
    raise DataError(message, reason=reason)
