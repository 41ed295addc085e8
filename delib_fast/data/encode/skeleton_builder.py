"""Build the skeleton of a chat: find the style that its template needs, and the boundaries of the reply."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

from delib_fast.data.encode.chat_input import THINK, ChatInput, TemplateInput, shape_of, styles
from delib_fast.data.encode.reply import refuse_dropped_tools, reply_end
from delib_fast.data.encode.skeleton import MAX_TEXTS, PromptForm, Rendering, Skeleton, skip_thought, slot, slots_in
from delib_fast.data.encode.template import TEMPLATE_ERRORS, ChatTemplate, refused
from delib_fast.data.rows import DataError

_ANOTHER = "use another template (tokenizer.chat_template)"
_DISTINCT = 32
"""A text of at least this many characters is assumed not to occur in what a template itself writes."""


@dataclass(frozen=True)
class SkeletonBuilder:
    """Renders a template with placeholders, and finds the parts of the rendering."""

    _template: ChatTemplate

    def build(self, chat: ChatInput, *, own: bool) -> Skeleton:
        """Render a chat with placeholders for all texts, or only for those of its reply (`own`)."""
        if len(chat.texts) > MAX_TEXTS:
            raise refused(f"the chat has {len(chat.roles)} messages; at most {MAX_TEXTS // 2 - 1} can be encoded")
        marked = [_marked(k, text) for k, text in enumerate(chat.texts)]
        slotted = chat.with_texts([*(chat.texts[:-2] if own else marked[:-2]), *marked[-2:]])
        inputs, finished = self._first_that_fits(slotted)
        prompt, form, supplied = self._supplied(inputs, finished)
        if own:
            self._refuse_dropped_messages(inputs, finished)
        text = self._template.control.spell(finished)
        refuse_dropped_tools(inputs, finished, text[supplied:], self._template.finished)
        if inputs.style.cot == "prompt":
            form = replace(form, earlier_cots=True)  # as at inference
            prompt = self._template.prompt(inputs, form)
            text, supplied = self._after_prompt(inputs, text, self._template.control.spell(prompt), supplied)
        cot_slot, response_slot = slot(len(marked) - 2), slot(len(marked) - 1)
        response_start = skip_thought(self._template.control, text, cot_slot, response_slot, supplied)
        if cot_slot not in text and response_start == supplied:
            response_start = self._skip_empty_block(inputs, text, supplied)
        end = reply_end(inputs, text, max(text.find(response_slot) + 1, response_start), self._template.finished)
        positions = (supplied if cot_slot in text else response_start, response_start, end)
        skeleton = Skeleton(
            rendering=Rendering.of(text),
            boundaries=tuple((n := len(slots_in(text[:position])), position - n) for position in positions),
            style=inputs.style,
            finished=Rendering.of(finished),
            prompt=Rendering.of(prompt),
            prompt_form=form,
        )
        if not self._template.control.is_escaped(finished):
            self._check_ids(skeleton.rendering, chat, own=own)
        return skeleton

    def _first_that_fits(self, slotted: ChatInput) -> tuple[TemplateInput, str]:
        """Return the first style in which the template writes all texts, and its rendering with the reply.

        Raises:
            DataError, jinja2.TemplateError, TypeError: there is none.
        """
        first: Exception | None = None
        for style in styles(slotted):
            inputs = TemplateInput(slotted, style, self._template.control, has_slots=True)
            last: Exception | None = None
            for cot in self._places_for_cot(inputs):
                placed = replace(inputs, style=replace(style, cot=cot))
                try:
                    finished = self._template.finished(placed)
                except DataError:  # the template does not finish
                    raise
                except TEMPLATE_ERRORS as error:
                    last = error
                    break  # the template refuses the texts, or a chain of thought next to them
                try:
                    _refuse_dropped_texts(placed, finished)
                    if cot == "content":
                        self._refuse_text_before_cot(placed, finished)
                except DataError as error:
                    last = error
                else:
                    return placed, finished
            first = first or last
        assert first is not None, "there is at least one style"
        raise first

    def _places_for_cot(self, inputs: TemplateInput) -> Iterator[Literal["field", "content", "prompt"]]:
        """Yield the places where the chain of thought may be, the best first."""
        yield "field"
        if inputs.chat.has_cot:
            if self._thought_tags(inputs):
                yield "prompt"
            yield "content"
            yield "prompt"

    def _refuse_text_before_cot(self, inputs: TemplateInput, finished: str) -> None:
        """Raise DataError if the model would have to write something before a thought that is in the content."""
        _, _, supplied = self._supplied(inputs, finished)
        text = self._template.control.spell(finished)
        opening, closing = map(self._template.control.spell, THINK)
        before = text[supplied : text.index(slot(len(inputs.chat.texts) - 2))]
        if closing in before or before.replace(opening, "").strip():
            raise refused(f"the chat template writes the chain of thought after other parts of the reply; {_ANOTHER}")

    def _thought_tags(self, inputs: TemplateInput) -> tuple[str, str] | None:
        """Return what a template writes around a thought that it removes from final replies; None if nothing.

        It keeps the thought in front of a tool call, so a call is added to the reply.
        """
        if inputs.chat.has_calls:
            return None
        call = '[{"name": "probe", "arguments": {}, "id": "functions.probe:0"}]'
        calls = (*(inputs.chat.calls[:-1] or ("",) * len(inputs.chat.roles)), call)
        try:
            prompt = self._template.control.spell(self._template.prompt(inputs, PromptForm({})))
        except TEMPLATE_ERRORS:
            return None
        return self._tags(inputs, replace(inputs.chat, calls=calls), prompt)

    def _tags(self, inputs: TemplateInput, chat: ChatInput, prompt: str) -> tuple[str, str] | None:
        """Return what a template writes before and after the thought of a chat, if it begins like this prompt."""
        probe = replace(inputs, chat=chat, style=replace(inputs.style, cot="field"))
        try:
            text = self._template.control.spell(self._template.finished(probe))
        except TEMPLATE_ERRORS:
            return None
        cot_slot, response_slot = slot(len(chat.texts) - 2), slot(len(chat.texts) - 1)
        if text.count(cot_slot) != 1 or not text.startswith(prompt):
            return None
        cot_at = text.index(cot_slot)
        if response_slot in text[:cot_at]:
            return None  # the thought follows the response
        end = skip_thought(self._template.control, text, cot_slot, response_slot, len(prompt))
        return text[len(prompt) : cot_at], text[cot_at + 1 : end]

    def _skip_empty_block(self, inputs: TemplateInput, text: str, supplied: int) -> int:
        """Return the position after an empty think block that has other tags than <think>, if there is one."""
        start = text[supplied:].lstrip()[:1]
        if not start or not self._template.control.is_control(start):
            return supplied
        texts = inputs.chat.texts
        thoughtful = inputs.chat.with_texts([*texts[:-2], slot(len(texts) - 2), texts[-1]])
        before, following = self._tags(inputs, thoughtful, text[:supplied]) or ("", "")
        if not before.strip() or not following.strip():
            return supplied
        block = re.compile(rf"\s*{re.escape(before.strip())}\s*{re.escape(following.strip())}\s*").match(text, supplied)
        return block.end() if block else supplied

    def _refuse_dropped_messages(self, inputs: TemplateInput, finished: str) -> None:
        """Raise DataError if a message can be replaced without a change of the rendering."""
        texts = inputs.chat.texts
        for k, role in enumerate(inputs.chat.roles):
            core = texts[2 * k].strip()
            elsewhere = len(core) < _DISTINCT or any(core in text for i, text in enumerate(texts) if i != 2 * k)
            if not core or (core in finished and not elsewhere):
                continue
            other = inputs.chat.with_texts([*texts[: 2 * k], slot(2 * k), *texts[2 * k + 1 :]])
            same = False
            with suppress(*TEMPLATE_ERRORS):  # the template reads the text
                same = self._template.finished(replace(inputs, chat=other)) == finished
            if same:
                raise refused(f"the chat template drops the {role} message (number {k}); {_ANOTHER}")

    def _supplied(self, inputs: TemplateInput, finished: str) -> tuple[str, PromptForm, int]:
        """Return the generation prompt, its form, and how many characters of a rendering it supplies.

        Some templates write the thoughts of earlier tool calls only until the final reply. What is trained on is the
        finished chat, so the prompt is then rendered without these thoughts.
        """
        tried: list[tuple[PromptForm, str]] = []
        for form in self._prompt_forms(inputs.chat):
            prompt = self._template.prompt(inputs, form)
            if inputs.style.cot == "prompt" and prompt.rstrip().endswith(THINK[1]):
                continue  # a thought cannot follow
            if finished.startswith(prompt):
                return prompt, form, len(self._template.control.spell(prompt))
            tried.append((form, prompt))
        if not tried:
            raise refused(
                "the chat template removes the chain of thought from replies, and its generation prompt closes the "
                "think block: a chain of thought cannot be trained on with this template; set cot: strip, or use "
                "another template"
            )
        text = self._template.control.spell(finished)
        for form, prompt in tried:
            common, rest = self._common(text, self._template.control.spell(prompt))
            if not rest.strip():
                return prompt, form, common
        raise refused(
            "the chat template writes these messages differently before a reply than as a prompt for one, "
            f"so that it is unclear what the model has to write; {_ANOTHER}"
        )

    @staticmethod
    def _prompt_forms(chat: ChatInput) -> Iterator[PromptForm]:
        for earlier_cots in (True, False) if any(chat.texts[1:-2:2]) else (True,):
            yield PromptForm({}, earlier_cots)
            yield PromptForm({"enable_thinking": chat.has_cot}, earlier_cots)

    def _common(self, finished: str, prompt: str) -> tuple[int, str]:
        """Return the length of the common beginning, and the rest of the prompt without think tags."""
        tags = re.compile("|".join(map(re.escape, map(self._template.control.spell, THINK))))
        differ = (k for k, (a, b) in enumerate(zip(finished, prompt, strict=False)) if a != b)
        common = next(differ, min(len(finished), len(prompt)))
        for tag in tags.finditer(prompt):
            if tag.start() < common < tag.end():
                common = tag.start()
        return common, tags.sub("", prompt[common:])

    def _after_prompt(self, inputs: TemplateInput, finished: str, prompt: str, supplied: int) -> tuple[str, int]:
        """Write the chain of thought where the model will: after the generation prompt, and before the response.

        If the template writes an empty think block in front of the response, the thought fills it.
        """
        opening, closing = map(self._template.control.spell, THINK)
        block = re.compile(rf"\s*(?:{opening})?(\s*){closing}(\s*)").match(finished, supplied)
        rest = finished[block.end() :] if block else finished[supplied:]
        line, after = ("\n" if block[1] else "", block[2]) if block else ("\n", "\n\n")
        before, following = self._thought_tags(inputs) or (opening + line, line + closing + after)
        if prompt.rstrip().endswith(opening):
            before = before.removeprefix(opening).lstrip()
        return f"{prompt}{before}{inputs.chat.texts[-2]}{following}{rest}", len(prompt)

    def _check_ids(self, rendering: Rendering, chat: ChatInput, *, own: bool) -> None:
        """Raise DataError if renaming the control tokens changes the ids of a sample row, or of the row itself."""
        cores = [text.strip() if own else f"Probe {k}, of no meaning" for k, text in enumerate(chat.texts)]
        text = rendering.fill(cores)
        ours = self._template.control.encode_batch([text])[0].ids
        stock = self._template.tokenizer.backend_tokenizer.encode(
            self._template.control.unspell(text), add_special_tokens=False
        )
        if ours != stock.ids and not self._template.control.is_escaped(text):
            raise refused(
                "the tokenizer gives other ids when its control tokens are kept apart from text, so that rows would "
                "not have the ids of apply_chat_template; use another tokenizer"
            )


def _marked(k: int, text: str) -> str:
    lead, core, trail = shape_of(text)
    return f"{lead}{slot(k) if core else ''}{trail}"


def _refuse_dropped_texts(inputs: TemplateInput, finished: str) -> None:
    """Raise DataError unless the template writes each text with a placeholder, and those of the reply once, in order.

    A content that is a list of text blocks must not be written as Python or JSON source either.
    """
    chat = inputs.chat
    for k, message in enumerate([*inputs.messages(), inputs.reply()]):
        content = message["content"]
        if isinstance(content, list):
            parts = [block["text"].strip() for block in content]
            if any(re.search(rf"""["']text["']\s*:\s*["']\s*{re.escape(part)}""", finished) for part in parts):
                raise refused(f"the chat template writes the text blocks of a message as source code; {_ANOTHER}")
        else:
            parts = slots_in(content or "")
        if k < len(chat.roles) and any(part not in finished for part in parts):
            raise refused(f"the chat template drops the {chat.roles[k]} message (number {k}); {_ANOTHER}")
    texts = chat.texts[-1:] if inputs.style.cot == "prompt" else chat.texts[-2:]
    wanted = [found for text in texts for found in slots_in(text)]
    if [found for found in slots_in(finished) if found in wanted] != wanted:
        if chat.has_calls:
            raise refused(
                "the chat template drops the text next to a tool call, or the chain of thought before it; "
                f"{_ANOTHER}, or remove them from the rows"
            )
        raise refused(f"the chat template drops the response, or writes it twice; {_ANOTHER}")
