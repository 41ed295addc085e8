"""Sampling of replies: chats in, chains of thought and responses out. Replies are cached in a file as they complete.

    sampler = Sampler(model, tokenizer, Sampling(max_new_tokens=256))
    replies = sampler([[Message("user", "How are you?")]], thinking=True)

Any function from chats to `Reply`s is a `ChatModel`, such as a model behind an endpoint or a stub in a test.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from delib_fast.data import Message
from delib_fast.data.encode.encoder import encoder_for
from delib_fast.digests import append_json_line, read_json_lines
from delib_fast.models.generate import Sampling, generate_ids

Tags = Literal["none", "closed", "unclosed", "stray"]
_TAGS = ("<think>", "</think>")


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply of a model, split into chain of thought and response."""

    cot: str | None
    response: str
    tags: Tags
    """State of the think block: "none", "closed", "unclosed" (so there is no response), "stray" (a lone tag)."""
    finished: bool
    """Whether an end token ended the reply, not the length limit."""
    tokens: int
    """Number of generated tokens, including the end token."""
    cot_tokens: int = 0
    """Number of tokens of the chain of thought without its tags, when it is encoded on its own."""

    @property
    def opened(self) -> bool:
        """Whether the reply opens a think block, or its prompt does."""
        return self.tags in ("closed", "unclosed")


class ChatModel(Protocol):
    def __call__(
        self, chats: Sequence[Sequence[Message]], *, thinking: bool | None = None, sample: int = 0
    ) -> list[Reply]:
        """Return one reply per chat.

        Args:
            thinking: True opens the think block in the prompt, False closes it empty, None lets the model choose.
            sample: the index of the sample; a different index gives a different draw.
        """
        ...


class Sampler:
    """A loaded model as a `ChatModel`.

    Args:
        model: a TrainableLM or a transformers model; see `models.generate`.
        tokenizer: the model's fast tokenizer. Its chat template defines the form of a prompt and of a think block.
        sampling: length, temperature, seed.
        system_prompt: prepended to chats that have no system message.
        cache: a .jsonl file to which every finished batch is appended, so that a killed evaluation resumes.
        identity: identifies the weights (e.g. by their hash) in the cache. The other parts of a reply's key are the
            prompt's ids and the sampling settings.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        sampling: Sampling,
        *,
        system_prompt: str | None = None,
        cache: Path | None = None,
        identity: str = "",
    ) -> None:
        self._model, self._tokenizer, self._sampling = model, tokenizer, sampling
        self._system_prompt = system_prompt
        self._encoder = encoder_for(tokenizer)
        self._cache = _ReplyCache(cache) if cache is not None else None
        self._identity = identity
        self.drawn = 0
        """Number of replies that were generated because they were not in the cache."""

    def __call__(
        self, chats: Sequence[Sequence[Message]], *, thinking: bool | None = None, sample: int = 0
    ) -> list[Reply]:
        prompts = [
            self._encoder.encode_prompt(chat, thinking=thinking, system_prompt=self._system_prompt) for chat in chats
        ]
        keys = [self._key(prompt, sample) for prompt in prompts]
        known = {key: reply for key in keys if self._cache and (reply := self._cache.get(key))}
        missing = [i for i, key in enumerate(keys) if key not in known]
        size = self._sampling.batch_size * 4  # several batches, which `generate_ids` sorts by length
        for start in range(0, len(missing), size):
            chunk = missing[start : start + size]
            for i, reply in zip(chunk, self.draw([prompts[i] for i in chunk], thinking, sample), strict=True):
                known[keys[i]] = reply
                if self._cache:
                    self._cache.put(keys[i], reply, chats[i])
        return [known[key] for key in keys]

    def draw(self, prompts: Sequence[Sequence[int]], thinking: bool | None = None, sample: int = 0) -> list[Reply]:
        """Generate a reply to each prompt, without the cache. Equal prompts have independent replies.

        Args:
            prompts: encoded prompts, control tokens included.
            thinking, sample: see `ChatModel`.
        """
        settings = {**asdict(self._sampling), "seed": self._sampling.seed + 7919 * sample}
        ends = self._encoder.end_ids
        replies = generate_ids(
            self._model, prompts, Sampling(**settings), end_ids=ends, pad_id=self._tokenizer.pad_token_id or 0
        )
        self.drawn += len(replies)
        return [self._parse(ids, thinking) for ids in replies]

    def _parse(self, ids: list[int], thinking: bool | None) -> Reply:
        form, ends = self._encoder.thought, self._encoder.end_ids
        opened = True if thinking is None and not form.opening else thinking  # the template opens the block itself
        reply = parse_reply(
            self._text(ids, ends),
            opened=opened,
            finished=bool(ids and ids[-1] in ends),
            tokens=len(ids),
            tags=(form.opening or _TAGS[0], form.closing or _TAGS[1]),
        )
        return replace(reply, cot_tokens=len(self._tokenizer(reply.cot or "", add_special_tokens=False)["input_ids"]))

    def _text(self, ids: list[int], ends: Sequence[int]) -> str:
        kept = ids[:-1] if ids and ids[-1] in ends else ids
        text: str = self._tokenizer.decode(kept, skip_special_tokens=False)
        return text

    def _key(self, prompt: Sequence[int], sample: int) -> str:
        parts = [self._identity, list(prompt), asdict(self._sampling), sample]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def parse_reply(
    text: str, *, opened: bool | None, finished: bool = True, tokens: int = 0, tags: tuple[str, str] = _TAGS
) -> Reply:
    """Split a reply into chain of thought and response. Accepts any text.

    Args:
        opened: whether the prompt opened the think block (True), closed it (False), or did neither (None).
        finished, tokens: see `Reply`.
        tags: what opens and what closes the block, as `Encoder.thought` returns them.
    """
    body = text.lstrip()
    inside = bool(opened)
    if body.startswith(tags[0]):
        body, inside = body[len(tags[0]) :], True
    before, closing, after = body.partition(tags[1])
    if inside and not closing:
        return Reply(body.strip() or None, "", "unclosed", finished, tokens)
    if inside:
        return Reply(before.strip() or None, after.strip(), "closed", finished, tokens)
    return Reply(None, text.strip(), "stray" if any(tag in text for tag in tags) else "none", finished, tokens)


class _ReplyCache:
    """Replies by key in a .jsonl file. A damaged line, or one cut off by a crash, is ignored: its reply is generated
    again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, Reply] = {}
        if path.exists():
            records, _ = read_json_lines(path)
            self._known = {record["key"]: Reply(**record["reply"]) for record in records}

    def get(self, key: str) -> Reply | None:
        return self._known.get(key)

    def put(self, key: str, reply: Reply, chat: Sequence[Message]) -> None:
        self._known[key] = reply
        self._path.parent.mkdir(parents=True, exist_ok=True)
        prompt = [{"role": message.role, "content": message.content} for message in chat]
        append_json_line(self._path, {"key": key, "prompt": prompt, "reply": asdict(reply)})
