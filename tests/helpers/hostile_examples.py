"""Examples of hostile texts, trees and rows for properties, and how to run a property over them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from delib_fast.datagen.settings import AXES

EXAMPLES = 15


def check(body: Callable[..., None], *strategies: st.SearchStrategy[Any], full: bool, factor: float = 1.0) -> None:
    """Run a property over examples: always the same ones, and with `--full` 200 times as many, at random."""
    run = settings(
        max_examples=max(5, round(EXAMPLES * factor * (200 if full else 1))),
        deadline=None,
        derandomize=not full,
        database=None,
        suppress_health_check=list(HealthCheck),
    )(given(*strategies)(body))
    run()


# Words that parsers look for, among characters of every kind.
TEXT = st.lists(
    st.one_of(
        st.sampled_from(
            ["<think>", "</think>", "<deliberation>", "</deliberation>", "<reply>", "</reply>", "<answer>", "</answer>",
             "<tool_use:mail>", "<to>", "{{title}}", "## user", "# Title {#a}", "```", "1. a", "2. b", "3. c", "---",
             "#### ", "answer is", "(A)", "<<1+1=3>>", "<<((1=2>>", "according to the policy", "I can't help",
             "rule-5", "\\u0000", "null", "NaN", "-Infinity", "1e999", "9" * 5000, "٣", "[[", "]]", "{", "}", '"',
             "\\", ":", ",", "\n", "\n\n", " ", "\ud800", "\0", "\u2028", "\x85", "\u202e"]
        ),
        st.text(max_size=8),
        st.characters(),
    ),
    max_size=12,
).map("".join)  # fmt: skip
ENCODABLE = TEXT.map(lambda text: text.encode(errors="replace").decode())
NUMBERS = st.one_of(
    st.integers(), st.floats(), st.sampled_from([10**400, -(10**400), 1e308, math.inf, math.nan, 2**63, -0.0, 1 << 200])
)
KEYS = st.sampled_from(
    ["text", "prompt", "question", "instruction", "input", "response", "answer", "completion", "output", "cot",
     "system", "messages", "conversations", "role", "from", "content", "value", "type", "tools", "tool_calls",
     "function", "name", "arguments", "weight", "loss_weight", "reasoning_content", "thinking", "category",
     "categories", "faults", "why", *AXES, "path", "data", "stages", "kind", "model", "generator", "extra", "id",
     "parameters"]
)  # fmt: skip
ROLES = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", "function_call", "observation", "x"])
TREES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXT, ROLES),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.one_of(KEYS, TEXT), inner, max_size=4)),
    max_leaves=12,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.one_of(ROLES, TREES), "content": st.one_of(TEXT, TREES)},
        optional={"tool_calls": TREES, "reasoning_content": TREES, "weight": TREES, "name": TREES},
    ),
    max_size=4,
)
ROWS = st.one_of(
    TREES,
    st.fixed_dictionaries({}, optional={"text": TREES, "weight": TREES}),
    st.fixed_dictionaries(
        {"messages": st.one_of(MESSAGES, TREES)}, optional={"tools": TREES, "system": TREES, "weight": TREES}
    ),
    st.fixed_dictionaries(
        {"prompt": st.one_of(TEXT, MESSAGES), "response": st.one_of(TEXT, TREES)},
        optional={"cot": TREES, "system": TREES, "category": TREES, "weight": TREES},
    ),
)


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def as_json(tree: Any) -> bytes:
    return json.dumps(tree).encode()
