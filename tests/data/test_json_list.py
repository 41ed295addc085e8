"""JSON lists: every value has its line, and every fault its location."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from delib_fast.config import SourceConfig
from delib_fast.data import DataError, read_source
from delib_fast.data.read import json_list, jsonl
from delib_fast.data.read.json_list import list_values

PATH = Path("f.json")
VALUES = [
    {"prompt": 'quote " and \\ and \n', "cot": "ü€𝄞\u2028", "n": [1, 2.5e-3, -7, True, None]},
    12345678901,
    "]",
    {},
    [],
    "\U0001f600",
    {"a": {"b": [{"c": "}],"}]}},
    -0.5,
    "x" * 300,
]


@pytest.mark.parametrize(
    "layout",
    [{}, {"indent": 1}, {"separators": (" ,\r\n\t", " : "), "ensure_ascii": False}],
    ids=["plain", "indented", "odd"],
)
def test_values_have_their_lines(layout):
    values = VALUES * 3
    random.Random(0).shuffle(values)
    text = "\n [" + json.dumps(values, **layout)[1:] + "\n\n"
    found = list(list_values(text, PATH))
    assert [value for _, value, _ in found] == values
    lines = text.split("\n")
    for line, value, raw in found:
        assert json.loads(raw) == value
        assert lines[line - 1].find(raw.split("\n")[0]) >= 0


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ('[{"a": 1},\n {"a": 2}', 2, "the file ends inside the list and may have been cut off"),
        ('[{"a": 1},\n {"a": ', 2, r"Expecting value at column 8; the file ends too early"),
        ('[{"a": 1},\n {"a": "bc', 2, r"Unterminated string starting at column 8; the file ends too early"),
        ('[{"a": 1},\n\n {"a" 2}, {"b": "' + "long " * 99 + '"}]', 3, "Expecting ':' delimiter at column 7$"),
        ('[{"a": 1}\n {"a": 2}]', 2, "expected a comma or ] here"),
        ('[{"a": 1},\n]', 2, "Expecting value at column 1$"),
        ('[{"a": 1}]\n\n{"a": 2}', 3, "the file continues after the end of the list"),
        ('[\n{"a": 1, "a": 2}]', 2, "'a' occurs twice in one object"),
        ('[{"a": NaN}]', 1, "NaN is not valid JSON"),
        ("[\n" + "9" * 5000 + "]", 2, "a number has too many digits"),
        ("[\n\n" + "[" * 100_000, 3, "nested too deeply"),
        ("[", 1, "Expecting value at column 2; the file ends too early"),
    ],
)
def test_faults_have_their_location(text, line, message):
    with pytest.raises(DataError, match=message) as error:
        list(list_values(text, PATH))
    assert error.value.location == f"f.json:{line}"


def test_bytes_that_are_not_utf8_are_reported_by_line_and_position(tmp_path):
    path = tmp_path / "f.json"
    for data in (b'\n["\xc3\xbc",\n "\xe2\x82x"]', b'\n["\xc3\xbc",\n "\xe2\x82'):
        path.write_bytes(data)
        with pytest.raises(DataError, match="not UTF-8: byte 0xe2 at byte 11 of the file") as error:
            read_source("s", SourceConfig(path=str(path)))
        assert error.value.location == f"{path}:3"


def test_a_large_list_is_refused_with_the_command_that_converts_it(tmp_path, monkeypatch):
    path = tmp_path / "rows.json"
    path.write_text("[\n" + ",\n".join(['{"text": "a"}'] * 100) + "]")
    assert len(read_source("s", SourceConfig(path=str(path)))) == 100
    for module in (json_list, jsonl):
        monkeypatch.setattr(module, "MAX_LIST_BYTES", 1000)
    with pytest.raises(
        DataError, match=r"rows\.json: is a JSON list of more .* jq -c '\.\[\]' rows\.json > rows\.jsonl"
    ):
        read_source("s", SourceConfig(path=str(path)))
