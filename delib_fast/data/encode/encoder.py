"""Encode a row as token ids, with one segment for each token."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, Literal

import numpy as np

from delib_fast.data.encode.chat import ChatRenderer
from delib_fast.data.encode.chat_input import THINK, ChatInput
from delib_fast.data.encode.control_tokens import ControlTokens
from delib_fast.data.encode.plain_tags import PlainTags
from delib_fast.data.encode.skeleton import Skeleton
from delib_fast.data.encode.template import PLAIN_TEMPLATE, ChatTemplate
from delib_fast.data.encode.thought_form import ThoughtForm
from delib_fast.data.encode.tokenized_dataset import Example
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
        self._renderer = ChatRenderer(ChatTemplate(tokenizer, self.control, add_bos=bool(self._bos)))

    def encode(self, rows: Sequence[Row], *, cot: Cot, system_prompt: str | None) -> list[Example]:
        """Encode each row as one example. Raises DataError with the row's location."""
        if cot not in ("train", "context", "strip"):
            raise ValueError(f"cot is {cot!r}; it must be 'train', 'context' or 'strip'")
        for row in rows:
            for text in row.texts:
                self.control.refuse_reserved(text, row.location)
        chats = [self._chat(row, cot, system_prompt) for row in rows]
        for row, chat in zip(rows, chats, strict=True):
            if chat is not None:
                self._plain_tags.refuse(chat.texts[-2], chat.texts[-1], row.location)
        rendered = [
            None if chat is None else (chat, self._renderer.skeleton(chat, row.location), row.location)
            for row, chat in zip(rows, chats, strict=True)
        ]
        filled = [
            (row.text, None) if given is None else _filled(given[0], given[1])
            for row, given in zip(rows, rendered, strict=True)
        ]
        with ThreadPoolExecutor(1) as pool:  # the tokenizer runs without the GIL
            encoded = pool.submit(self._encode, rows, filled)
            given_chats = [(k, given) for k, given in enumerate(rendered) if given is not None]
            verified = self._renderer.verified([given for _, given in given_chats])
            examples = encoded.result()
        for (k, (chat, skeleton, _)), own in zip(given_chats, verified, strict=True):
            if own is not skeleton:
                (examples[k],) = self._encode([rows[k]], [_filled(chat, own)])
        return examples

    def _encode(self, rows: Sequence[Row], filled: Sequence[tuple[str, tuple[int, ...] | None]]) -> list[Example]:
        """Tokenize the text of each row, which is given with the boundaries of its reply (None for a document)."""
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
        for text in cots:
            self._plain_tags.refuse(text, row.response, row.location)
        chat = ChatInput.of(row, _with_system_prompt(row.messages, system_prompt), (row.cot or "").strip())
        skeleton = self._skeleton(chat, row.location)
        cores = [text.strip() for text in chat.texts]
        filled = [skeleton.fill([*cores[:-2], cot.strip(), cores[-1]]) for cot in cots]
        return self._encode([row] * len(cots), filled)

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
        chat = _prompt_chat(messages, "" if thinking is None else "thought")
        skeleton = self._skeleton(chat, "a prompt")
        if thinking is None:
            text = self._renderer.prompt(chat, skeleton.style, "a prompt")
        else:
            cores = [*(text.strip() for text in chat.texts[:-2]), "", ""]
            text = skeleton.fill_before(len(cores) - 2 if thinking else len(cores) - 1, cores)
        return list(self.control.encode_batch([text])[0].ids)

    @cached_property
    def end_ids(self) -> list[int]:
        """The ids that end a reply: the chat template's end-of-turn token, and the tokenizer's EOS."""
        chat = _prompt_chat([Message("user", "a")], "")
        text, boundaries = self._skeleton(chat, "a prompt").fill(chat.texts)
        end_of_turn = self.control.encode_batch([text[: boundaries[2]]])[0].ids[-1]
        return sorted({end_of_turn, *([self._eos] if self._eos is not None else [])})

    @cached_property
    def thought(self) -> ThoughtForm:
        """What a reply writes around its chain of thought; the default tags if the template cannot write one."""
        if self._written_thought is None:
            opening, closing = THINK
            return ThoughtForm(opening, closing, tuple(self.control.encode_batch([self.control.spell(opening)])[0].ids))
        text, start, before, closing = self._written_thought
        opening = before.rstrip()
        encoding = self.control.encode_batch([text])[0]
        first, end = (_first_token_from(encoding, at, len(encoding.ids)) for at in (start, start + len(opening)))
        names = [self.control.unspell(part).strip() for part in (opening, closing)]
        return ThoughtForm(names[0], names[1], tuple(encoding.ids[first:end]) if opening.strip() else ())

    @cached_property
    def _plain_tags(self) -> PlainTags:
        """The think tags that are plain text to this tokenizer."""
        if self._written_thought is None:
            return PlainTags.by_default(self.control)
        _, _, before, after = self._written_thought
        return PlainTags.of(before, after, self.control)

    @cached_property
    def _written_thought(self) -> tuple[str, int, str, str] | None:
        """A chat with a chain of thought, where its reply begins, and what is written before and after the thought.

        Control tokens are private-use characters. None if the template cannot write such a chat.
        """
        chat = _prompt_chat([Message("user", "a")], "thought")
        try:
            skeleton = self._skeleton(chat, "a prompt")
        except DataError:
            return None
        text, (start, response, _) = skeleton.fill(chat.texts)
        cot = len(skeleton.fill_before(len(chat.texts) - 2, chat.texts))
        return text, start, text[start:cot], text[cot + len("thought") : response]

    def _chat(self, row: Row, cot: Cot, system_prompt: str | None) -> ChatInput | None:
        """What the chat template receives for a row; None for a document."""
        if row.kind == "document":
            return None
        cot_text = row.cot or "" if cot != "strip" else ""
        if not row.response.strip() and not row.calls and (cot != "train" or not cot_text.strip()):
            raise DataError(
                f"there is nothing to train on: the response is empty, and with cot: {cot} only the response is "
                "trained on",
                reason="nothing_supervised",
                location=row.location,
            )
        return ChatInput.of(row, _with_system_prompt(row.messages, system_prompt), cot_text)

    def _skeleton(self, chat: ChatInput, location: str) -> Skeleton:
        return self._renderer.verified([(chat, self._renderer.skeleton(chat, location), location)])[0]

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


def _filled(chat: ChatInput, skeleton: Skeleton) -> tuple[str, tuple[int, ...]]:
    return skeleton.fill([text.strip() for text in chat.texts])


def _prompt_chat(messages: Sequence[Message], cot: str) -> ChatInput:
    """A chat with these messages and a reply of some text."""
    row = Row(kind="chat", location="", source="", digest="", response="reply")
    return ChatInput.of(row, messages, cot)


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
