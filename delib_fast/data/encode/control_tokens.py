"""A tokenizer in which only a chat template can write a control token, never a row.

The tokenizer is copied, and every control token is renamed to one private-use character that its vocabulary does not
contain. These characters replace the control tokens in the template's text; the row's text is unchanged. One pass over
the whole text then gives exactly the ids of the original tokenizer (with the same splits and merges where the two
meet), except that `<|im_end|>` or `</think>` in a row stays text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import tokenizers

from delib_fast.data.rows import DataError

# Private-use characters that may stand for control tokens: Unicode plane 16 from its end; fonts use its beginning.
_PRIVATE = range(0x10FFFD, 0xFFFFF, -1)
_SLOTS = re.compile("[\U000f0000-\U000fffff]")
_BREAK = "\U000fffff"  # a noncharacter, inserted into control tokens that a row spells out
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_MARKUP = re.compile(r"<[^<>\s]+>|\[/?[A-Z0-9_]+\]")
_BRACKETED = re.compile(r"[^\w\s]+\w\S*[^\w\s]")
_TAG = re.compile(r"</?[A-Za-z][A-Za-z0-9]*/?>")


class ControlTokens:
    """A copy of a tokenizer with renamed control tokens.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        template_text: source of the chat template. An added token that occurs in it is a control token even if it is
            not marked as special (Qwen's `<think>`, `<tool_call>`).
    Raises:
        ValueError: the tokenizer has no fast backend, or the ids of its control tokens change when they are renamed.
    """

    def __init__(self, tokenizer: Any, template_text: str) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, tokenizers.Tokenizer):
            raise ValueError(
                f"{type(tokenizer).__name__} has no fast backend, but loss masks need character offsets: use a "
                "tokenizer that is stored as tokenizer.json (PreTrainedTokenizerFast)"
            )
        config = json.loads(backend.to_str())
        names = [token["content"] for token in config["added_tokens"] if _is_control(token, template_text)]
        self.spelling = dict(zip(names, _free_characters(config, len(names)), strict=True))
        self._control_tokens = _any_of(names)
        self._names = {char: name for name, char in self.spelling.items()}
        self._reserved = re.compile(f"[{''.join(self._names)}]" if names else "(?!)")
        _rename(config, self.spelling, _keeps(backend, self.spelling.values()))
        self._backend = tokenizers.Tokenizer.from_str(json.dumps(config))
        self._check_ids(backend)

    def spell(self, rendering: str) -> str:
        """Replace the control tokens of a rendering with private-use characters, and unescape the escaped ones."""
        return self._control_tokens.sub(lambda match: self.spelling[match[0]], rendering).replace(_BREAK, "")

    def unspell(self, text: str) -> str:
        """Replace the private-use characters with the control tokens that they stand for."""
        return self._reserved.sub(lambda match: self._names[match[0]], text)

    def escape(self, value: Any) -> Any:
        """Break up the control tokens in a text, or in all texts of a JSON value, so that `spell` keeps them as text.

        Raises:
            DataError: a control token is a single character, which cannot be broken up.
        """
        if isinstance(value, str):
            return self._control_tokens.sub(_break_up, value)
        if isinstance(value, list):
            return [self.escape(item) for item in value]
        if isinstance(value, dict):
            return {self.escape(key): self.escape(item) for key, item in value.items()}
        return value

    @staticmethod
    def is_escaped(text: str) -> bool:
        """Whether `escape` has broken up a control token in a text."""
        return _BREAK in text

    @staticmethod
    def refuse_slots(text: str, location: str) -> None:
        """Raise DataError if a text that a template receives contains a character reserved as a placeholder."""
        if not text.isascii() and (found := _SLOTS.search(text)):
            raise DataError(
                f"contains the private-use character U+{ord(found[0]):X}, which is reserved as a placeholder for "
                "texts; remove it",
                reason="private_use",
                location=location,
            )

    def is_control(self, char: str) -> bool:
        """Whether a character stands for a control token."""
        return char in self._names

    def refuse_reserved(self, text: str, location: str) -> None:
        """Raise DataError if a row contains one of the private-use characters that stand for control tokens."""
        if not text.isascii() and (found := self._reserved.search(text)):
            raise DataError(
                f"contains the private-use character U+{ord(found[0]):X}, which is reserved for a control token; "
                "remove it",
                reason="private_use",
                location=location,
            )

    def encode_batch(self, texts: Sequence[str]) -> list[tokenizers.Encoding]:
        """Tokenize texts, with character offsets; in parallel unless TOKENIZERS_PARALLELISM is false."""
        return self._backend.encode_batch(list(texts), add_special_tokens=False)

    def _check_ids(self, original: tokenizers.Tokenizer) -> None:
        for name, char in self.spelling.items():
            if self._backend.token_to_id(char) != original.token_to_id(name):
                raise ValueError(
                    f"the tokenizer's added token {name!r} cannot be kept apart from text: its id changes when it is "
                    "renamed"
                )
        if self._backend.get_vocab_size() != original.get_vocab_size():
            raise ValueError(
                "the tokenizer's control tokens cannot be kept apart from text: the size of the vocabulary changes "
                "when they are renamed"
            )


def _is_control(token: dict[str, Any], template_text: str) -> bool:
    content = token["content"]
    if _BYTE.fullmatch(content):  # byte fallback: it stands for text
        return False
    if token["special"]:
        return True
    # Others may be ordinary text: words, punctuation, white space, and the HTML tags of Gemma's vocabulary. Control
    # tokens have the form of <tool_call>, <|fim_prefix|>, [INST] or ]~b].
    if _MARKUP.fullmatch(content):
        return content in template_text or not _TAG.fullmatch(content)
    return content in template_text and bool(_BRACKETED.fullmatch(content))


def _break_up(match: re.Match[str]) -> str:
    name = match[0]
    if len(name) == 1:
        raise DataError(
            f"contains {name!r}, which is a control token of the tokenizer; remove it", reason="control_token"
        )
    return name[0] + _BREAK + name[1:]


def _free_characters(config: dict[str, Any], count: int) -> Iterator[str]:
    """Private-use characters that occur in no token. A few occur in large vocabularies (Gemma's contains U+100083)."""
    vocab = config["model"]["vocab"]
    pieces = vocab if isinstance(vocab, dict) else (piece for piece, *_ in vocab)
    used = {char for piece in pieces if not piece.isascii() for char in piece}
    used.update(char for token in config["added_tokens"] for char in token["content"])
    return islice((char for char in map(chr, _PRIVATE) if char not in used), count)


def _keeps(backend: tokenizers.Tokenizer, characters: Iterable[str]) -> bool:
    """Whether the tokenizer's normalizer leaves these characters as they are."""
    text = "".join(characters)
    return backend.normalizer is None or backend.normalizer.normalize_str(text) == text


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    """A pattern that matches the longest of these names: a tree of their common prefixes, as there may be thousands."""
    tree: dict[str, Any] = {}
    for name in names:
        node = tree
        for char in name:
            node = node.setdefault(char, {})
        node[""] = {}
    return re.compile(_pattern_of(tree) if tree else "(?!)")


def _pattern_of(tree: dict[str, Any]) -> str:
    branches = [re.escape(char) + _pattern_of(below) for char, below in tree.items() if char]
    if not branches:
        return ""
    pattern = branches[0] if len(branches) == 1 and "" not in tree else f"(?:{'|'.join(branches)})"
    return pattern + ("?" if "" in tree else "")


def _rename(config: dict[str, Any], spelling: dict[str, str], keep_normalized: bool) -> None:
    """Rename tokens throughout a parsed tokenizer.json. Ids do not change: each token keeps its position."""
    # The post-processor would add BOS and EOS (a template writes its own), and may exclude white space from offsets.
    config["post_processor"] = config["truncation"] = config["padding"] = None
    for token in config["added_tokens"]:
        if token["content"] in spelling:
            token.update(content=spelling[token["content"]], normalized=token["normalized"] and keep_normalized)
    model = config["model"]
    if model.get("unk_token") in spelling:
        model["unk_token"] = spelling[model["unk_token"]]
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {spelling.get(piece, piece): index for piece, index in vocab.items()}
    else:
        model["vocab"] = [[spelling.get(piece, piece), *rest] for piece, *rest in vocab]
    if "merges" in model:  # of no use in the original: it never passes a control token, or a part of one, to the model
        model["merges"] = [merge for merge in model["merges"] if not _pieces(merge) & spelling.keys()]


def _pieces(merge: str | Sequence[str]) -> set[str]:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return {left, right, left + right}
