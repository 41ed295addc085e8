"""Render chats, and track which text comes from the chat template, from the row, and from the model.

A template is rendered once for each *shape* of row (the roles, which texts are empty, the white space around them),
with one private-use character as a placeholder for each text. Every row is then rendered as stock transformers does,
and compared with its filled shape. If they differ, the template looks at the texts of the row: it is rendered for this
row alone, with placeholders only for its chain of thought and response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from delib_fast.data.encode.chat_input import ChatInput, Style, TemplateInput
from delib_fast.data.encode.skeleton import PromptForm, Skeleton
from delib_fast.data.encode.skeleton_builder import SkeletonBuilder
from delib_fast.data.encode.template import (
    ChatTemplate,
    finished_request,
    located,
    prompt_request,
    refused,
    rendering_errors,
)
from delib_fast.data.rows import DataError

_MAX_SHAPES = 10_000


@dataclass
class ChatRenderer:
    """Renders the skeletons of a chat template, and keeps them by shape."""

    template: ChatTemplate
    _skeletons: dict[Any, Skeleton | DataError] = field(default_factory=dict)

    def skeleton(self, chat: ChatInput, location: str) -> Skeleton:
        """Return a skeleton for a chat, from the cache if a chat of its shape was rendered before.

        It must be compared with the chat (`verified`) before it is used.

        Raises:
            DataError: the template refuses the row, drops a text or the tools, or writes nothing after the response.
        """
        with located(location):
            key = (chat.key, self.template.day)
        found = self._skeletons.get(key)
        if found is None:
            for text in (chat.tools, *chat.calls, *chat.fields):
                self.template.control.refuse_slots(text, location)
            if len(self._skeletons) >= _MAX_SHAPES:
                self._skeletons.clear()
            try:
                with rendering_errors(chat):
                    found = SkeletonBuilder(self.template).build(chat, own=False)
            except DataError as error:
                found = error
            if not chat.calls:  # their arguments differ from row to row
                self._skeletons[key] = found
        return self._own(chat, location, found) if isinstance(found, DataError) else found

    def verified(self, chats: Sequence[tuple[ChatInput, Skeleton, str]]) -> list[Skeleton]:
        """Compare chats with the renderings of stock transformers.

        Args:
            chats: each with its skeleton and location.
        Returns:
            The skeleton of each chat if, filled, it equals the chat's stock rendering, or else one for this chat alone.
        Raises:
            DataError: no rendering with placeholders equals the stock rendering.
        """
        escaped = [(self._escaped(chat, location), skeleton) for chat, skeleton, location in chats]
        return [
            skeleton if equal else self._own(chat, location, None)
            for (chat, skeleton, location), equal in zip(chats, self._equal_stock(escaped), strict=True)
        ]

    def _own(self, chat: ChatInput, location: str, generic: DataError | None) -> Skeleton:
        """Return a skeleton for one chat alone. `generic` is the error of its shape, which is raised if this fails."""
        escaped = self._escaped(chat, location)
        for text in chat.texts:
            self.template.control.refuse_slots(text, location)
        with located(location):
            try:
                with rendering_errors(escaped):
                    skeleton = SkeletonBuilder(self.template).build(escaped, own=True)
            except DataError as error:
                raise generic or error from None
            if not self._equal_stock([(escaped, skeleton)])[0]:
                raise generic or self._difference(chat)
        return skeleton

    @staticmethod
    def _difference(chat: ChatInput) -> DataError:
        if chat.has_reply_of_blocks:
            return refused(
                "the chat template does not join the text blocks of the reply with a line break: write the reply as "
                "one text"
            )
        return refused(
            "the chat template changes the reply of a row (other than stripping white space), so that loss masks "
            "cannot be exact; use another template"
        )

    def prompt(self, chat: ChatInput, style: Style, location: str) -> str:
        """Return the generation prompt of a chat. Control tokens are written as private-use characters."""
        escaped = self._escaped(chat, location)
        inputs = TemplateInput(escaped, style, self.template.control)
        with located(location), rendering_errors(escaped):
            return self.template.control.spell(self.template.prompt(inputs, PromptForm({})))

    def _escaped(self, chat: ChatInput, location: str) -> ChatInput:
        with located(location):
            return chat.with_texts(self.template.control.escape(list(chat.texts)))

    def _equal_stock(self, chats: Sequence[tuple[ChatInput, Skeleton]]) -> list[bool]:
        """Whether the skeleton of each chat, filled with its escaped texts, is what the template writes."""
        inputs = [TemplateInput(escaped, skeleton.style, self.template.control) for escaped, skeleton in chats]
        forms = [skeleton.prompt_form for _, skeleton in chats]
        finished = self.template.render_all(list(map(finished_request, inputs)))
        prompts = self.template.render_all(list(map(prompt_request, inputs, forms)))
        equal = []
        for k, (escaped, skeleton) in enumerate(chats):
            cores = [text.strip() for text in escaped.texts]
            equal.append(finished[k] == skeleton.finished.fill(cores) and prompts[k] == skeleton.prompt.fill(cores))
        return equal
