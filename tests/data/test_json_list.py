"""A JSON list through a window of any size is the list, and its faults are told at the same places."""

from __future__ import annotations

import io
import json
import random

import pytest

from delib_fast.data import DataError
from delib_fast.data.read import json_list
from delib_fast.data.read.json_list import list_values

SIZES = (1, 2, 3, 5, 7, 11, 64, 1 << 20)
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


def read(data: bytes, size: int, monkeypatch, most: int = 1 << 26) -> list:
    monkeypatch.setattr(json_list, "WINDOW_BYTES", size)
    return list(list_values(data[:size], io.BytesIO(data[size:]), "f.json", most))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "layout",
    [{}, {"indent": 1}, {"separators": (" ,\r\n\t", " : "), "ensure_ascii": False}],
    ids=["plain", "indented", "odd"],
)
def test_any_window_gives_the_values_with_their_lines(size, layout, monkeypatch):
    values = VALUES * 3
    random.Random(size).shuffle(values)
    text = "\n [" + json.dumps(values, **layout)[1:] + "\n\n"
    found = read(text.encode("utf-8"), size, monkeypatch)
    assert [value for _, value, _ in found] == values
    lines = text.split("\n")
    for line, value, raw in found:
        assert json.loads(raw) == value
        assert lines[line - 1].find(raw.split("\n")[0]) >= 0


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ('[{"a": 1},\n {"a": 2}', 2, "the file ends inside the list: it may have been cut"),
        ('[{"a": 1},\n {"a": ', 2, r"Expecting value at column 8; the file ends too early"),
        ('[{"a": 1},\n {"a": "bc', 2, r"Unterminated string starting at column 8; the file ends too early"),
        ('[{"a": 1},\n\n {"a" 2}, {"b": "' + "long " * 99 + '"}]', 3, "Expecting ':' delimiter at column 7$"),
        ('[{"a": 1}\n {"a": 2}]', 2, "a comma or ] is expected here"),
        ('[{"a": 1},\n]', 2, "Expecting value at column 1$"),
        ('[{"a": 1}]\n\n{"a": 2}', 3, "more follows after the list"),
        ('[\n{"a": 1, "a": 2}]', 2, "'a' is written twice in one object"),
        ('[{"a": NaN}]', 1, "NaN is no JSON"),
        ("[\n" + "9" * 5000 + "]", 2, "a number has too many digits"),
        ("[\n\n" + "[" * 100_000, 3, "nested too deep"),
        ("[", 1, "Expecting value at column 2; the file ends too early"),
    ],
)
def test_faults_are_told_at_their_place(size, text, line, message, monkeypatch):
    with pytest.raises(DataError, match=message) as error:
        read(text.encode(), size, monkeypatch)
    assert error.value.location == f"f.json:{line}"


@pytest.mark.parametrize("size", SIZES)
def test_bytes_that_are_no_utf8_are_told_by_line_and_place(size, monkeypatch):
    data = '["ü",\n "€", "'.encode() + b"\xe2\x82x" + b'"]'
    with pytest.raises(DataError, match="0xe2 at byte 17 of the file") as error:
        read(data, size, monkeypatch)
    assert error.value.location == "f.json:2"
    with pytest.raises(DataError, match="not UTF-8: byte 0xe2"):
        read(data[:17], size, monkeypatch)


def test_a_row_longer_than_any_is_refused(monkeypatch):
    with pytest.raises(DataError, match="no row is so long") as error:
        read(b'[1,\n"' + b"x" * 5000, 64, monkeypatch, most=1000)
    assert (error.value.reason, error.value.location) == ("long_line", "f.json:2")
