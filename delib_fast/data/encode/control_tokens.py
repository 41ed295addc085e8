"""A tokenizer in which only a chat template can write a control token, never a row.

The tokenizer is copied, and every control token is renamed to one private-use character. These characters replace the
control tokens in the template's text; the row's text is unchanged. One pass over the whole text then gives exactly the
ids of the original tokenizer (with the same splits and merges where the two meet), except that `<|im_end|>` or
`</think>` in a row stays text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import tokenizers

from delib_fast.data.rows import DataError

_FIRST = 0x100000  # first private-use character that stands for a control token
_SLOTS = re.compile("[\U000f0000-\U000fffff]")
_BREAK = "\U000fffff"  # a noncharacter, inserted into control tokens that a tool description spells out
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_MARKUP = re.compile(r"<[^<>\s]+>|\[/?[A-Z0-9_]+\]")


class ControlTokens:
    """A copy of a tokenizer with renamed control tokens.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        template_text: source of the chat template. An added token that occurs in it is a control token even if it is
            not marked as special (Qwen's `<think>`, `<tool_call>`).
    Raises:
        ValueError: the tokenizer has no fast backend, or its merges produce a control token from plain text, so that a
            row could contain it.
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
        self.spelling = {name: chr(_FIRST + k) for k, name in enumerate(names)}
        self._control_tokens = _any_of(names)
        self._reserved = re.compile(f"[{chr(_FIRST)}-{chr(_FIRST + max(len(names) - 1, 0))}]")
        _rename(config, self.spelling)
        self._backend = tokenizers.Tokenizer.from_str(json.dumps(config))
        self._check_ids(backend)

    def spell(self, rendering: str) -> str:
        """Replace the control tokens of a rendering with private-use characters, and unescape the escaped ones."""
        return self._control_tokens.sub(lambda match: self.spelling[match[0]], rendering).replace(_BREAK, "")

    def escape(self, text: str) -> str:
        """Break up the control tokens in a text that is passed to a template, so that `spell` keeps them as text."""
        return self._control_tokens.sub(lambda match: match[0][0] + _BREAK + match[0][1:], text)

    @staticmethod
    def is_escaped(text: str) -> bool:
        """Whether `escape` has broken up a control token in a text."""
        return _BREAK in text

    @staticmethod
    def refuse_slots(text: str, location: str) -> None:
        """Raise DataError if a tool contains a character that is reserved as a placeholder for texts."""
        if not text.isascii() and (found := _SLOTS.search(text)):
            raise DataError(
                f"a tool contains the private-use character U+{ord(found[0]):X}, which is reserved as a placeholder "
                "for texts; remove it",
                reason="private_use",
                location=location,
            )

    def is_control(self, char: str) -> bool:
        """Whether a character stands for a control token."""
        return _FIRST <= ord(char) < _FIRST + len(self.spelling)

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
    # White space that a tokenizer adds as tokens (several spaces) is ordinary text, and so are added words.
    if content.isspace() or content.isalnum():
        return False
    return bool(_MARKUP.fullmatch(content)) or content in template_text


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _rename(config: dict[str, Any], spelling: dict[str, str]) -> None:
    """Rename tokens throughout a parsed tokenizer.json. Ids do not change: each token keeps its position."""
    # The post-processor would add BOS and EOS (a template writes its own), and may exclude white space from offsets.
    config["post_processor"] = config["truncation"] = config["padding"] = None
    for token in config["added_tokens"]:
        if token["content"] in spelling:
            token.update(content=spelling[token["content"]], normalized=False)
    model = config["model"]
    if model.get("unk_token") in spelling:
        model["unk_token"] = spelling[model["unk_token"]]
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {spelling.get(piece, piece): index for piece, index in vocab.items()}
    else:
        model["vocab"] = [[spelling.get(piece, piece), *rest] for piece, *rest in vocab]
    for merge in model.get("merges", ()):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        if {left, right, left + right} & spelling.keys():
            raise ValueError(
                f"the tokenizer's control token {left + right!r} is also the result of a merge of its vocabulary, so "
                "that a row could write it; use a tokenizer in which it is only an added token"
            )
