"""Tools in chats: the tools that a row offers and the calls of the assistant, in OpenAI's or LLaMA-Factory's format.

A row stores both as JSON text, and the arguments of a call as an object: templates write them as JSON, and would put
quotes around a string.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from delib_fast.data.read.strict_json import decode
from delib_fast.data.rows import DataError


def read_tools(value: Any, name: str = "tools") -> str:
    """Read the `tools` of a row: a list, or JSON text of one.

    Args:
        name: the key of the row.
    Returns:
        JSON text of [{"type": "function", "function": …}], or "" without tools. A bare function object is wrapped.
    Raises:
        DataError: reason "tools".
    """
    given = _objects(value, repr(name))
    tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in given]
    for i, tool in enumerate(tools):
        _function(tool, f"{name}[{i}]")
    return json.dumps(tools, ensure_ascii=False) if tools else ""


def read_calls(value: Any, where: str) -> str:
    """Read the `tool_calls` of an assistant message: a list, or JSON text of one.

    Args:
        where: the location of the calls, e.g. `messages[1].tool_calls`.
    Returns:
        JSON text of [{"name", "arguments": {…}, "id"}]; "" without calls. A call without an id has no "id".
    Raises:
        DataError: reason "tools".
    """
    calls = [_call(call, f"{where}[{i}]") for i, call in enumerate(_objects(value, where))]
    return json.dumps(calls, ensure_ascii=False) if calls else ""


def read_call_text(text: str, where: str) -> str:
    """Read ShareGPT's `function_call` message: JSON text of one call, or of a list of calls."""
    value = _decode(text, where)
    return read_calls(value if isinstance(value, list) else [value], where)


def _objects(value: Any, what: str) -> list[dict[str, Any]]:
    """A list of objects, or JSON text of one. Empty values of other types count as an empty list."""
    if isinstance(value, str):
        value = _decode(value, what) if value.strip() else []
    if not value:
        return []
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        _fail(f"{what} is not a list of objects")
    return value


_ARGUMENT_KEYS = ("parameters", "args", "kwargs", "input")  # of other formats


def _call(call: Mapping[str, Any], where: str) -> dict[str, Any]:
    function = _function(call if "function" in call else {"function": call}, where)
    for holder in (call, function):
        if other := next((key for key in _ARGUMENT_KEYS if holder.get(key) not in (None, "", {})), None):
            _fail(f"{where}.{other} would be ignored: the arguments of a call are read from 'arguments'; rename it")
    if function is not call and call.get("arguments") is not None:
        _fail(f"{where}.arguments would be ignored: the arguments are read from {where}.function.arguments; move them")
    arguments = function.get("arguments")
    if arguments is None:
        arguments = {}
    if isinstance(arguments, str):
        arguments = _decode(arguments, f"{where}.function.arguments") if arguments.strip() else {}
    if not isinstance(arguments, dict):
        _fail(f"{where}.function.arguments is not an object")
    read = {"name": function["name"], "arguments": arguments}
    if isinstance(given := call.get("id"), str | int) and str(given):
        read["id"] = given
    return read


def _function(tool: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    function = tool["function"]
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        _fail(f"{where} has no function with a name")
    return function


def _decode(text: str, what: str) -> Any:
    try:
        return decode(text)
    except DataError:
        _fail(f"{what} is not valid JSON")


def _fail(message: str) -> NoReturn:
    raise DataError(message, reason="tools")
