"""Reading sources: every format."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_files import GOOD, SECRET, read, write

from delib_fast.config import SourceConfig
from delib_fast.data import DataError, SourceReader
from delib_fast.data.read.cot_tags import split_cot
from delib_fast.files import hash_file


def one(folder, item):
    (row,) = read(write(folder, json.dumps(item)))
    return row


# --- formats ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("item", "prompt", "cot", "response"),
    [
        ({"prompt": "p", "cot": "c", "response": "r"}, "p", "c", "r"),
        ({"prompt": "p", "cot": None, "response": "r"}, "p", None, "r"),
        ({"prompt": "p", "cot": " \n", "response": "r"}, "p", None, "r"),
        ({"prompt": "p", "reasoning_content": "c", "completion": "r"}, "p", "c", "r"),
        ({"question": "q", "response": "<think>\nc\n</think>\n\nr"}, "q", "c", "r"),
        ({"question": "q", "response": "\n<think>c</think>r", "score": {"x": 1}}, "q", "c", "r"),
        ({"question": "q", "response": "c\n</think>\n\nr"}, "q", "c", "r"),
        ({"question": "q", "response": "<think>\n\n</think>\n\nr"}, "q", None, "r"),
        ({"question": "q", "response": "<SCRATCHPAD_REASONING>\nc\n</SCRATCHPAD_REASONING>\nr"}, "q", "c", "r"),
        ({"question": "q", "response": "<reasoning>c</reasoning> r"}, "q", "c", "r"),
        ({"question": "q", "answer": "1+1=<<1+1=2>>2\nso 2\n#### 2"}, "q", "1+1=<<1+1=2>>2\nso 2", "#### 2"),
        ({"question": "q", "answer": "just an answer"}, "q", None, "just an answer"),
        ({"instruction": "do", "input": "this", "output": "r"}, "do\n\nthis", None, "r"),
        ({"instruction": "do", "input": "", "output": "r"}, "do", None, "r"),
        (
            {
                "prompt": [{"role": "user", "content": "p"}],
                "completion": [{"role": "assistant", "content": "<think>c</think>r"}],
            },
            "p",
            "c",
            "r",
        ),
        ({"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "r"}]}, "p", None, "r"),
        (
            {
                "conversation": [
                    {"role": "user", "content": "p"},
                    {"role": "assistant", "content": "r", "reasoning_content": "c"},
                ]
            },
            "p",
            "c",
            "r",
        ),
        (
            {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "r", "thinking": "c"}]},
            "p",
            "c",
            "r",
        ),
        (
            {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "r", "reasoning": "c"}]},
            "p",
            "c",
            "r",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "p"},
                    {"role": "assistant", "content": "\n<think>\nc\n</think>\nr"},
                ]
            },
            "p",
            "c",
            "r",
        ),
        ({"conversations": [{"from": "human", "value": "p"}, {"from": "gpt", "value": "r"}]}, "p", None, "r"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "p"}]},
                    {
                        "role": "assistant",
                        "content": [{"type": "thinking", "thinking": "c"}, {"type": "text", "text": "r"}],
                    },
                ]
            },
            "p",
            "c",
            "r",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "p"},
                    {
                        "role": "assistant",
                        "content": [{"type": "reasoning", "value": "c"}, {"type": "text", "value": "r"}],
                    },
                ]
            },
            "p",
            "c",
            "r",
        ),
    ],
)
def test_every_format_is_read(tmp_path, item, prompt, cot, response):
    row = one(tmp_path, item)
    assert (row.kind, row.messages[-1].content, row.cot, row.response) == ("chat", prompt, cot, response)
    assert [m.role for m in row.messages] == ["user"]
    assert row.location == f"{tmp_path / 'rows.jsonl'}:1"
    assert row.source == "rows"


def test_document_keeps_its_text_exactly(tmp_path):
    text = "  two\r\n\n<|im_end|> </think> \ttail \n"
    row = one(tmp_path, {"text": text, "source": "web", "weight": 0.5})
    assert (row.kind, row.text, row.weight, row.texts) == ("document", text, 0.5, (text,))


def test_system_message_and_earlier_turns_are_messages(tmp_path):
    row = one(
        tmp_path,
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "<think>h</think>b"},
                {"role": "user", "content": "c"},
                {"role": "assistant", "content": "d", "loss_weight": 0.25},
            ]
        },
    )
    assert [(m.role, m.content, m.cot) for m in row.messages] == [
        ("system", "s", None),
        ("user", "a", None),
        ("assistant", "b", "h"),
        ("user", "c", None),
    ]
    assert (row.response, row.weight) == ("d", 0.25)
    assert row.texts == ("s", "a", "h", "b", "c", "d")
    assert one(tmp_path, {"prompt": "p", "system": "s", "response": "r"}).messages[0].role == "system"


def test_each_turn_becomes_a_row_of_its_own(tmp_path):
    turns = [
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>h</think>b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "skip", "loss": False},
        {"role": "user", "content": "e"},
        {"role": "assistant", "content": "<think>i</think>f", "weight": 2},
    ]
    path = write(tmp_path, json.dumps({"messages": turns, "weight": 0.5}))
    rows = read(path, turns="each")
    assert [(row.cot, row.response, len(row.messages), row.weight) for row in rows] == [
        ("h", "b", 2, 0.5),
        ("i", "f", 6, 1.0),
    ]
    assert [row.location for row in rows] == [f"{path}:1 (message 2)", f"{path}:1 (message 6)"]
    assert len({row.digest for row in rows}) == 1  # so that a conversation is held out as a whole
    (last,) = read(path)
    assert (last.response, last.location) == ("f", f"{path}:1")
    assert [m.cot for m in last.messages] == [None, None, "h", None, None, None]


def test_think_tags_can_be_configured(tmp_path):
    path = write(tmp_path, json.dumps({"prompt": "p", "response": "[THINK]c[/THINK]<think>r"}))
    (row,) = read(path, think_tags=("[THINK]", "[/THINK]"))
    assert (row.cot, row.response) == ("c", "<think>r")


def test_json_list_has_the_line_of_each_item(tmp_path):
    rows = read(write(tmp_path, '\n[\n {"text": "a"},\n\n {"text":\n "b"}, {"text": "c"}]\n', "rows.json"))
    assert [row.location.rsplit(":", 1)[1] for row in rows] == ["3", "5", "6"]


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + GOOD.encode() + b"\n" + GOOD.encode(),  # byte order mark, no newline at the end
        (GOOD + "\r\n" + GOOD + "\r\n").encode(),
        ("\n\n" + GOOD + "\n   \n" + GOOD + "\n\n").encode(),
    ],
    ids=["bom", "crlf", "blank-lines"],
)
def test_harmless_oddities_are_read(tmp_path, content):
    assert len(read(write(tmp_path, content))) == 2


def test_the_hash_covers_the_whole_file_despite_a_limit(tmp_path):
    path = write(tmp_path, (GOOD + "\n") * 5)
    reader = SourceReader("rows", SourceConfig(path=str(path), limit=2))
    rows = list(reader)
    assert len(rows) == 2
    assert reader.sha256 == hash_file(path)  # of the whole file, although only two rows are used
    assert rows[0].digest == rows[1].digest


def test_parquet_has_the_rows_of_the_equal_jsonl(tmp_path):
    items = [
        {"prompt": "p", "cot": "c", "response": "r"},
        {"text": "a document"},
        {
            "messages": [
                {"role": "user", "content": "p"},
                {"role": "assistant", "content": "r", "reasoning_content": "c"},
            ]
        },
    ]
    path = tmp_path / "rows.parquet"
    columns = {key: [item.get(key) for item in items] for key in ("prompt", "cot", "response", "text", "messages")}
    pq.write_table(pa.table(columns), path, row_group_size=2)
    rows = read(path)  # fields that a row does not have are null
    lines = read(write(tmp_path, "\n".join(map(json.dumps, items))))
    assert [(r.kind, r.text, r.messages, r.cot, r.response, r.digest) for r in rows] == [
        (r.kind, r.text, r.messages, r.cot, r.response, r.digest) for r in lines
    ]
    assert [r.location for r in rows] == [f"{path}:{n}" for n in (1, 2, 3)]
    reader = SourceReader("rows", SourceConfig(path=str(path)))
    assert [row.location for row in reader] == [row.location for row in rows]
    assert reader.sha256 == hash_file(path)


def test_damaged_parquet_is_refused(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([{"text": SECRET}, {"text": ""}]), path)
    with pytest.raises(DataError, match=r"rows.parquet:2: 'text' is empty: .* \(row [0-9a-f]{12}\)"):
        read(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"rows\.parquet: cannot be read as Parquet: "):
        read(path)
    with pytest.raises(DataError, match=r"rows\.parquet: cannot be read as Parquet: "):
        read(write(tmp_path, GOOD, "rows.parquet"))


# --- chains of thought between tags -------------------------------------------------------------------------


def test_a_closing_tag_alone_on_its_line_ends_the_cot():
    text = "<think>\nThe tag </think> ends a thought.\n</think>\n\nUse </think> so."
    assert split_cot(text) == ("The tag </think> ends a thought.", "Use </think> so.")
    assert split_cot("What does <think> mean?") == (None, "What does <think> mean?")


# --- real data ----------------------------------------------------------------------------------------------


@pytest.mark.data
class TestRealData:
    def test_star1_is_read_completely(self, shared_data):
        rows = read(shared_data / "star1.json")
        assert len(rows) == 1000
        assert all(row.cot and row.response and "think>" not in row.cot + row.response for row in rows)
        raw = json.loads((shared_data / "star1.json").read_text())
        assert [r.messages[0].content for r in rows] == [item["question"] for item in raw]
        assert all(f"<think>\n{r.cot}\n</think>" in item["response"] for r, item in zip(rows, raw, strict=True))

    def test_gsm8k_is_read_completely(self, shared_data):
        rows = read(shared_data / "gsm8k_train.jsonl")
        assert len(rows) == 7473
        assert all(row.cot and row.response.startswith("#### ") for row in rows)
