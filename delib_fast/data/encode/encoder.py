"""Encode a row as token ids, with one segment for each token."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np

from delib_fast.data.encode.chat import PLAIN_TEMPLATE, THINK, ChatRenderer, Skeleton
from delib_fast.data.encode.control_tokens import ControlTokens
from delib_fast.data.encode.tokenized_dataset import Example
from delib_fast.data.read.tools import Tools
from delib_fast.data.rows import DataError, Message, Row, Segment

Cot = Literal["train", "context", "strip"]
"""How the chain of thought is used: it is trained on, kept as context, or removed."""


class Encoder:
    """Encodes rows with one tokenizer.

    The constructor copies the tokenizer, which takes about a second if it is large; `encoder_for` caches encoders.

    Args:
        tokenizer: a fast Hugging Face tokenizer, with its chat template if it has one.
    Raises:
        ValueError: the tokenizer has several chat templates, or cannot keep control tokens apart from text.
    """

    def __init__(self, tokenizer: Any) -> None:
        template = tokenizer.chat_template
        if isinstance(template, dict):
            raise ValueError(
                "the tokenizer has several chat templates, and none of them is selected: set "
                "tokenizer.chat_template to one of them"
            )
        self.control = ControlTokens(tokenizer, (template or PLAIN_TEMPLATE) + "".join(THINK))
        self._eos: int | None = tokenizer.eos_token_id
        self._bos = _leading_ids(tokenizer)
        self._renderer = ChatRenderer(tokenizer, self.control, add_bos=bool(self._bos))

    def encode(self, rows: Sequence[Row], *, cot: Cot, system_prompt: str | None) -> list[Example]:
        """Encode each row as one example. Raises DataError with the row's location."""
        if cot not in ("train", "context", "strip"):
            raise ValueError(f"cot is {cot!r}; it must be 'train', 'context' or 'strip'")
        filled = [self._text(row, cot, system_prompt) for row in rows]
        encodings = self.control.encode_batch([text for text, _ in filled])
        return [
            self._example(row, encoding, boundaries)
            for row, encoding, (_, boundaries) in zip(rows, encodings, filled, strict=True)
        ]

    def encode_with_cots(self, row: Row, cots: Sequence[str], *, system_prompt: str | None = None) -> list[Example]:
        """Encode a chat once for each of these chains of thought, instead of its own.

        All variants use the same rendering of the chat template, so that nothing else differs between them. An empty
        string gives an empty think block.

        Raises:
            ValueError: the row has no chain of thought.
            DataError: a text cannot be encoded.
        """
        if row.kind != "chat" or not (row.cot or "").strip():
            raise ValueError(f"{row.location}: the row has no chain of thought to replace")
        for text in (*row.texts, *cots):
            self.control.refuse_reserved(text, row.location)
        messages = _with_system_prompt(row.messages, system_prompt)
        texts = [*_message_texts(messages), (row.cot or "").strip(), row.response]
        skeleton = self._skeleton(row, messages, texts, True)
        cores = [text.strip() for text in texts]
        filled = [skeleton.fill([*cores[:-2], cot.strip(), cores[-1]]) for cot in cots]
        encodings = self.control.encode_batch([text for text, _ in filled])
        return [
            self._example(row, encoding, boundaries)
            for encoding, (_, boundaries) in zip(encodings, filled, strict=True)
        ]

    def encode_prompt(
        self, messages: Sequence[Message], *, thinking: bool | None = None, system_prompt: str | None = None
    ) -> list[int]:
        """Encode the messages before a reply, up to the position where generation starts.

        Args:
            messages: control tokens that a message spells out stay text; only the chat template can write them.
            thinking: True opens the think block, False writes an empty one, None leaves the choice to the model.
            system_prompt: prepended to a chat without a system message.
        """
        messages = _with_system_prompt(messages, system_prompt)
        for message in messages:
            self.control.refuse_reserved(message.content, "a prompt")
        skeleton, cores = self._prompt_skeleton(messages)
        if thinking is None:
            filled, boundaries = skeleton.fill(cores)
            text = filled[: boundaries[0]]
        else:
            cot_slot, response_slot = len(cores) - 2, len(cores) - 1
            text = skeleton.fill_before(cot_slot if thinking else response_slot, cores)
        return list(self.control.encode_batch([text])[0].ids)

    @cached_property
    def end_ids(self) -> list[int]:
        """The ids that end a reply: the chat template's end-of-turn token, and the tokenizer's EOS."""
        skeleton, cores = self._prompt_skeleton([Message("user", "a")], has_cot=False)
        text, boundaries = skeleton.fill([*cores[:-1], "b"])
        end_of_turn = self.control.encode_batch([text[: boundaries[2]]])[0].ids[-1]
        return sorted({end_of_turn, *([self._eos] if self._eos is not None else [])})

    def _prompt_skeleton(self, messages: Sequence[Message], *, has_cot: bool = True) -> tuple[Skeleton, list[str]]:
        """Return the skeleton of a chat with these messages, and its stripped texts with an empty reply."""
        texts = _message_texts(messages)
        shapes = [*texts, "thought" if has_cot else "", "reply"]
        skeleton = self._renderer.skeleton(tuple(m.role for m in messages), shapes, has_cot, "a prompt")
        return skeleton, [*(text.strip() for text in texts), "", ""]

    def _text(self, row: Row, cot: Cot, system_prompt: str | None) -> tuple[str, tuple[int, ...] | None]:
        """Return (text to tokenize, the boundaries of the reply as in `Skeleton.fill`, or None for a document)."""
        for text in row.texts:
            self.control.refuse_reserved(text, row.location)
        if row.kind == "document":
            return row.text, None
        messages = _with_system_prompt(row.messages, system_prompt)
        cot_text = row.cot or "" if cot != "strip" else ""
        if not row.response.strip() and not row.calls and (cot != "train" or not cot_text.strip()):
            raise DataError(
                f"there is nothing to train on: the response is empty, and with cot: {cot} only the response is "
                "trained on",
                reason="nothing_supervised",
                location=row.location,
            )
        texts = [*_message_texts(messages), cot_text, row.response]
        skeleton = self._skeleton(row, messages, texts, bool(cot_text.strip()))
        return skeleton.fill([text.strip() for text in texts])

    def _skeleton(self, row: Row, messages: Sequence[Message], texts: Sequence[str], has_cot: bool) -> Skeleton:
        tools = Tools.of(row, messages)
        for text in (tools.offered, *tools.calls, *tools.names):
            self.control.refuse_slots(text, row.location)
        return self._renderer.skeleton(tuple(m.role for m in messages), texts, has_cot, row.location, tools)

    def _example(self, row: Row, encoding: Any, boundaries: tuple[int, ...] | None) -> Example:
        if boundaries is None:
            return self._document(row, encoding)
        ids = np.array(encoding.ids, np.int32)
        segments = np.zeros(len(ids), np.int8)
        cot, response, end = (_first_token_from(encoding, char, len(ids)) for char in boundaries)
        segments[cot:response] = Segment.COT
        segments[response:end] = Segment.RESPONSE
        return Example(ids, segments, row.location, row.weight)

    def _document(self, row: Row, encoding: Any) -> Example:
        if self._eos is None:
            raise ValueError("the tokenizer has no eos_token, so that a document would have no end; set one")
        ids = np.array([*self._bos, *encoding.ids, self._eos], np.int32)
        return Example(ids, np.full(len(ids), Segment.DOCUMENT, np.int8), row.location, row.weight)


def _with_system_prompt(messages: Sequence[Message], system_prompt: str | None) -> Sequence[Message]:
    if system_prompt is None or messages[0].role in ("system", "developer"):
        return messages
    return (Message("system", system_prompt), *messages)


def _message_texts(messages: Sequence[Message]) -> list[str]:
    """Return the content and the chain of thought of each message, in the order that `ChatRenderer` expects."""
    return [text for message in messages for text in (message.content, message.cot or "")]


def _leading_ids(tokenizer: Any) -> list[int]:
    """Return the ids that the tokenizer prepends to every text (BOS), if any."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids = tokenizer("a")["input_ids"]
    for start in range(len(ids) - len(plain) + 1):
        if ids[start : start + len(plain)] == plain:
            return list(ids[:start])
    return []


def _first_token_from(encoding: Any, char: int, num_tokens: int) -> int:
    """Return the first token that begins at or after a character, since its first character decides its segment."""
    token: int | None = None
    while token is None:
        token = encoding.char_to_token(char)
        char += 1
        if token is None and (not num_tokens or char > encoding.token_to_chars(num_tokens - 1)[1]):
            return num_tokens
    while token < num_tokens and encoding.token_to_chars(token)[0] < char - 1:
        token += 1
    return token


_encoders: weakref.WeakKeyDictionary[Any, tuple[Any, Encoder]] = weakref.WeakKeyDictionary()


def encoder_for(tokenizer: Any) -> Encoder:
    """Return the cached encoder of a tokenizer. A new one is created if its tokens or chat template have changed."""
    state = (len(tokenizer), tokenizer.chat_template, tokenizer.eos_token_id, tokenizer.bos_token_id)
    known = _encoders.get(tokenizer)
    if known is None or known[0] != state:
        known = _encoders[tokenizer] = (state, Encoder(tokenizer))
    return known[1]


def encode_row(row: Row, tokenizer: Any, *, cot: Cot = "train", system_prompt: str | None = None) -> Example:
    """Encode one row, exactly as `encode_rows` does.

    Args:
        row: a document or a chat.
        tokenizer: a fast Hugging Face tokenizer, with its chat template if it has one.
        cot: "train" and "context" keep the chain of thought (the stage decides its loss weight), "strip" removes it.
        system_prompt: prepended to a chat without a system message.
    Returns:
        The ids of `tokenizer.apply_chat_template(messages)`, except that control tokens which the row spells out
        stay text. Segments: the generation prompt and an empty think block are PROMPT; the chain of thought, with the
        tags that the model has to write, is COT; the response, with the end of its turn, is RESPONSE. A document is BOS
        (if the tokenizer uses it), text and EOS, all of them DOCUMENT.
    Raises:
        DataError: there is nothing to train on, or the chat template cannot render the row. The message begins with the
            row's location.
    """
    return encoder_for(tokenizer).encode([row], cot=cot, system_prompt=system_prompt)[0]
