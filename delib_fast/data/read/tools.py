"""Tools in chats: what a row offers, and what the assistant calls, in OpenAI's spelling or LLaMA-Factory's.

Both are kept as JSON text. A chat template is given the objects, arguments as objects too: templates write them as
JSON, and one that is given a string writes a string with quotes around it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from delib_fast.data.read.strict_json import decode
from delib_fast.data.rows import DataError, Message, Row


def read_tools(value: Any) -> str:
    """The `tools` of a row (a list, or JSON text of one) as JSON text of [{"type": "function", "function": …}]; ""
    where there are none. A bare function object gets its wrapping. Raises DataError, reason "tools"."""
    if isinstance(value, str):
        value = _decoded(value, "'tools'") if value.strip() else []
    if not value:
        return ""
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        _fail("'tools' is no list of objects")
    tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in value]
    for i, tool in enumerate(tools):
        _function(tool, f"tools[{i}]")
    return json.dumps(tools, ensure_ascii=False)


def read_calls(value: Any, where: str) -> str:
    """The `tool_calls` of an assistant's message as JSON text of [{"name", "arguments": {…}}]; "" where there are
    none."""
    if not value:
        return ""
    if not isinstance(value, list) or not all(isinstance(call, dict) for call in value):
        _fail(f"{where}.tool_calls is no list of objects")
    return json.dumps([_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(value)], ensure_ascii=False)


def read_call_text(text: str, where: str) -> str:
    """ShareGPT's `function_call` turn: one call, or a list of them, as JSON text."""
    value = _decoded(text, where)
    return read_calls(value if isinstance(value, list) else [value], where)


def messages_calls(calls: str) -> list[dict[str, Any]]:
    """As a template reads them."""
    return [{"type": "function", "function": call} for call in json.loads(calls)]


@dataclass(frozen=True, slots=True)
class Tools:
    """What of a chat a template is given as it is, and not as a hole: names and arguments decide how it writes them."""

    offered: str = ""
    calls: tuple[str, ...] = ()
    """of each message, and of the reply; empty where nothing is called"""
    names: tuple[str, ...] = ()
    """of the tool whose result each message is; empty where no message names one"""

    @classmethod
    def of(cls, row: Row, messages: Sequence[Message]) -> Tools:
        calls = (*(m.calls for m in messages), row.calls)
        names = tuple(m.name for m in messages)
        return cls(row.tools, calls if any(calls) else (), names if any(names) else ())

    def __bool__(self) -> bool:
        return bool(self.offered or self.calls or self.names)

    def mapped(self, change: Callable[[str], str]) -> Tools:
        return Tools(change(self.offered), tuple(map(change, self.calls)), tuple(map(change, self.names)))

    @property
    def replies_with_calls(self) -> bool:
        return bool(self.calls and self.calls[-1])

    def offer(self) -> dict[str, Any]:
        """The keyword argument of `apply_chat_template`."""
        return {"tools": json.loads(self.offered)} if self.offered else {}

    def add_to(self, message: dict[str, Any], index: int) -> dict[str, Any]:
        """The message (or the reply, index -1) with what it calls, or whose result it is."""
        if self.calls and self.calls[index]:
            message = message | {"tool_calls": messages_calls(self.calls[index])}
        if self.names and index >= 0 and self.names[index]:
            message = message | {"name": self.names[index]}
        return message


NO_TOOLS = Tools()


def _call(call: Mapping[str, Any], where: str) -> dict[str, Any]:
    function = _function(call if "function" in call else {"function": call}, where)
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _decoded(arguments, f"{where}: its arguments") if arguments.strip() else {}
    if not isinstance(arguments, dict):
        _fail(f"{where}: its arguments are no object")
    return {"name": function["name"], "arguments": arguments}


def _function(tool: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    function = tool["function"]
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        _fail(f"{where} has no function with a name")
    return function


def _decoded(text: str, what: str) -> Any:
    try:
        return decode(text)
    except DataError:
        _fail(f"{what}: not valid JSON")


def _fail(message: str) -> NoReturn:
    raise DataError(message, reason="tools")
