"""Damaged sources: every kind of damage is reported with its file and line, but without text of the row."""

import random

import pytest
from source_files import CHAT, GOOD, SECRET, USER, line, read, write

from delib_fast.config import SourceConfig
from delib_fast.data import DataError, SourceReader

DAMAGED_ROWS = {
    "cut last line": ('{"text": "' + SECRET, "not_json", "it ends too early and may have been cut off"),
    "cut after a value": ('{"text": "' + SECRET + '"', "not_json", "may have been cut off"),
    "invalid utf-8": (b'{"text": "' + SECRET.encode() + b'\xff"}', "invalid_utf8", "not UTF-8: byte 0xff at byte 18"),
    "latin-1": ('{"text": "café ' + SECRET + '"}', "invalid_utf8", "not UTF-8: byte 0xe9"),
    "overlong utf-8": (b'{"text": "\xc0\xaf"}', "invalid_utf8", "not UTF-8"),
    "half a surrogate pair": ('{"text": "' + SECRET + ' \\ud83d"}', "surrogate", "half of a surrogate pair"),
    "escaped NUL": ('{"text": "' + SECRET + '\\u0000"}', "nul", "contains a NUL character"),
    "raw control character": ('{"text": "' + SECRET + '\x01"}', "not_json", "Invalid control character"),
    "duplicate key": ('{"text": "' + SECRET + '", "text": "b"}', "duplicate_key", "'text' occurs twice"),
    "duplicate key deep down": (
        '{"text": "a", "meta": {"' + SECRET + ' x": 1, "' + SECRET + ' x": 2}}',
        "duplicate_key",
        "a key occurs twice",
    ),
    "single quotes": ("{'text': '" + SECRET + "'}", "not_json", "not valid JSON"),
    "nested quotes": ('{"text": "he said "' + SECRET + '""}', "not_json", "not valid JSON"),
    "trailing comma": ('{"text": "' + SECRET + '",}', "not_json", "not valid JSON"),
    "two objects on a line": ('{"text": "a"} {"text": "' + SECRET + '"}', "not_json", "Extra data"),
    "NaN": ('{"text": "' + SECRET + '", "score": NaN}', "not_json", "NaN is not valid JSON"),
    "huge number": ('{"text": "a", "n": ' + "9" * 5000 + "}", "not_json", "too many digits"),
    "nested too deep": ('{"text": ' + "[" * 200_000 + "}", "not_json", "nested too deeply"),
    "a string": ('"' + SECRET + '"', "not_an_object", "a string, but an object with named fields is expected"),
    "null": ("null", "not_an_object", "null, but an object"),
    "empty object": ("{}", "missing_field", "has none of the fields 'text'"),
    "unknown fields": (
        line({"promt": SECRET, SECRET + " !": 1}),
        "missing_field",
        "did you mean 'prompt' instead of 'promt'?",
    ),
    "no reply": (line({"prompt": SECRET}), "missing_field", "'prompt' has no reply"),
    "wrong type": (line({"text": 1}), "wrong_type", "'text' is a number, but a string is expected"),
    "null text": (line({"text": None}), "missing_field", "its fields are 'text' (all null)"),
    "cot of a wrong type": (line({"prompt": SECRET, "cot": [1], "response": "r"}), "wrong_type", "'cot' is a list"),
    "two prompts": (
        line({"prompt": SECRET, "question": "q", "response": "r"}),
        "ambiguous",
        "has both 'prompt' and 'question'",
    ),
    "two formats": (
        line({"text": SECRET, "prompt": "q", "response": "r"}),
        "ambiguous",
        "has both 'prompt' and 'text'",
    ),
    "empty text": (line({"text": " \n"}), "empty", "'text' is empty: there is nothing to train on"),
    "empty prompt": (line({"prompt": "", "response": SECRET}), "empty", "'prompt' is empty"),
    "empty cot and response": (line({"prompt": SECRET, "cot": " ", "response": "\n"}), "empty", "the reply is empty"),
    "weight 0": (line({"prompt": SECRET, "response": "r", "weight": 0}), "nothing_supervised", "weight 0"),
    "document of weight 0": (line({"text": SECRET, "weight": 0}), "nothing_supervised", "its weight is 0"),
    "negative weight": (
        line({"text": SECRET, "weight": -1}),
        "bad_weight",
        "'weight' is -1; a weight must be a number",
    ),
    "weight of a wrong type": (line({"text": SECRET, "weight": "1"}), "bad_weight", "'weight' is a string"),
    "unclosed cot": (
        line({"prompt": "p", "response": "<think>" + SECRET}),
        "cot_tags",
        "<think> is not closed by </think>",
    ),
    "cot in the middle": (
        line({"prompt": "p", "response": SECRET + "<think>a</think>b"}),
        "cot_tags",
        "there is text before <think>",
    ),
    "two closing tags": (
        line({"prompt": "p", "response": "<think>a</think>" + SECRET + "</think>c"}),
        "cot_tags",
        "</think> occurs 2 times, 0 of them alone on a line",
    ),
    "messages are not a list": (line({"messages": SECRET}), "wrong_type", "'messages' is a string"),
    "no messages": (line({"messages": []}), "empty", "'messages' is an empty list"),
    "a message is not an object": (line({"messages": [SECRET]}), "wrong_type", "messages[0] is a string"),
    "no role": (line({"messages": [{"content": SECRET}]}), "missing_field", "messages[0] has no 'role'"),
    "unknown role": (line({"messages": [{"role": SECRET, "content": ""}]}), "bad_role", "an unknown role"),
    "no content": (line({"messages": [{"role": "user"}]}), "missing_field", "messages[0] has no 'content'"),
    "last message of the user": (
        line({"messages": [USER, CHAT, USER]}),
        "no_reply",
        "the last message is a user message",
    ),
    "no user": (line({"messages": [{"role": "system", "content": SECRET}, CHAT]}), "no_prompt", "there is no prompt"),
    "cot twice": (
        line(
            {
                "messages": [
                    USER,
                    {"role": "assistant", "thinking": "a", "content": [{"type": "thinking", "thinking": SECRET}]},
                ]
            }
        ),
        "ambiguous",
        "its chain of thought twice",
    ),
    "picture": (
        line({"messages": [{"role": "user", "content": [{"type": "image", "url": SECRET}]}, CHAT]}),
        "bad_block",
        "messages[0].content[0] is not text",
    ),
    "loss false on every reply": (line({"messages": [USER, CHAT | {"loss": False}]}), "nothing_supervised", "weight 0"),
    "loss of a wrong type": (line({"messages": [USER, CHAT | {"loss": "no"}]}), "bad_weight", "messages[1].loss"),
    "tool call": (
        line({"messages": [USER, CHAT | {"tool_calls": [{}]}]}),
        "tools",
        "messages[1].tool_calls[0] has no function with a name",
    ),
    "arguments that are not JSON": (
        line({"messages": [USER, CHAT | {"tool_calls": [{"function": {"name": "f", "arguments": SECRET}}]}]}),
        "tools",
        "messages[1].tool_calls[0].function.arguments is not valid JSON",
    ),
    "arguments that are not an object": (
        line({"messages": [USER, CHAT | {"tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}]}),
        "tools",
        "messages[1].tool_calls[0].function.arguments is not an object",
    ),
    "tools that are not a list": (
        line({"messages": [USER, CHAT], "tools": {"name": "f"}}),
        "tools",
        "'tools' is not a list",
    ),
    "a tool without a name": (
        line({"messages": [USER, CHAT], "tools": [{"description": SECRET}]}),
        "tools",
        "tools[0] has no function with a name",
    ),
    "a user's call": (
        line({"messages": [USER | {"tool_calls": [{"function": {"name": "f"}}]}, CHAT]}),
        "tools",
        "messages[0] is a user message with tool calls",
    ),
}


@pytest.mark.parametrize("name", DAMAGED_ROWS)
def test_a_damaged_row_is_an_error_with_file_and_line(tmp_path, name):
    damage, reason, why = DAMAGED_ROWS[name]
    raw = damage if isinstance(damage, bytes) else damage.encode("latin-1" if name == "latin-1" else "utf-8")
    path = write(tmp_path, GOOD.encode() + b"\n" + raw)
    with pytest.raises(DataError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:2: ")
    assert why in message
    assert "(row " in message
    assert SECRET not in message
    assert caught.value.reason == reason
    # With on_bad_row: skip it is counted, and the good row is read.
    reader = SourceReader("rows", SourceConfig(path=str(path), on_bad_row="skip"))
    assert len(list(reader)) == 1
    assert reader.bad_rows == {reason: 1}


FOREIGN_FILES = {
    "gzip": (b"\x1f\x8b\x08\x00" + bytes(20), "rows.jsonl", "is gzip data: decompress it first"),
    "zip": (b"PK\x03\x04" + bytes(20), "rows.jsonl", "is a zip archive"),
    "parquet": (b"PAR1" + bytes(20), "rows.json", "is a Parquet file: rename it to .parquet"),
    "utf-16": (GOOD.encode("utf-16"), "rows.jsonl", "is UTF-16 text: convert it to UTF-8"),
    "utf-16 without mark": (GOOD.encode("utf-16-le"), "rows.jsonl", "contains NUL bytes"),
    "pickle": (b"\x80\x04\x95" + bytes(20), "rows.jsonl", "is a pickle, which is never read"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "rows.jsonl", "run git lfs pull"),
    "web page": (b"<!DOCTYPE html><html>", "rows.jsonl", "is a web page: the download failed"),
    "gzip called text": (b"\x1f\x8b\x08\x00" + bytes(20), "rows.txt", "is gzip data"),
    "latin-1 text": ("eins\nzwei\ndrü".encode("latin-1"), "rows.md", ":3: not UTF-8: byte 0xfc at byte 13"),
    "text with NUL": (b"x" * 600 + b"\n\0", "rows.txt", ":2: contains a NUL character"),
    "empty": (b"", "rows.jsonl", "has no rows: it is empty (source 'rows')"),
    "empty text": (b"\n \n", "rows.txt", "has no rows: it is empty"),
    "only blank lines": (b"\n\n \n", "rows.jsonl", "has no rows: it is empty"),
    "empty list": (b"[]", "rows.json", "has no rows: it is empty"),
    "cut list": (b'[{"text": "a"},\n {"text": "b"}', "rows.json", ":2: the file ends inside the list"),
    "cut inside an item": (b'[{"text": "a"},\n {"text": "b', "rows.json", ":2: not valid JSON: Unterminated string"),
    "list without comma": (
        b'[{"text": "a"}\n {"text": "b"}]',
        "rows.json",
        ":2: not valid JSON: expected a comma or ]",
    ),
    "text after the list": (
        b'[{"text": "a"}]\n[]',
        "rows.json",
        ":2: not valid JSON: the file continues after the end of the list",
    ),
    "duplicate key in a list": (b'[\n{"text": "a", "text": "b"}]', "rows.json", ":2: 'text' occurs twice"),
    "unknown extension": (b"a,b\n", "rows.csv", "has the unknown extension '.csv'"),
}


@pytest.mark.parametrize("name", FOREIGN_FILES)
def test_a_file_of_another_format_is_refused(tmp_path, name):
    content, file_name, why = FOREIGN_FILES[name]
    path = write(tmp_path, content, file_name)
    for on_bad_row in ("error", "skip"):  # a broken file is not a bad row
        with pytest.raises(DataError) as caught:
            read(path, on_bad_row=on_bad_row)
        assert str(caught.value).startswith(str(path))
        assert why in str(caught.value)


def test_paths_that_are_not_files(tmp_path):
    with pytest.raises(DataError, match=r"no such file \(working directory: .*\) \(source 'rows'\)"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="is a folder, but was not written by datasets' save_to_disk; give a file"):
        read(tmp_path)
    with pytest.raises(DataError, match="cut: headings is for text files"):
        read(write(tmp_path, GOOD), cut="headings")


def test_a_line_of_a_hundred_megabytes_is_a_bad_row(tmp_path):
    path = write(tmp_path, GOOD + "\n")
    with path.open("ab") as file:
        file.write(b'{"text": "')
        for _ in range(100):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n' + GOOD.encode())
    with pytest.raises(DataError, match=r":2: the line is longer than 64 MiB"):
        read(path)
    reader = SourceReader("rows", SourceConfig(path=str(path), on_bad_row="skip"))
    assert [row.location.rsplit(":", 1)[1] for row in reader] == ["1", "3"]
    assert reader.bad_rows == {"long_line": 1}


def test_more_bad_rows_than_the_limit_are_an_error(tmp_path):
    path = write(tmp_path, GOOD + "\n" + "{}\n" * 3 + "[1\n" * 2)
    with pytest.raises(DataError, match=r":5: .*bad row number 4, more than max_bad_rows \(3\): 3 missing_field, 1"):
        read(path, on_bad_row="skip", max_bad_rows=3)
    reader = SourceReader("rows", SourceConfig(path=str(path), on_bad_row="skip", max_bad_rows=5))
    assert len(list(reader)) == 1
    assert reader.bad_rows == {"missing_field": 3, "not_json": 2}
    with pytest.raises(DataError, match=r"has no rows: all its rows are bad \(3 missing_field\)"):
        read(write(tmp_path, "{}\n" * 3), on_bad_row="skip")


def test_any_cut_and_any_flipped_byte_is_an_error_or_rows(tmp_path):
    """Each of 1000 randomly damaged files gives rows or a DataError with the file's name, never another exception."""
    draw = random.Random(0)
    whole = ("\n".join([GOOD, line({"messages": [USER, CHAT]}), line({"text": "naïve 東京"})]) + "\n").encode()
    for _ in range(1000):
        damaged = bytearray(whole[: draw.randrange(1, len(whole) + 1)])
        for _ in range(draw.randrange(3)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        try:
            assert read(write(tmp_path, bytes(damaged)))
        except DataError as error:
            assert str(tmp_path) in str(error)  # noqa: PT017
            assert SECRET not in str(error)  # noqa: PT017
