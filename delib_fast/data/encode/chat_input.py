"""What a chat template receives for a row: messages with their texts, thoughts, tool calls and other fields."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from delib_fast.data.encode.control_tokens import ControlTokens
from delib_fast.data.rows import Message, Row

THINK = ("<think>", "</think>")
Shape = tuple[str, bool, str]


def shape_of(text: str) -> Shape:
    """Return (leading white space, whether there is more, trailing white space)."""
    core = text.strip()
    if not core:
        return text, False, ""
    start = len(text) - len(text.lstrip())
    return text[:start], True, text[start + len(core) :]


@dataclass(frozen=True, slots=True)
class Style:
    """How a chat is passed to a template. Templates differ in what they read."""

    cot: Literal["field", "content", "prompt"] = "field"
    """Where the chain of thought of the reply is: in the field `reasoning_content`, between think tags inside the
    content, or appended to the generation prompt, because the template removes it from every finished turn."""
    contents: Literal["given", "strings", "blocks"] = "given"
    """The form of contents: that of the row (a string, null or a list of text blocks), strings (for templates that read
    nothing else), or lists of text blocks (likewise)."""
    arguments: Literal["object", "text"] = "object"
    """What the arguments of a tool call are. Some templates can only write JSON text (DeepSeek-V3)."""


@dataclass(frozen=True, slots=True)
class ChatInput:
    """A chat as text, for a chat template."""

    roles: tuple[str, ...]
    """The roles of the messages before the reply."""
    texts: tuple[str, ...]
    """The content and the chain of thought of each message, then the chain of thought and the response of the reply."""
    tools: str = ""
    """The tools that are available, as JSON."""
    calls: tuple[str, ...] = ()
    """The tool calls of each message and of the reply, as JSON; empty if there are no calls at all."""
    fields: tuple[str, ...] = ()
    """Other fields of each message and of the reply, as JSON (`Message.fields`); empty if no message has any."""

    @classmethod
    def of(cls, row: Row, messages: Sequence[Message], cot: str) -> ChatInput:
        """Collect the parts of a row. `messages` are those before the reply, with the system prompt."""
        return cls(
            tuple(m.role for m in messages),
            (*message_texts(messages), cot, row.response),
            row.tools,
            _or_nothing((*(m.calls for m in messages), row.calls)),
            _or_nothing((*(m.fields for m in messages), row.fields)),
        )

    @property
    def has_cot(self) -> bool:
        """Whether the reply has a chain of thought."""
        return bool(self.texts[-2].strip())

    @property
    def has_calls(self) -> bool:
        """Whether the reply calls a tool."""
        return bool(self.calls and self.calls[-1])

    @property
    def has_reply_of_blocks(self) -> bool:
        """Whether the reply is a list of several text blocks."""
        return bool(self.fields and self.fields[-1]) and len(json.loads(self.fields[-1]).get("content") or ()) > 1

    @property
    def key(self) -> tuple[Any, ...]:
        """Everything but the texts themselves, of which only the shape counts."""
        return (self.roles, tuple(map(shape_of, self.texts)), self.tools, self.calls, self.fields)

    def with_texts(self, texts: Sequence[str]) -> ChatInput:
        """Return a copy with other texts."""
        return replace(self, texts=tuple(texts))


@dataclass(frozen=True, slots=True)
class TemplateInput:
    """Builds the arguments of `apply_chat_template`. Control tokens in tools, calls and fields are escaped."""

    chat: ChatInput
    style: Style
    control: ControlTokens
    has_slots: bool = False
    """Whether the texts of the reply are placeholders, which cannot be in several text blocks."""

    def messages(self, *, earlier_cots: bool = True) -> list[dict[str, Any]]:
        """The messages before the reply, with or without their chains of thought."""
        built = []
        for k, role in enumerate(self.chat.roles):
            message = {"role": role, "content": self.chat.texts[2 * k]}
            if earlier_cots and self.chat.texts[2 * k + 1]:
                message["reasoning_content"] = self.chat.texts[2 * k + 1]
            built.append(self._complete(message, k))
        return built

    def reply(self) -> dict[str, Any]:
        """The reply, with its chain of thought unless it is appended to the generation prompt."""
        cot, response = self.chat.texts[-2:]
        message = {"role": "assistant", "content": response}
        if self.chat.has_cot and self.style.cot == "field":
            message["reasoning_content"] = cot
        elif self.chat.has_cot and self.style.cot == "content":
            message["content"] = f"{THINK[0]}\n{cot}\n{THINK[1]}\n\n{response}"
        return self._complete(message, len(self.chat.roles))

    def kwargs(self) -> dict[str, Any]:
        """The keyword argument for the available tools."""
        return {"tools": self.control.escape(json.loads(self.chat.tools))} if self.chat.tools else {}

    def _complete(self, message: dict[str, Any], k: int) -> dict[str, Any]:
        if self.chat.fields and self.chat.fields[k]:
            more = self.control.escape(json.loads(self.chat.fields[k]))
            if "content" in more:
                message["content"] = self._content(message["content"], more.pop("content"), k)
            message |= more
        if self.style.contents == "blocks" and isinstance(message["content"], str):
            message["content"] = [{"type": "text", "text": message["content"]}]
        if self.chat.calls and self.chat.calls[k]:
            message["tool_calls"] = self.control.escape(template_calls(self.chat.calls[k], self.style.arguments))
        return message

    def _content(self, text: str, given: list[dict[str, Any]] | None, k: int) -> Any:
        """The content in the form that the row has: null or a list of text blocks (`Message.fields`)."""
        if self.style.contents == "strings":
            return text
        if given is None:
            return text or None
        if len(given) > 1 and self.has_slots and k == len(self.chat.roles):
            return text
        return given if len(given) > 1 else [{**given[0], "text": text}]


def styles(chat: ChatInput) -> Iterator[Style]:
    """Yield the styles in which a chat is passed to a template, the best first."""
    for arguments in ("object", "text") if chat.calls else ("object",):
        for contents in ("given", "strings", "blocks") if chat.fields else ("given", "blocks"):
            yield Style(contents=contents, arguments=arguments)


def template_calls(calls: str, arguments: Literal["object", "text"] = "object") -> list[dict[str, Any]]:
    """Convert calls from JSON text to the objects of OpenAI that chat templates expect."""
    return [
        ({"id": call["id"]} if "id" in call else {})
        | {
            "type": "function",
            "function": {
                "name": call["name"],
                "arguments": call["arguments"]
                if arguments == "object"
                else json.dumps(call["arguments"], ensure_ascii=False),
            },
        }
        for call in json.loads(calls)
    ]


def message_texts(messages: Sequence[Message]) -> list[str]:
    """Return the content and the chain of thought of each message."""
    return [text for message in messages for text in (message.content, message.cot or "")]


def _or_nothing(items: tuple[str, ...]) -> tuple[str, ...]:
    return items if any(items) else ()
