"""Helpers of the tests of sources: files of rows, and their reader."""

import json

from delib_fast.config import SourceConfig
from delib_fast.data import read_source

SECRET = "Rosebud"  # the text of every damaged row: no message may show it
CHAT = {"role": "assistant", "content": SECRET}
USER = {"role": "user", "content": SECRET}
GOOD = json.dumps({"prompt": "p", "cot": "c", "response": "r"})


def read(path, **config):
    return read_source("rows", SourceConfig(path=str(path), **config))


def write(folder, content, name="rows.jsonl"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def line(item):
    return json.dumps(item)
