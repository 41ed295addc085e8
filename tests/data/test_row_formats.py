"""Public row formats: nothing of a row is moved or dropped silently. Each field is read, refused or counted."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_files import line, read, write

from delib_fast.config import SourceConfig
from delib_fast.data import DataError, SourceReader
from delib_fast.data.read.cot_tags import TAGS, split_cot

CALL = {"name": "f", "arguments": {"x": 1}}
CALLS = '[{"name": "f", "arguments": {"x": 1}}]'
TOOLS = [{"type": "function", "function": {"name": "f"}}]
MARKDOWN = "Intro.\n\n#### Causes\n\nMany.\n\n#### Effects\n\nFew."
HI, BYE = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "bye"}


def assistant(content="r", **more):
    return {"role": "assistant", "content": content, **more}


def chat(*messages, **more):
    return {"messages": list(messages), **more}


def pair(**more):
    return {"prompt": "p", "response": "r", **more}


def seen(rows):
    """What the model sees of each row: messages, CoT and response, and calls and tools if there are any."""

    def show(message):
        name = json.loads(message.fields or "{}").get("name")
        speaker = f"{message.role}={name}" if name else message.role
        return f"{speaker}: {message.cot or ''}>{message.content}{message.calls}"

    return [
        (
            " | ".join(map(show, row.messages)),
            row.cot,
            row.response,
            *((row.calls, row.tools) if row.calls or row.tools else ()),
        )
        for row in rows
    ]


READ = {
    # GSM8K's form is one last line `#### result`; a Markdown text with such headings is a response.
    "gsm8k": ({"question": "q", "answer": "1+1=2\n#### 2\n"}, [("user: >q", "1+1=2", "#### 2\n")]),
    "gsm8k without steps": ({"question": "q", "answer": "#### 2"}, [("user: >q", None, "#### 2")]),
    "markdown with headings": ({"question": "q", "answer": MARKDOWN}, [("user: >q", None, MARKDOWN)]),
    "one heading with text below": (
        {"question": "q", "answer": "Intro.\n#### Why\nSo."},
        [("user: >q", None, "Intro.\n#### Why\nSo.")],
    ),
    "headings before a result": (
        {"question": "q", "answer": "#### A\nx\n#### 2"},
        [("user: >q", None, "#### A\nx\n#### 2")],
    ),
    "#### in the last line": ({"question": "q", "answer": "a\nb #### 2"}, [("user: >q", None, "a\nb #### 2")]),
    "gsm8k in another field": ({"question": "q", "response": "a\n#### 2"}, [("user: >q", None, "a\n#### 2")]),
    "a cot and a result": ({"question": "q", "answer": "a\n#### 2", "cot": "c"}, [("user: >q", "c", "a\n#### 2")]),
    "an empty instruction": ({"instruction": "", "input": "x", "output": "r"}, [("user: >x", None, "r")]),
    "a reply that is repeated": (chat(HI, assistant("r"), response=" r\n"), [("user: >hi", None, "r")]),
    "a reference answer": (chat(HI, assistant("It is 4."), answer="4"), [("user: >hi", None, "It is 4.")]),
    "another spelling of a thought that is there": (pair(cot="c", Reasoning="good"), [("user: >p", "c", "r")]),
    # An empty field of a chain of thought says nothing; the content may contain one.
    "empty reasoning_content": (
        chat(HI, assistant("<think>c</think>r", reasoning_content="")),
        [("user: >hi", "c", "r")],
    ),
    "blank reasoning": (chat(HI, assistant("<think>c</think>r", reasoning=" \n")), [("user: >hi", "c", "r")]),
    "null thinking": (chat(HI, assistant("<think>c</think>r", thinking=None)), [("user: >hi", "c", "r")]),
    "empty cot of a pair": ({"prompt": "p", "cot": "", "response": "<think>c</think>r"}, [("user: >p", "c", "r")]),
    "empty cot and gsm8k": ({"question": "q", "cot": "", "answer": "a\n#### 2"}, [("user: >q", "a", "#### 2")]),
    "empty reasoning in an earlier turn": (
        chat(HI, assistant("<think>c</think>r", reasoning_content=""), HI, BYE),
        [("user: >hi | assistant: c>r | user: >hi", None, "bye")],
    ),
    "a thought and an empty think block": (
        chat(HI, assistant("<think>\n\n</think>\n\nr", reasoning_content="c")),
        [("user: >hi", "c", "r")],
    ),
    "the same thought twice": (
        {"prompt": "p", "cot": "c\n", "response": "<think>\nc\n</think>\nr"},
        [("user: >p", "c\n", "r")],
    ),
    "a cot, and a response about tags": (
        {"prompt": "p", "cot": "c", "response": "Use <think> and </think>."},
        [("user: >p", "c", "Use <think> and </think>.")],
    ),
    "an empty thinking block": (
        chat(HI, assistant([{"type": "thinking", "thinking": ""}, {"type": "text", "text": "<think>c</think>r"}])),
        [("user: >hi", "c", "r")],
    ),
    "openthoughts": (
        {
            "conversations": [
                {"from": "user", "value": "q"},
                {
                    "from": "assistant",
                    "value": "<|begin_of_thought|>c<|end_of_thought|>\n\n<|begin_of_solution|>r<|end_of_solution|>",
                },
            ],
            "system": "s",
        },
        [("system: >s | user: >q", "c", "<|begin_of_solution|>r<|end_of_solution|>")],
    ),
    "another tag mentioned in a thought": (
        {"prompt": "p", "response": "<reasoning>not </think>\n, but</reasoning>r"},
        [("user: >p", "not </think>\n, but", "r")],
    ),
    "a thought outside of the messages, repeated": (
        chat(HI, assistant("r", reasoning_content="c"), cot="c"),
        [("user: >hi", "c", "r")],
    ),
    "a thought in two fields": (
        chat(HI, assistant("r", reasoning="c", reasoning_content="c", thinking="")),
        [("user: >hi", "c", "r")],
    ),
    # System prompts.
    "empty system": (pair(system=""), [("user: >p", None, "r")]),
    "blank system of a chat": (chat(HI, BYE, system=" \n"), [("user: >hi", None, "bye")]),
    "openorca": (
        {"system_prompt": "s", "question": "q", "response": "r", "id": "flan.1"},
        [("system: >s | user: >q", None, "r")],
    ),
    "openorca without a system prompt": (
        {"system_prompt": "", "question": "q", "response": "r"},
        [("user: >q", None, "r")],
    ),
    "one of two system fields is empty": (pair(system="", system_prompt="s"), [("system: >s | user: >p", None, "r")]),
    "the same system prompt twice": (
        chat({"role": "system", "content": "s"}, HI, BYE, system="s "),
        [("system: >s | user: >hi", None, "bye")],
    ),
    "system and developer": (
        chat({"role": "developer", "content": "d"}, HI, BYE, system="s"),
        [("system: >s | developer: >d | user: >hi", None, "bye")],
    ),
    # Alpaca, with what LLaMA-Factory and Dolly add.
    "alpaca without input": ({"instruction": "i", "input": "", "output": "r"}, [("user: >i", None, "r")]),
    "dolly": (
        {"instruction": "i", "context": "c", "response": "r", "category": "qa"},
        [("user: >i\n\nc", None, "r")],
    ),
    "alpaca with history": (
        {"instruction": "i", "input": "n", "output": "r", "system": "s", "history": [["a", "<think>t</think>b"]]},
        [("system: >s | user: >a | assistant: t>b | user: >i\n\nn", None, "r")],
    ),
    "empty history": (pair(history=[]), [("user: >p", None, "r")]),
    # Tools.
    "a call in a TRL prompt is context": (
        {
            "prompt": [HI, assistant(None, tool_calls=[CALL]), {"role": "tool", "content": "t"}],
            "completion": [BYE],
            "tools": TOOLS,
        },
        [(f"user: >hi | assistant: >{CALLS} | tool: >t", None, "bye", "", json.dumps(TOOLS))],
    ),
    "tools of a pair": (pair(tools=json.dumps(TOOLS)), [("user: >p", None, "r", "", json.dumps(TOOLS))]),
    "OpenAI's older names": (
        chat(
            HI,
            assistant(None, function_call={"name": "f", "arguments": '{"x": 1}'}),
            {"role": "function", "name": "f", "content": "t"},
            BYE,
            functions=[{"name": "f"}],
        ),
        [
            ("user: >hi", None, "", CALLS, json.dumps(TOOLS)),
            (f"user: >hi | assistant: >{CALLS} | tool=f: >t", None, "bye", "", json.dumps(TOOLS)),
        ],
    ),
    "apigen-mt": (
        {
            "conversations": [
                {"from": "human", "value": "hi"},
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": "t"},
                {"from": "gpt", "value": "bye"},
            ],
            "tools": json.dumps([{"name": "f"}]),
            "system": "s",
        },
        [
            ("system: >s | user: >hi", None, "", CALLS, json.dumps(TOOLS)),
            (f"system: >s | user: >hi | assistant: >{CALLS} | tool: >t", None, "bye", "", json.dumps(TOOLS)),
        ],
    ),
    "ms-swift": (
        chat(HI, {"role": "tool_call", "content": json.dumps(CALL)}, {"role": "tool_response", "content": "t"}, BYE),
        [
            ("user: >hi", None, "", CALLS, ""),
            (f"user: >hi | assistant: >{CALLS} | tool: >t", None, "bye"),
        ],
    ),
    "calls as JSON text": (
        chat(HI, assistant("", tool_calls=json.dumps([{"type": "function", "function": CALL}]))),
        [("user: >hi", None, "", CALLS, "")],
    ),
    "a null argument is an argument": (
        chat(HI, assistant("", tool_calls=[{"name": "f", "arguments": {"x": None}}])),
        [("user: >hi", None, "", '[{"name": "f", "arguments": {"x": null}}]', "")],
    ),
    # Nulls of rows with different fields in one table.
    "nulls of mixed rows": (
        {
            "text": None,
            "messages": None,
            "question": None,
            "prompt": "p",
            "cot": None,
            "response": "r",
            "answer": None,
            "system": None,
            "tools": None,
            "weight": None,
            "rejected": None,
        },
        [("user: >p", None, "r")],
    ),
    "nulls of mixed messages": (
        chat(
            HI | {"tool_calls": None, "from": None, "value": None, "name": None},
            BYE
            | {
                "tool_calls": None,
                "function_call": None,
                "reasoning": None,
                "thinking": None,
                "train": None,
                "value": None,
            },
            conversations=None,
        ),
        [("user: >hi", None, "bye")],
    ),
    "nulls of mixed blocks": (
        chat({"role": "user", "content": [{"type": "text", "text": "p", "image_url": None, "value": None}]}, BYE),
        [("user: >p", None, "bye")],
    ),
    # Flags.
    "train true": (chat(HI, BYE | {"train": True, "mask": False}), [("user: >hi", None, "bye")]),
    "a muted call": (
        chat(HI, assistant("", tool_calls=[CALL], train=False), {"role": "tool", "content": "t"}, BYE),
        [(f"user: >hi | assistant: >{CALLS} | tool: >t", None, "bye")],
    ),
    "a user message that is not trained on": (
        chat(HI | {"train": False, "weight": 0, "masked": True}, BYE),
        [("user: >hi", None, "bye")],
    ),
    # Metadata.
    "ultrachat": (chat(HI, BYE, prompt="hi", prompt_id="1"), [("user: >hi", None, "bye")]),
    "nemotron": (chat(HI, BYE, reasoning="on", category="math"), [("user: >hi", None, "bye")]),
    "a final message of harmony": (chat(HI, BYE | {"channel": "final"}), [("user: >hi", None, "bye")]),
    "empty fields that would be refused": (
        pair(
            finish_reason="stop",
            rejected="",
            images=[],
            documents=[],
            chat_template_kwargs={},
            history=None,
            label=True,
            eot=False,
        ),
        [("user: >p", None, "r")],
    ),
    "a user's name": (chat(HI | {"name": "ann"}, BYE), [("user=ann: >hi", None, "bye")]),
}


@pytest.mark.parametrize("name", READ)
def test_every_format_is_read(tmp_path, name):
    item, expected = READ[name]
    assert seen(read(write(tmp_path, line(item)))) == expected


def test_ignored_fields_are_counted_by_row(tmp_path):
    items = [
        pair(id=1, score=0.5),
        chat(HI | {"ts": 1}, BYE | {"ts": 2}, id=2),
        {"text": "d", "id": 3, "meta": {"id": 4}, "not a name": 5, "url": None},
        pair(id=5, rejected="x"),  # a bad row, whose fields do not count
    ]
    path = write(tmp_path, "\n".join(map(json.dumps, items)))
    reader = SourceReader("rows", SourceConfig(path=str(path), on_bad_row="skip"))
    assert len(list(reader)) == 3
    expected = {"id": 3, "score": 1, "messages[].ts": 1, "meta": 1, "(a key that is not a name)": 1}
    assert reader.ignored_fields == expected
    list(reader)
    assert reader.ignored_fields == expected  # of one pass, not the sum of both


def test_nulls_are_read_as_in_parquet(tmp_path):
    items = [item for item, _ in READ.values() if "null argument" not in str(item) and "tool_calls" not in str(item)]
    flat = [{k: v for k, v in item.items() if isinstance(v, str | None)} for item in items if "messages" not in item]
    flat = [item for item in flat if "response" in item or "answer" in item]
    keys = list(dict.fromkeys(key for item in flat for key in item))
    padded = [{key: item.get(key) for key in keys} for item in flat]
    pq.write_table(pa.Table.from_pylist(padded), tmp_path / "rows.parquet")
    of_lines = read(write(tmp_path, "\n".join(map(json.dumps, padded))))
    assert len(of_lines) > 10
    assert seen(of_lines) == seen(read(tmp_path / "rows.parquet"))


def test_a_parquet_file_with_two_columns_of_one_name_is_refused(tmp_path):
    pq.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows.parquet: has two columns 'text': which of them counts is ambiguous"):
        read(tmp_path / "rows.parquet")


def test_history_is_trained_on_only_with_turns_each(tmp_path):
    path = write(tmp_path, line({"instruction": "i", "output": "r", "history": [["a", "b"], ["c", "d"]]}))
    assert [row.response for row in read(path)] == ["r"]
    assert [row.response for row in read(path, turns="each")] == ["b", "d", "r"]
    trl = {"prompt": [HI, BYE, HI], "completion": [BYE]}
    assert [len(row.messages) for row in read(write(tmp_path, line(trl)), turns="each")] == [3]


def test_configured_tags_hold_for_every_message(tmp_path):
    turns = [HI, assistant("[A]c[/A]r"), HI]
    path = write(tmp_path, line({"prompt": turns, "completion": [assistant("[A]d[/A]s")]}))
    (row,) = read(path, think_tags=("[A]", "[/A]"))
    assert (row.messages[1].cot, row.messages[1].content, row.cot, row.response) == ("c", "r", "d", "s")


def test_a_closing_tag_alone_splits_only_at_the_end_of_its_line():
    assert split_cot("a\n</think>\n\nb") == ("a", "b")
    assert split_cot("a.</think>\nb") == ("a.", "b")
    for opening, closing in TAGS:
        assert split_cot(f"\n{opening}a{closing}\n\nb") == ("a", "b")
        assert split_cot(f"a\n{closing}\n\nb") == ("a", "b")
    with pytest.raises(DataError, match="followed by text on its line"):
        split_cot("a</think>b")
