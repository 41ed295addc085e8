"""A tokenizer in which a control token can only be written by a chat template, never by a row.

The tokenizer is copied with every control token renamed to one private-use character. Scaffolding is spelled
with these characters, what a row brings is left as it is: one pass over the whole text then gives exactly the
ids of the original tokenizer (the same splits, the same merges across borders), except that `<|im_end|>` or
`</think>` typed by a row is text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import tokenizers

from delib_fast.data.rows import DataError

_FIRST = 0x100000  # the plane of private-use characters that carries the control tokens
_SLOTS = re.compile("[\U000f0000-\U000fffff]")
_BREAK = "\U000fffff"  # no character: it keeps a control token that is typed inside a template's values apart
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_MARKUP = re.compile(r"<[^<>\s]+>|\[/?[A-Z0-9_]+\]")


class ControlTokens:
    """The renamed copy of a tokenizer.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        template_text: text of the chat template; an added token that occurs in it is a control token even if
            it is not marked special (Qwen's `<think>`, `<tool_call>`).
    Raises:
        ValueError: the tokenizer has no fast backend, or its vocabulary spells a control token out of plain
            text, so that a row could write it.
    """

    def __init__(self, tokenizer: Any, template_text: str) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, tokenizers.Tokenizer):
            raise ValueError(
                f"{type(tokenizer).__name__} has no fast backend: masks need character offsets; "
                "use a tokenizer that comes as tokenizer.json (PreTrainedTokenizerFast)"
            )
        tree = json.loads(backend.to_str())
        names = [token["content"] for token in tree["added_tokens"] if _is_control(token, template_text)]
        self.spelling = {name: chr(_FIRST + k) for k, name in enumerate(names)}
        self._in_scaffold = _any_of(names)
        self._reserved = re.compile(f"[{chr(_FIRST)}-{chr(_FIRST + max(len(names) - 1, 0))}]")
        _rename(tree, self.spelling)
        self._backend = tokenizers.Tokenizer.from_str(json.dumps(tree))
        self._check_ids(backend)

    def spell(self, scaffold: str) -> str:
        """Scaffolding with its control tokens as private-use characters; what was `guarded` in it stays text."""
        return self._in_scaffold.sub(lambda match: self.spelling[match[0]], scaffold).replace(_BREAK, "")

    def guarded(self, text: str) -> str:
        """Text that a template is given as it is (and not as a hole): control tokens typed in it are taken apart until
        `spell` has run."""
        return self._in_scaffold.sub(lambda match: match[0][0] + _BREAK + match[0][1:], text)

    @staticmethod
    def is_guarded(text: str) -> bool:
        """Whether something was taken apart in it."""
        return _BREAK in text

    @staticmethod
    def refuse_slots(text: str, location: str) -> None:
        """What a template is given as it is may hold none of the characters that stand for a row's texts."""
        if not text.isascii() and (found := _SLOTS.search(text)):
            raise DataError(
                f"a tool holds the private-use character U+{ord(found[0]):X}, which stands for a text "
                "while encoding; remove it",
                reason="private_use",
                location=location,
            )

    def is_control(self, char: str) -> bool:
        return _FIRST <= ord(char) < _FIRST + len(self.spelling)

    def refuse_reserved(self, text: str, location: str) -> None:
        """A row that holds one of the private-use characters themselves can't be told from scaffolding."""
        if not text.isascii() and (found := self._reserved.search(text)):
            raise DataError(
                f"holds the private-use character U+{ord(found[0]):X}, which stands for a "
                "control token while encoding; remove it",
                reason="private_use",
                location=location,
            )

    def encode_batch(self, texts: Sequence[str]) -> list[tokenizers.Encoding]:
        """Tokens with character offsets; parallel over the texts unless TOKENIZERS_PARALLELISM is false."""
        return self._backend.encode_batch(list(texts), add_special_tokens=False)

    def _check_ids(self, original: tokenizers.Tokenizer) -> None:
        for name, char in self.spelling.items():
            if self._backend.token_to_id(char) != original.token_to_id(name):
                raise ValueError(
                    f"the tokenizer's added token {name!r} can't be told from text: its id changes when it is renamed"
                )
        if self._backend.get_vocab_size() != original.get_vocab_size():
            raise ValueError(
                "the tokenizer's control tokens can't be told from text: the vocabulary changes "
                "size when they are renamed"
            )


def _is_control(token: dict[str, Any], template_text: str) -> bool:
    content = token["content"]
    if _BYTE.fullmatch(content):  # what a vocabulary falls back to for a byte it has no piece for: text
        return False
    if token["special"]:
        return True
    # White space that a tokenizer adds as tokens (runs of spaces) is ordinary text, and so are added words.
    if content.isspace() or content.isalnum():
        return False
    return bool(_MARKUP.fullmatch(content)) or content in template_text


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _rename(tree: dict[str, Any], spelling: dict[str, str]) -> None:
    """Rename tokens throughout a tokenizer.json. Ids stay, since each keeps its place in its list."""
    # The processor would add BOS and EOS (a template writes its own), and may trim white space off the
    # offsets.
    tree["post_processor"] = tree["truncation"] = tree["padding"] = None
    for token in tree["added_tokens"]:
        if token["content"] in spelling:
            token.update(content=spelling[token["content"]], normalized=False)
    model = tree["model"]
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
                f"the tokenizer's control token {left + right!r} is also spelled by a merge of "
                "its vocabulary: a row could write it; use a tokenizer that adds such tokens"
            )
