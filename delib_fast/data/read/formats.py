"""Turn one decoded object (a line of JSONL, an item of a JSON list, a Parquet row) into rows.

The keys determine the format:

    {"text"}                                              a document
    {"prompt" | "question" | "instruction"[, "input" | "context"],
     "response" | "answer" | "completion" | "output"
     [, "cot"][, "system"][, "history"][, "tools"]}       one prompt and its reply
    {"messages" | "conversation" | "conversations"
     [, "system"][, "tools"]}                             a chat; the last assistant turn is the reply

A reply without a "cot" field may contain its chain of thought between tags (cot_tags.py) or, as in GSM8K, as the steps
before a single last line `#### result`. A chat may have "tools", and assistant messages "tool_calls" (tools.py); then
the last message and every call since the user's last message become rows of their own. "weight" or "loss_weight" scales
the loss of a row or a message; flags such as "train" and "mask" turn it on or off. A null field counts as absent.
Fields that no format reads are refused if they carry meaning, and counted otherwise ("id", "score" …; unread.py).
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from delib_fast.data.read.cot_tags import TAGS
from delib_fast.data.read.fields import SYSTEM_KEYS, TOOL_KEYS, Fields, fail, says_nothing, type_name
from delib_fast.data.read.messages import Turn, join_cot, read_turn
from delib_fast.data.read.strict_json import SAFE_KEY
from delib_fast.data.read.tools import read_tools
from delib_fast.data.read.unread import COT_KEYS, is_switch, settle
from delib_fast.data.rows import Message, Row, content_digest

PROMPT_KEYS = ("prompt", "question", "instruction")
RESPONSE_KEYS = ("response", "answer", "completion", "output")
CHAT_KEYS = ("messages", "conversation", "conversations")
_GSM8K_RESULT = re.compile(r"^####[ \t]+\S.*$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class FormatSettings:
    """How the objects of one source become rows."""

    source: str
    turns: str = "last"
    """Which assistant messages of a chat become replies: the "last", or "each" in a row of its own."""
    tags: tuple[tuple[str, str], ...] = TAGS
    """Pairs of tags around a chain of thought."""
    ignored: Counter[str] = field(default_factory=Counter)
    """How often each field of the current object is ignored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chat:
    """The turns of one object, of which the last is an assistant message."""

    turns: list[Turn]
    weight: float
    tools: str
    context: int = 0
    """Number of turns at the start that are only context, so that none of them is a reply."""


def rows_of(item: Any, settings: FormatSettings, location: str) -> list[Row]:
    """Turn one object into rows. Raises DataError without a location; the caller adds it, and a fingerprint."""
    if not isinstance(item, dict):
        fail("not_an_object", f"{type_name(item)}, but an object with named fields is expected")
    fields = Fields(item)
    return list(_format_of(fields)(fields, settings, location))


def _format_of(fields: Fields) -> Callable[[Fields, FormatSettings, str], Iterator[Row]]:
    chat = [key for key in CHAT_KEYS if key in fields]
    prompt = [key for key in PROMPT_KEYS if key in fields]
    text = [key for key in ("text",) if key in fields]
    if chat and prompt and not text and _repeats_prompt(fields.peek(chat[0]), fields.peek(prompt[0])):
        prompt = []
    kinds = [keys for keys in (chat, prompt, text) if keys]
    if len(kinds) > 1:
        fail(
            "ambiguous",
            "has both "
            + " and ".join(f"{keys[0]!r}" for keys in kinds)
            + ": which of them is the row is ambiguous; keep one",
        )
    if not kinds:
        fail("missing_field", _unknown_keys(fields))
    return _chat_rows if chat else _pair_rows if prompt else _document_rows


def _repeats_prompt(messages: Any, prompt: Any) -> bool:
    """Whether a chat's "prompt" field only repeats its first user message, as in ultrachat_200k."""
    users = [m for m in messages if isinstance(m, dict) and m.get("role") == "user"] if type(messages) is list else []
    first = users[0].get("content") if users else None
    return isinstance(prompt, str) and isinstance(first, str) and prompt.strip() == first.strip()


def _unknown_keys(fields: Fields) -> str:
    known = (*CHAT_KEYS, *PROMPT_KEYS, "text")
    keys = [key if SAFE_KEY.fullmatch(key) else "(a key that is not a name)" for key in (*fields, *fields.nulls)][:8]
    close = [
        (key, near[0])
        for key in keys
        if key not in known and (near := difflib.get_close_matches(key, known, n=1, cutoff=0.75))
    ]
    hint = f"; did you mean {close[0][1]!r} instead of {close[0][0]!r}?" if close else ""
    which = "all null" if fields.nulls and not len(fields) else f"{len(fields.nulls)} of them null"
    nulls = f" ({which})" if fields.nulls else ""
    has = f"its fields are {', '.join(map(repr, keys))}{nulls}" if keys else "it is empty"
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


def _document_rows(fields: Fields, settings: FormatSettings, location: str) -> Iterator[Row]:
    text = fields.string("text")
    if not text.strip():
        fail("empty", "'text' is empty: there is nothing to train on")
    if (weight := fields.loss_weight()) == 0:
        fail("nothing_supervised", "its weight is 0: there is nothing to train on")
    settle(fields, "document", settings.ignored)
    yield document_row(text, source=settings.source, location=location, weight=weight)


def _pair_rows(fields: Fields, settings: FormatSettings, location: str) -> Iterator[Row]:
    prompt_key = fields.single_key(PROMPT_KEYS)
    response_key = fields.single_key(RESPONSE_KEYS, because=f"{prompt_key!r} has no reply")
    turns = _prompt_turns(fields, prompt_key, settings)
    reply = _reply(fields, response_key, settings)
    tools, weight = _tools(fields), fields.loss_weight()
    settle(fields, "pair", settings.ignored, has_cot=reply.cot is not None)
    # The messages of a list are the prompt, all of it context; "history" is what came before in a chat.
    context = len(turns) if isinstance(fields.peek(prompt_key), list) else 0
    yield from _rows_of_chat(
        _Chat(turns=[*turns, reply], weight=weight, tools=tools, context=context), settings, location
    )


def _prompt_turns(fields: Fields, key: str, settings: FormatSettings) -> list[Turn]:
    value = fields.get(key)
    if isinstance(value, list):
        turns = [read_turn(message, f"{key}[{i}]", settings.tags, settings.ignored) for i, message in enumerate(value)]
        return _with_system(fields, turns)
    prompt = fields.string(key)
    more = fields.text(("input", "context")) if key == "instruction" else None
    if more is not None:
        prompt = f"{prompt}\n\n{more}" if prompt.strip() else more
    if not prompt.strip():
        fail("empty", f"{key!r} is empty")
    return _with_system(fields, [*_history(fields, settings), Turn("user", prompt)])


def _history(fields: Fields, settings: FormatSettings) -> list[Turn]:
    """The earlier turns of an Alpaca row, as LLaMA-Factory has them: [[prompt, reply], …]."""
    pairs = fields.get("history")
    if says_nothing(pairs):
        return []
    if not isinstance(pairs, list):
        fail("wrong_type", f"'history' is {type_name(pairs)}, but a list of pairs (prompt, reply) is expected")
    turns = []
    for i, pair in enumerate(pairs):
        if not isinstance(pair, list) or len(pair) != 2:
            fail("wrong_type", f"history[{i}] is not a pair (prompt, reply)")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            message = {"role": role, "content": text}
            turns.append(read_turn(message, f"history[{i}]", settings.tags, settings.ignored))
    return turns


def _with_system(fields: Fields, turns: list[Turn]) -> list[Turn]:
    """The turns, with the row's system field as a system message. An empty field is no system message."""
    system = fields.text(SYSTEM_KEYS)
    if system is None:
        return turns
    first = next((turn for turn in turns if turn.role == "system"), None)
    if first is None:
        return [Turn("system", system), *turns]
    if first.content.strip() != system.strip():
        key = fields.text_key(SYSTEM_KEYS)
        fail("ambiguous", f"has two system prompts: {key!r} and a system message, which differ; keep one")
    return turns


def _tools(fields: Fields) -> str:
    """The tools of OpenAI's `tools`, or of its older `functions`."""
    given = [key for key in TOOL_KEYS if not says_nothing(fields.get(key))]
    if len(given) > 1:
        fail("ambiguous", "has both 'tools' and 'functions'; keep one")
    return read_tools(fields.get(given[0]), given[0]) if given else ""


def _reply(fields: Fields, key: str, settings: FormatSettings) -> Turn:
    value = fields.peek(key)
    if isinstance(value, list):  # TRL's conversational {"prompt": [...], "completion": [...]}
        fields.get(key)
        if len(value) != 1:
            fail("wrong_type", f"{key!r} has {len(value)} messages, but exactly one reply is expected")
        reply = read_turn(value[0], f"{key}[0]", settings.tags, settings.ignored)
        if reply.role != "assistant":
            fail("bad_role", f"{key}[0] is a {reply.role} message, but the reply must be an assistant message")
        _refuse_other_cot(fields, reply)
        return reply
    given, cot_key = fields.text(COT_KEYS), fields.text_key(COT_KEYS)
    cot, response = join_cot(given, fields.string(key), cot_key, "", settings.tags)
    if cot is None and key == "answer":
        cot, response = _split_gsm8k(response)
    return Turn("assistant", response, cot)


def _refuse_other_cot(fields: Fields, reply: Turn) -> None:
    """Refuse a chain of thought outside of the messages, unless it repeats that of the reply."""
    for key in COT_KEYS:
        value = fields.peek(key)
        if key in fields and not says_nothing(value) and not is_switch(value):
            if not isinstance(value, str) or value.strip() != (reply.cot or "").strip():
                where = "is outside of the messages and would be ignored; move it into the assistant message"
                fail("unread_field", f"{key!r} {where}")
            fields.get(key)


def _refuse_other_reply(fields: Fields, reply: Turn) -> None:
    """Refuse a reply outside of the messages, unless it repeats the last message. An "answer" may be a reference."""
    for key in ("response", "completion"):
        value, content = fields.get(key), reply.content.strip()
        if reply.role != "assistant" or says_nothing(value):
            continue
        if not isinstance(value, str) or not content or not value.strip().endswith(content):
            where = "is outside of the messages and would be ignored; move it into them, or remove it"
            fail("unread_field", f"{key!r} {where}")


def _split_gsm8k(answer: str) -> tuple[str | None, str]:
    """Split an answer into its steps, which are the chain of thought, and its last line, `#### result`.

    It has this form only if exactly one of its lines begins with ####, and that is the last one: otherwise these lines
    are headings of a Markdown text, which is the response.
    """
    results = list(_GSM8K_RESULT.finditer(answer))
    if len(results) != 1 or answer[results[0].end() :].strip():
        return None, answer
    at = results[0].start()
    return answer[:at].strip() or None, answer[at:]


def _chat_rows(fields: Fields, settings: FormatSettings, location: str) -> Iterator[Row]:
    key = fields.single_key(CHAT_KEYS)
    messages = fields.get(key)
    if not isinstance(messages, list):
        fail("wrong_type", f"{key!r} is {type_name(messages)}, but a list of messages is expected")
    if not messages:
        fail("empty", f"{key!r} is an empty list")
    turns = [read_turn(message, f"{key}[{i}]", settings.tags, settings.ignored) for i, message in enumerate(messages)]
    turns = _with_system(fields, turns)
    _refuse_other_cot(fields, turns[-1])
    _refuse_other_reply(fields, turns[-1])
    tools, weight = _tools(fields), fields.loss_weight()
    settle(fields, "chat", settings.ignored, has_cot=turns[-1].cot is not None)
    yield from _rows_of_chat(_Chat(turns=turns, weight=weight, tools=tools), settings, location)


def _rows_of_chat(chat: _Chat, settings: FormatSettings, location: str) -> Iterator[Row]:
    turns = chat.turns
    parts = [part for t in turns for part in (t.role, t.cot, t.content, *([t.calls] if t.calls else []))]
    digest = content_digest([*parts, chat.tools] if chat.tools else parts)
    chosen = _chosen_replies(chat, settings.turns)
    rows = 0
    for i in chosen:
        reply = turns[i]
        if chat.weight * reply.weight == 0:
            continue  # a message (or row) that is marked as not to be trained on
        if not reply.content.strip() and not (reply.cot or "").strip() and not reply.calls:
            which = f" (message {i})" if len(turns) > 2 else ""
            fail("empty", f"the reply is empty{which}: there is nothing to train on")
        rows += 1
        yield Row(
            kind="chat",
            location=location if len(chosen) == 1 else f"{location} (message {i})",
            source=settings.source,
            digest=digest,
            weight=chat.weight * reply.weight,
            messages=tuple(Message(t.role, t.content, t.cot, t.calls, t.fields) for t in turns[:i]),
            cot=reply.cot if (reply.cot or "").strip() else None,
            response=reply.content,
            calls=reply.calls,
            tools=chat.tools,
            fields=reply.fields,
        )
    if not rows:
        fail("nothing_supervised", "every reply has weight 0: there is nothing to train on")


def _chosen_replies(chat: _Chat, turns_setting: str) -> list[int]:
    """The indices of the assistant messages that become replies."""
    turns = chat.turns
    replies = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
    if turns[-1].role != "assistant":
        fail("no_reply", f"the last message is a {turns[-1].role} message: there is no reply")
    first_question = min((i for i, turn in enumerate(turns) if turn.role in ("user", "tool")), default=len(turns))
    if replies[-1] < first_question:
        fail("no_prompt", "there is no user message before the reply, so there is no prompt")
    last_question = max(
        (i for i, turn in enumerate(turns[: replies[-1]]) if turn.role == "user"), default=first_question
    )
    chosen = (
        [i for i in replies if i > first_question]
        if turns_setting == "each"
        else [i for i in replies if i > last_question and (turns[i].calls or i == replies[-1])]
    )
    return [i for i in chosen if i >= chat.context]
