"""Generate docs/refusals.md, the list of error messages about data: `python tests/data/refusals.py`.

Each error is triggered. test_refusals.py compares the page with the current messages.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "tests"), str(ROOT)]

from helpers.chat_oracle import chat, document  # noqa: E402
from helpers.chat_tokenizers import CHATML, fast_tokenizer, tokenizer  # noqa: E402
from source_files import GOOD, write  # noqa: E402
from test_damaged_sources import DAMAGED_ROWS, FOREIGN_FILES  # noqa: E402
from test_row_refusals import REFUSED  # noqa: E402

from delib_fast.config import SourceConfig  # noqa: E402
from delib_fast.config.load import load_config  # noqa: E402
from delib_fast.data import (  # noqa: E402
    DataError,
    Example,
    PackedDataLoader,
    TokenizedDataset,
    encode_rows,
    mix_sources,
    plan_packs,
    read_source,
    refuse_overlap,
    refuse_spec_in_prompts,
)
from delib_fast.data.read import source_cache  # noqa: E402

PAGE = ROOT / "docs" / "refusals.md"
HEAD = """\
# Refusals and their messages

`python tests/data/refusals.py` generates this page by triggering each refusal, and a test compares the page with the
code. A message begins with the location of the row (`file:line`) or the part of the configuration. It never contains
text of a row: `(row …)` is a fingerprint of 12 hex digits. With `on_bad_row: error` (the default), the first bad row
aborts the run, and the message also says how to skip such rows. With `skip`, up to `max_bad_rows` of them are skipped
and counted by reason in the log, the ledger and `plan`.
"""


def rows() -> Iterator[tuple[str, str, str]]:
    """Yield (case, reason, message) for each kind of row that cannot be read."""
    with tempfile.TemporaryDirectory() as name:
        for kind, (damage, reason, _) in DAMAGED_ROWS.items():
            raw = damage if isinstance(damage, bytes) else damage.encode("latin-1" if kind == "latin-1" else "utf-8")
            path = write(Path(name), GOOD.encode() + b"\n" + raw)
            yield kind, reason, message_of(lambda path=path: read(path))
        for kind, (item, reason, _) in REFUSED.items():
            path = write(Path(name), GOOD + "\n" + json.dumps(item))
            yield kind, reason, message_of(lambda path=path: read(path))
        long = write(Path(name), GOOD + "\n" + '{"text": "' + "x" * (65 << 20) + '"}')
        yield "a line of 65 MiB", "long_line", message_of(lambda: read(long))


def files() -> Iterator[tuple[str, str, str]]:
    with tempfile.TemporaryDirectory() as name:
        for kind, (content, file_name, _) in FOREIGN_FILES.items():
            path = write(Path(name), content, file_name)
            yield kind, "", message_of(lambda path=path: read(path))
        yield "no such file", "", message_of(lambda: read(Path(name) / "none.jsonl"))
        os.mkfifo(Path(name) / "pipe.jsonl")
        yield "a pipe", "", message_of(lambda: read(Path(name) / "pipe.jsonl"))
        path = write(Path(name), GOOD)
        before, source_cache.MAX_BYTES_IN_MEMORY = source_cache.MAX_BYTES_IN_MEMORY, 0
        try:
            source = source_cache.load_source("rows", SourceConfig(path=str(path)), Path(name) / "cache")
            write(Path(name), GOOD + "\n" + GOOD)
            yield "changed between two passes", "", message_of(lambda: list(source.train_rows()))
        finally:
            source_cache.MAX_BYTES_IN_MEMORY = before


def encoding() -> Iterator[tuple[str, str, str]]:
    tok = tokenizer("qwen3")
    row, tool = chat("p", "c", "r"), '[{"type": "function", "function": {"name": "f"}}]'
    endless = CHATML.replace("<|im_end|>\\n", "").replace("<|im_end|>", "")
    for kind, broken, more in (
        ("a reserved character", chat("a \U0010fffc", None, "r"), {}),
        ("a think tag that is plain text", chat("p", "a </think> b", "r"), {"template": CHATML, "tokenizer": "chatml"}),
        ("only a CoT, with cot: strip", chat("p", "c", " "), {"cot": "strip"}),
        ("longer than a pack", chat("p " * 500, None, "r"), {}),
        ("more than 16 Mi characters", document("a " * (9 << 20)), {}),
        ("every row longer than a pack", chat("p " * 500, None, "r"), {"over_long": "drop"}),
        (
            "a template that drops the system message",
            chat("p", None, "r", system="s"),
            {"template": "{% for message in messages if message.role != 'system' %}" + CHATML.split("%}", 1)[1]},
        ),
        (
            "a template that changes texts",
            row,
            {"template": CHATML.replace("message['content']", "(message['content'] | upper)")},
        ),
        ("a template without an end of turn", chat("p", None, "r"), {"template": endless}),
        ("a template with the operator **", row, {"template": CHATML + "{{ 9**9**9**9 }}"}),
        ("a template that refuses the row", row, {"template": "{{ raise_exception('No user query found') }}"}),
        ("a template without tools", replace(row, tools=tool), {"template": CHATML}),
    ):
        options = {"pack_capacity": 128, "over_long": "error"} | more
        template = options.pop("template", tok.chat_template)
        backend = tokenizer(options.pop("tokenizer", "qwen3")).backend_tokenizer
        broken_tokenizer = fast_tokenizer(backend, template, eos_token="<|im_end|>")
        yield kind, "", message_of(partial(encode_rows, [broken], broken_tokenizer, **options))


def decontamination() -> Iterator[tuple[str, str, str]]:
    words = " ".join(f"word{k}" for k in range(40))
    training, duplicate = chat(words, None, "r"), replace(chat(words, None, "r"), location="eval.jsonl:4")
    near = replace(chat(words + " and more", None, "s"), location="eval.jsonl:4", digest="1")
    yield "spec in a prompt", "", message_of(lambda: refuse_spec_in_prompts([training], [words]))
    yield (
        "an evaluation row that is also a training row",
        "",
        message_of(lambda: refuse_overlap([training], [duplicate])),
    )
    yield (
        "an evaluation row that is similar to a training row",
        "",
        message_of(lambda: refuse_overlap([training], [near])),
    )


def packing() -> Iterator[tuple[str, str, str]]:
    prompt = Example(np.zeros(9, np.int32), np.zeros(9, np.int8), "rows.jsonl:1")
    reply = Example(np.zeros(9, np.int32), np.full(9, 2, np.int8), "rows.jsonl:1")

    def pack(examples: list[Example], **more: Any) -> PackedDataLoader:
        settings = {
            "pack_capacity": 16,
            "packs_per_step": 4,
            "segment_weights": (0, 1, 1, 1),
            "seed": 0,
            "epochs": 1,
            "rank": 0,
            "world_size": 1,
        }
        return PackedDataLoader(TokenizedDataset(examples), **settings | more)

    yield "no token is supervised", "", message_of(lambda: pack([prompt]))
    yield "packs that cannot be divided among the ranks", "", message_of(lambda: pack([reply], world_size=3))
    yield "longer than the pack capacity", "", message_of(lambda: plan_packs([5, 17], 16))
    yield (
        "a budget below one example",
        "",
        message_of(
            lambda: mix_sources(
                {"a": np.array([100]), "b": np.array([9000])},
                repeat={"a": 1, "b": 1},
                max_tokens={"a": None, "b": None},
                mix={"a": 1, "b": 1},
                seed=0,
            )
        ),
    )
    yield (
        "a tokenizer without an EOS token",
        "",
        message_of(
            lambda: encode_rows(
                [document("text")], fast_tokenizer(tokenizer("qwen3").backend_tokenizer), pack_capacity=128
            )
        ),
    )


def configuration() -> Iterator[tuple[str, str, str]]:
    """Values of a YAML file that seem to mean something else than they do, and paths that cannot be expanded."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "run.yaml"
        for kind, key, value in (
            ("a leading zero", "epochs", "010"),
            ("minutes and seconds", "max_steps", "1:30"),
            ("yes", "share_prompts", "yes"),
            ("None", "max_steps", "None"),
            ("true for a number", "epochs", "true"),
            ("an infinite number", "optimizer", "{lr: .inf}"),
            ("a number of many digits", "epochs", "9" * 5000),
            ("a number of more than 64 bits", "epochs", str(1 << 64)),
            ("a key that is given twice", "optimizer", "{lr: 1, lr: 2}"),
            ("a tag", "optimizer", "!!python/name:os.system"),
            ("an unknown variable in a path", "spec", "${NOT_SET_ANYWHERE}/spec.md"),
            ("an unknown user in a path", "spec", "~nobody-of-this-name/spec.md"),
            ("an empty path", "spec", '""'),
        ):
            text = "run_dir: run\nmodel: {path: m}\ndata: {a: a.jsonl}\nstages:\n  - kind: aft\n    train: [a]\n"
            path.write_text(f"{text}    {key}: {value}\n")
            yield kind, "", message_of(lambda: load_config(path))


def page() -> str:
    parts = [
        HEAD,
        *(
            _table(title, made, with_reason=title == "Rows")
            for title, made in (
                ("Rows", rows),
                ("Files", files),
                ("Encoding", encoding),
                ("Decontamination", decontamination),
                ("Packing", packing),
                ("Configuration", configuration),
            )
        ),
    ]
    return "\n".join(parts)


def message_of(provoke: Callable[[], Any]) -> str:
    """The error message, without the parts that differ from run to run."""
    try:
        provoke()
    except (DataError, ValueError) as error:
        text = re.sub(r"(?<=directory: )[^)]*", "…", str(error))
        text = re.sub(r"/[^ :]*/", "", text)
        return re.sub(r"\(row [0-9a-f]{12}\)", "(row …)", text)
    raise AssertionError("no error was raised")


def read(path: Path) -> Any:
    return read_source("rows", SourceConfig(path=str(path)))


def _table(title: str, made: Callable[[], Iterator[tuple[str, str, str]]], *, with_reason: bool) -> str:
    lines = [
        f"## {title}\n",
        "| case | reason | message |" if with_reason else "| case | message |",
        "|---|---|---|" if with_reason else "|---|---|",
    ]
    for kind, reason, message in made():
        message = message.removesuffix(" To skip and count such rows, set on_bad_row: skip").removesuffix(".")
        cells = [kind, f"`{reason}`", message] if with_reason else [kind, message]
        lines.append(
            "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;") for cell in cells) + " |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    with contextlib.chdir(ROOT):
        PAGE.write_text(page(), encoding="utf-8")
    print(PAGE.relative_to(ROOT))
