"""Generate docs/templates.md, what each chat template gives: `python tests/data/template_table.py`.

Each case is encoded and compared with stock transformers. test_templates.py compares the page with the current results.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jinja2

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from helpers.published_templates import OWN, published, template_tokenizer  # noqa: E402

from delib_fast.data import DataError, Example, Row, Segment, encode_row  # noqa: E402
from delib_fast.data.read.formats import FormatSettings, rows_of  # noqa: E402

PAGE = ROOT / "docs" / "templates.md"
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Its name."}},
            "required": ["city"],
        },
    },
}
COT, ANSWER = "Let me think.", "Good day."
USER = {"role": "user", "content": "Hello, you"}
SYSTEM = {"role": "system", "content": "Be brief."}
REPLY = {"role": "assistant", "content": ANSWER}
THOUGHT = REPLY | {"reasoning_content": COT}
EARLIER = [USER, THOUGHT | {"content": "Earlier.", "reasoning_content": "Old thought."}, USER | {"content": "More?"}]


def call(city: str, k: int = 0, **more: Any) -> dict[str, Any]:
    function = {"name": "get_weather", "arguments": {"city": city}}
    ids = {"id": f"functions.get_weather:{k}", "type": "function", "function": function}
    return {"role": "assistant", "content": "", "tool_calls": [ids], **more}


def result(content: str, k: int = 0) -> dict[str, Any]:
    return {"role": "tool", "name": "get_weather", "tool_call_id": f"functions.get_weather:{k}", "content": content}


def block(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


STEP = [USER, call("Rome", reasoning_content="First."), result('{"temp": 20}')]
CASES: dict[str, list[dict[str, Any]]] = {
    "plain": [USER, REPLY],
    "system": [SYSTEM, USER, REPLY],
    "`/no_think`": [SYSTEM | {"content": "Be brief. /no_think"}, USER, REPLY],
    "CoT": [USER, THOUGHT],
    "system, CoT": [SYSTEM, USER, THOUGHT],
    "turns": [USER, REPLY | {"content": "Earlier."}, USER | {"content": "More?"}, REPLY],
    "turns, CoT": [*EARLIER, THOUGHT],
    "call": [USER, call("Rome")],
    "call, null content": [USER, call("Rome", content=None)],
    "call, CoT": [USER, call("Rome", reasoning_content=COT)],
    "call, text": [USER, call("Rome", content="I look.")],
    "two calls": [USER, call("Rome") | {"tool_calls": [*call("Rome")["tool_calls"], *call("Oslo", 1)["tool_calls"]]}],
    "result": [*STEP, REPLY],
    "result, CoT": [*STEP, THOUGHT],
    "second call": [*STEP, call("Oslo", 1, reasoning_content="Second.")],
    "empty content": [USER | {"content": ""}, REPLY],
    "list": [USER | {"content": block("Hello")}, REPLY | {"content": block(ANSWER)}],
    "list, CoT": [USER | {"content": block("Hello")}, THOUGHT | {"content": block(ANSWER)}],
    "long list": [USER | {"content": [*block("Hello"), *block(" you")]}, REPLY],
    "long list as reply": [USER, REPLY | {"content": [*block("Good"), *block(" day")]}],
}

HEAD = """\
# Chat templates

This page shows how rows are rendered by published chat templates: those that TRL {trl} ships and, in italics, small
ones with traits of models that TRL does not cover. Each kind of row (a column) is encoded, and its ids are compared
with those of `tokenizer.apply_chat_template` in transformers. TRL's variants for training (`*_training`) are tested
too. The tokenizer is a small byte-level BPE with the control tokens of the template.
`python tests/data/template_table.py` generates the page, and a test compares it with the code.

| entry | meaning |
|---|---|
| = | the row has the ids of `apply_chat_template` for its messages, unchanged |
| tags | likewise, with the chain of thought between `<think>` tags at the beginning of the content, since the \
template does not read `reasoning_content` |
| prompt | the template removes the chain of thought from final replies, so it is inserted after the generation \
prompt, where the model will write it; all other ids are those of the row without it |
| text | the ids of `apply_chat_template` with the contents as strings, since the template fails for lists, or writes \
them as source code |
| list | likewise, with the contents as lists of text blocks |
| a number | the row is refused for the reason with this number, below |

In every run, the rendering of each row is compared with that of stock transformers before its ids are used.
"""


def read(messages: list[dict[str, Any]]) -> Row:
    """The row of a chat whose last message is the reply."""
    item: dict[str, Any] = {"messages": messages}
    if any("tool_calls" in m for m in messages):
        item["tools"] = [TOOL]
    return rows_of(json.loads(json.dumps(item)), FormatSettings(source="s"), "rows.jsonl:1")[-1]


@dataclass
class Outcome:
    """What encoding gives: an example, and how it was compared with stock; or a refusal."""

    entry: str
    example: Example | None = None
    reason: str = ""


def outcome(tokenizer: Any, messages: list[dict[str, Any]]) -> Outcome:
    """Encode a chat, and compare it with stock. The entry is "different" if no comparison holds."""
    try:
        example = encode_row(read(messages), tokenizer)
    except DataError as error:
        return Outcome("refused", reason=str(error).removeprefix("rows.jsonl:1").split(": ", 1)[-1])
    ids = example.input_ids.tolist()
    for entry, changed in _variants(messages):
        if ids == stock_ids(tokenizer, changed):
            return Outcome(entry, example)
    if messages[-1].get("reasoning_content") and _is_stock_with_inserted_thought(tokenizer, messages, example):
        return Outcome("prompt", example)
    return Outcome("different", example)


def stock(tokenizer: Any, messages: list[dict[str, Any]], **kwargs: Any) -> str | None:
    """The text of `apply_chat_template`; None if it raises an error, or writes a content as source code."""
    kwargs = {"tools": [TOOL] if any("tool_calls" in m for m in messages) else None} | kwargs
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, **kwargs))
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError):
        return None
    return None if "'type': 'text'" in text or '"type": "text"' in text else text


def stock_ids(tokenizer: Any, messages: list[dict[str, Any]]) -> list[int] | None:
    text = stock(tokenizer, messages)
    return None if text is None else list(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)


def _variants(messages: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    strings = [m | {"content": _joined(m["content"])} for m in messages]
    blocks = [m if isinstance(m["content"], list) else m | {"content": block(m["content"] or "")} for m in messages]
    found = [("=", messages), ("text", strings), ("list", blocks)]
    if cot := messages[-1].get("reasoning_content"):
        last = {k: v for k, v in strings[-1].items() if k != "reasoning_content"}
        last["content"] = f"<think>\n{cot}\n</think>\n\n{last['content']}"
        as_block = [*messages[:-1], last | {"content": block(last["content"])}]
        found += [("tags", [*messages[:-1], last]), ("tags", as_block), ("text, tags", [*strings[:-1], last])]
        found.append(("list, tags", [*blocks[:-1], last | {"content": block(last["content"])}]))
    return found


def _joined(content: Any) -> str:
    return "\n".join(b["text"] for b in content) if isinstance(content, list) else content or ""


def _is_stock_with_inserted_thought(tokenizer: Any, messages: list[dict[str, Any]], example: Example) -> bool:
    """Whether the example is a generation prompt, the thought, and what stock writes after a prompt without thought."""
    tools = [TOOL] if any("tool_calls" in m for m in messages) else None
    thought = [token for token, k in zip(example.input_ids, example.segments, strict=True) if k == Segment.COT]
    strings = [m | {"content": _joined(m["content"])} for m in messages]
    for given in (messages, strings):
        bare = [{k: v for k, v in m.items() if k != "reasoning_content"} for m in given]
        prompt = stock(tokenizer, given[:-1], add_generation_prompt=True, tools=tools)
        finished = stock(tokenizer, [*given[:-1], bare[-1]])
        bare_prompt = stock(tokenizer, bare[:-1], add_generation_prompt=True, tools=tools)
        if prompt is None or finished is None or bare_prompt is None:
            continue
        stems = [text.removesuffix("<think>\n") for text in (prompt, bare_prompt)]
        stem = next((stem for stem in stems if finished.startswith(stem)), None)
        if stem is not None and messages[-1]["reasoning_content"] in tokenizer.decode(thought):
            rest = finished.removeprefix(stem).removeprefix("<think></think>")
            start, end = (
                tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids for text in (prompt, rest)
            )
            if example.input_ids.tolist() == [*start, *thought, *end]:
                return True
    return False


def table(names: list[str]) -> str:
    """The page."""
    reasons: dict[str, int] = {}
    lines = [f"| template | {' | '.join(CASES)} |", "|---" * (len(CASES) + 1) + "|"]
    for name in names:
        entries = []
        for messages in CASES.values():
            found = outcome(template_tokenizer(name), messages)
            entries.append(found.entry if not found.reason else str(reasons.setdefault(found.reason, len(reasons) + 1)))
        lines.append(f"| {f'*{name}*' if name in OWN else name} | {' | '.join(entries)} |")
    listed = "\n".join(f"{number}. {reason}" for reason, number in reasons.items())
    return f"{HEAD.format(trl=version('trl'))}\n{chr(10).join(lines)}\n\n## Reasons of refusals\n\n{listed}\n"


def trl_version() -> str:
    """The installed version of TRL; "" without it."""
    try:
        return version("trl")
    except PackageNotFoundError:
        return ""


def page_names() -> list[str]:
    """The templates of the page."""
    return [*(name for name in published() if not name.endswith("_training")), *OWN]


if __name__ == "__main__":
    PAGE.write_text(table(page_names()))
