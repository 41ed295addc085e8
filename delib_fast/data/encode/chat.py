"""Render chats, and track which text comes from the chat template, from the row, and from the model.

A template is rendered once for each *shape* of row (the roles, which texts are empty, the white space around them),
with one private-use character as a placeholder for each text. Every row is then rendered as stock transformers does,
and compared with its filled shape. If they differ, the template looks at the texts of the row: it is rendered for this
row alone, with placeholders only for its chain of thought and response.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import date
from typing import Any, Literal

import jinja2

from delib_fast.data.encode.chat_input import THINK, ChatInput, Style, TemplateInput, shape_of, styles
from delib_fast.data.encode.control_tokens import ControlTokens
from delib_fast.data.encode.reply import refuse_dropped_tools, reply_end
from delib_fast.data.encode.skeleton import MAX_TEXTS, PromptForm, Rendering, Skeleton, skip_thought, slot, slots_in
from delib_fast.data.rows import DataError

PLAIN_TEMPLATE = """\
{%- if add_bos is defined and add_bos -%}{{- bos_token -}}{%- endif -%}
{%- for message in messages -%}
  {{- message.role | capitalize ~ ':\\n' -}}
  {%- if message.role == 'assistant' and loop.last and message.reasoning_content -%}
    {{- '<think>\\n' ~ message.reasoning_content ~ '\\n</think>\\n\\n' -}}
  {%- endif -%}
  {{- message.content ~ (eos_token if message.role == 'assistant' else '\\n\\n') -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:\\n' -}}{%- endif -%}
"""
"""The chat template of models without their own; it is also exported with such a model."""

_MAX_SHAPES = 10_000
_TIME_OF_DAY = re.compile(r"strftime_now\(\s*[\"'][^\"']*%[-#]?[HIMSTXcfprsR]")


@dataclass
class ChatRenderer:
    """Renders the skeletons of one tokenizer's chat template, and keeps them by shape."""

    tokenizer: Any
    control: ControlTokens
    add_bos: bool = False
    """Whether the plain template begins with BOS; a model's own template decides for itself."""
    _skeletons: dict[Any, Skeleton | DataError] = field(default_factory=dict)

    def skeleton(self, chat: ChatInput, location: str) -> Skeleton:
        """Return a skeleton for a chat, from the cache if a chat of its shape was rendered before.

        It must be compared with the chat (`verified`) before it is used.

        Raises:
            DataError: the template refuses the row, drops a text or the tools, or writes nothing after the response.
        """
        try:
            key = (chat.key, self._day)
        except DataError as error:
            raise _located(error, location) from None
        found = self._skeletons.get(key)
        if found is None:
            for text in (chat.tools, *chat.calls, *chat.fields):
                self.control.refuse_slots(text, location)
            if len(self._skeletons) >= _MAX_SHAPES:
                self._skeletons.clear()
            try:
                with _rendering_errors(chat):
                    found = self._build(chat, own=False)
            except DataError as error:
                found = error
            self._skeletons[key] = found
        return self._own(chat, location, found) if isinstance(found, DataError) else found

    def verified(self, chats: Sequence[tuple[ChatInput, Skeleton, str]]) -> list[Skeleton]:
        """Compare chats with stock.

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

    @property
    def _day(self) -> date | None:
        """Today, if the template may write it."""
        template = self.tokenizer.chat_template or ""
        if _TIME_OF_DAY.search(template):
            raise _refused(
                "the chat template writes the time of day (strftime_now), so that a row would have other ids from one "
                "moment to the next; let it write a fixed date"
            )
        return date.today() if "strftime_now" in template else None

    def _own(self, chat: ChatInput, location: str, generic: DataError | None) -> Skeleton:
        """Return a skeleton for one chat alone. `generic` is the error of its shape, which is raised if this fails."""
        escaped = self._escaped(chat, location)
        for text in chat.texts:
            self.control.refuse_slots(text, location)
        try:
            with _rendering_errors(escaped):
                skeleton = self._build(escaped, own=True)
        except DataError as error:
            raise _located(generic or error, location) from None
        if not self._equal_stock([(escaped, skeleton)])[0]:
            raise _located(generic or self._difference(chat), location)
        return skeleton

    @staticmethod
    def _difference(chat: ChatInput) -> DataError:
        if chat.has_reply_of_blocks:
            return _refused(
                "the chat template does not join the text blocks of the reply with a line break: write the reply as "
                "one text"
            )
        return _refused(
            "the chat template changes the reply of a row (other than stripping white space), so that loss masks "
            "cannot be exact; use another template"
        )

    # --- stock ----------------------------------------------------------------------------------------------

    def render(self, messages: Sequence[dict[str, Any]], **kwargs: Any) -> str:
        """Apply the chat template."""
        return self._apply([list(messages)], kwargs)[0]

    def prompt(self, chat: ChatInput, location: str) -> str:
        """Return the generation prompt of a chat. Control tokens are written as private-use characters."""
        escaped = self._escaped(chat, location)
        try:
            with _rendering_errors(escaped):
                inputs = TemplateInput(escaped, Style(), self.control)
                return self.control.spell(self._prompt_of(inputs, PromptForm({})))
        except DataError as error:
            raise _located(error, location) from None

    def _escaped(self, chat: ChatInput, location: str) -> ChatInput:
        try:
            return chat.with_texts(self.control.escape(list(chat.texts)))
        except DataError as error:
            raise _located(error, location) from None

    def _finished(self, inputs: TemplateInput) -> str:
        return self.render([*inputs.messages(), inputs.reply()], **inputs.kwargs())

    def _prompt_of(self, inputs: TemplateInput, form: PromptForm) -> str:
        messages = inputs.messages(earlier_cots=form.earlier_cots)
        return self.render(messages, add_generation_prompt=True, **form.kwargs, **inputs.kwargs())

    def _equal_stock(self, chats: Sequence[tuple[ChatInput, Skeleton]]) -> list[bool]:
        """Whether the skeleton of each chat, filled with its escaped texts, is what the template writes."""
        inputs = [TemplateInput(escaped, skeleton.style, self.control) for escaped, skeleton in chats]
        finished = self._render_all([([*given.messages(), given.reply()], given.kwargs()) for given in inputs])
        forms = [skeleton.prompt_form for _, skeleton in chats]
        prompts = self._render_all(
            [
                (
                    given.messages(earlier_cots=form.earlier_cots),
                    {"add_generation_prompt": True, **form.kwargs, **given.kwargs()},
                )
                for given, form in zip(inputs, forms, strict=True)
            ]
        )
        equal = []
        for k, (escaped, skeleton) in enumerate(chats):
            cores = [text.strip() for text in escaped.texts]
            equal.append(finished[k] == skeleton.finished.fill(cores) and prompts[k] == skeleton.prompt.fill(cores))
        return equal

    def _render_all(self, requests: Sequence[tuple[list[dict[str, Any]], dict[str, Any]]]) -> list[str | None]:
        """Render many chats, those with equal arguments in one call. None where the template raises an error."""
        groups: dict[str, list[int]] = {}
        for k, (_, kwargs) in enumerate(requests):
            groups.setdefault(json.dumps(kwargs), []).append(k)
        rendered: list[str | None] = [None] * len(requests)
        for members in groups.values():
            kwargs = requests[members[0]][1]
            try:
                texts = self._apply([requests[k][0] for k in members], kwargs)
            except _TEMPLATE_ERRORS:
                if len(members) == 1:
                    continue
                texts = [self._render_all([requests[k]])[0] for k in members]
            for k, text in zip(members, texts, strict=True):
                rendered[k] = text
        return rendered

    def _apply(self, chats: list[list[dict[str, Any]]], kwargs: dict[str, Any]) -> list[str]:
        if self.tokenizer.chat_template is None:
            kwargs = kwargs | {"chat_template": PLAIN_TEMPLATE, "add_bos": self.add_bos}
        return list(self.tokenizer.apply_chat_template(chats, tokenize=False, **kwargs))

    # --- building -------------------------------------------------------------------------------------------

    def _build(self, chat: ChatInput, *, own: bool) -> Skeleton:
        """Render a chat with placeholders for all texts, or only for those of its reply (`own`)."""
        if len(chat.texts) > MAX_TEXTS:
            raise _refused(f"the chat has {len(chat.roles)} messages; at most {MAX_TEXTS // 2 - 1} can be encoded")
        marked = [_marked(k, text) for k, text in enumerate(chat.texts)]
        slotted = chat.with_texts([*(chat.texts[:-2] if own else marked[:-2]), *marked[-2:]])
        inputs, finished = self._first_that_fits(slotted)
        prompt, form, supplied = self._supplied(inputs, finished)
        if own:
            self._refuse_dropped_messages(inputs, finished)
        text = self.control.spell(finished)
        refuse_dropped_tools(inputs, finished, text[supplied:], self._finished)
        if inputs.style.cot == "prompt":
            form = replace(form, earlier_cots=True)  # as at inference
            prompt = self._prompt_of(inputs, form)
            text, supplied = self._after_prompt(inputs, text, self.control.spell(prompt), supplied)
        cot_slot, response_slot = slot(len(marked) - 2), slot(len(marked) - 1)
        response_start = skip_thought(self.control, text, cot_slot, response_slot, supplied)
        end = reply_end(inputs, text, max(text.find(response_slot) + 1, response_start), self._finished)
        positions = (supplied if cot_slot in text else response_start, response_start, end)
        skeleton = Skeleton(
            rendering=Rendering.of(text),
            boundaries=tuple((n := len(slots_in(text[:position])), position - n) for position in positions),
            style=inputs.style,
            finished=Rendering.of(finished),
            prompt=Rendering.of(prompt),
            prompt_form=form,
        )
        if not self.control.is_escaped(finished):
            self._check_ids(skeleton.rendering, chat, own=own)
        return skeleton

    def _first_that_fits(self, slotted: ChatInput) -> tuple[TemplateInput, str]:
        """Return the first style in which the template writes all texts, and its rendering with the reply.

        Raises:
            DataError, jinja2.TemplateError, TypeError: there is none.
        """
        first: Exception | None = None
        for style in styles(slotted):
            inputs = TemplateInput(slotted, style, self.control, has_slots=True)
            last: Exception | None = None
            for cot in self._places_for_cot(inputs):
                placed = replace(inputs, style=replace(style, cot=cot))
                try:
                    finished = self._finished(placed)
                    _refuse_dropped_texts(placed, finished)
                    if cot == "content":
                        self._refuse_text_before_cot(placed, finished)
                except DataError as error:
                    last = error
                except _TEMPLATE_ERRORS as error:
                    last = error
                    break  # the template refuses the texts, or a chain of thought next to them
                else:
                    return placed, finished
            first = first or last
        assert first is not None, "there is at least one style"
        raise first

    def _places_for_cot(self, inputs: TemplateInput) -> Iterator[Literal["field", "content", "prompt"]]:
        """Yield the places for the chain of thought, the best first."""
        yield "field"
        if inputs.chat.has_cot:
            if self._thought_tags(inputs):
                yield "prompt"
            yield "content"
            yield "prompt"

    def _refuse_text_before_cot(self, inputs: TemplateInput, finished: str) -> None:
        """Raise DataError if a thought inside the content would not be the first that the model writes."""
        _, _, supplied = self._supplied(inputs, finished)
        text = self.control.spell(finished)
        opening, closing = map(self.control.spell, THINK)
        before = text[supplied : text.index(slot(len(inputs.chat.texts) - 2))]
        if closing in before or before.replace(opening, "").strip():
            raise _refused("the chat template writes the chain of thought after other parts of the reply")

    def _thought_tags(self, inputs: TemplateInput) -> tuple[str, str] | None:
        """Return what a template writes around a thought that it removes from final replies; None if nothing.

        It keeps the thought in front of a tool call, so a call is added to the reply.
        """
        if inputs.chat.has_calls:
            return None
        call = '[{"name": "probe", "arguments": {}, "id": "functions.probe:0"}]'
        calls = (*(inputs.chat.calls[:-1] or ("",) * len(inputs.chat.roles)), call)
        probe = replace(inputs, chat=replace(inputs.chat, calls=calls), style=replace(inputs.style, cot="field"))
        try:
            text = self.control.spell(self._finished(probe))
            prompt = self.control.spell(self._prompt_of(inputs, PromptForm({})))
        except _TEMPLATE_ERRORS:
            return None
        cot_slot, response_slot = slot(len(inputs.chat.texts) - 2), slot(len(inputs.chat.texts) - 1)
        if text.count(cot_slot) != 1 or not text.startswith(prompt):
            return None
        cot_at = text.index(cot_slot)
        end = skip_thought(self.control, text, cot_slot, response_slot, len(prompt))
        return text[len(prompt) : cot_at], text[cot_at + 1 : end]

    def _refuse_dropped_messages(self, inputs: TemplateInput, finished: str) -> None:
        """Raise DataError if a message can be replaced without a change of the rendering."""
        texts = inputs.chat.texts
        for k, role in enumerate(inputs.chat.roles):
            if not texts[2 * k].strip():
                continue
            other = inputs.chat.with_texts([*texts[: 2 * k], slot(2 * k), *texts[2 * k + 1 :]])
            same = False
            with suppress(*_TEMPLATE_ERRORS):  # the template reads the text
                same = self._finished(replace(inputs, chat=other)) == finished
            if same:
                raise _refused(f"the chat template drops the {role} message (number {k})")

    def _supplied(self, inputs: TemplateInput, finished: str) -> tuple[str, PromptForm, int]:
        """Return the generation prompt, its form, and how many characters of a rendering it supplies.

        Some templates write the thoughts of earlier tool calls only until the final reply. What is trained on is the
        finished chat, so the prompt is then rendered without these thoughts.
        """
        forms = [PromptForm({}), PromptForm({"enable_thinking": inputs.chat.has_cot})]
        if any(inputs.chat.texts[1:-2:2]):
            forms += [replace(form, earlier_cots=False) for form in forms]
        tried = [(form, self._prompt_of(inputs, form)) for form in forms]
        if inputs.style.cot == "prompt":
            tried = [(form, prompt) for form, prompt in tried if not prompt.rstrip().endswith(THINK[1])]
            if not tried:
                raise _refused(
                    "the chat template removes the chain of thought from replies, and its generation prompt closes the "
                    "think block: a chain of thought cannot be trained on with this template; set cot: strip, or use "
                    "another template"
                )
        for form, prompt in tried:
            if finished.startswith(prompt):
                return prompt, form, len(self.control.spell(prompt))
        text = self.control.spell(finished)
        for form, prompt in tried:
            common, rest = self._common(text, self.control.spell(prompt))
            if not rest.strip():
                return prompt, form, common
        raise _refused(
            "the chat template writes these messages differently before a reply than as a prompt for one, "
            "so that it is unclear what the model has to write"
        )

    def _common(self, finished: str, prompt: str) -> tuple[int, str]:
        """Return the length of the common beginning, and the rest of the prompt without think tags."""
        tags = re.compile("|".join(map(re.escape, map(self.control.spell, THINK))))
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
        opening, closing = map(self.control.spell, THINK)
        block = re.compile(rf"\s*(?:{opening})?(\s*){closing}(\s*)").match(finished, supplied)
        rest = finished[block.end() :] if block else finished[supplied:]
        line, after = ("\n" if block[1] else "", block[2]) if block else ("\n", "\n\n")
        before, behind = self._thought_tags(inputs) or (opening + line, line + closing + after)
        if prompt.rstrip().endswith(opening):
            before = before.removeprefix(opening).lstrip()
        return f"{prompt}{before}{inputs.chat.texts[-2]}{behind}{rest}", len(prompt)

    def _check_ids(self, rendering: Rendering, chat: ChatInput, *, own: bool) -> None:
        """Raise DataError if renaming the control tokens changes the ids of a sample row, or of the row itself."""
        cores = [text.strip() if own else f"Probe {k}, of no meaning" for k, text in enumerate(chat.texts)]
        text = rendering.fill(cores)
        ours = self.control.encode_batch([text])[0].ids
        stock = self.tokenizer.backend_tokenizer.encode(self.control.unspell(text), add_special_tokens=False)
        if ours != stock.ids and not self.control.is_escaped(text):
            raise _refused(
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
                raise _refused("the chat template writes the text blocks of a message as source code")
        else:
            parts = slots_in(content or "")
        if k < len(chat.roles) and any(part not in finished for part in parts):
            raise _refused(f"the chat template drops the {chat.roles[k]} message (number {k})")
    texts = chat.texts[-1:] if inputs.style.cot == "prompt" else chat.texts[-2:]
    wanted = [found for text in texts for found in slots_in(text)]
    if [found for found in slots_in(finished) if found in wanted] != wanted:
        if chat.has_calls:
            raise _refused("the chat template drops the text next to a tool call, or the chain of thought before it")
        raise _refused("the chat template drops the response, or writes it twice")


# --- errors -------------------------------------------------------------------------------------------------

_TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


def _refused(message: str) -> DataError:
    return DataError(message, reason="template")


def _located(error: DataError, location: str) -> DataError:
    return DataError(str(error), reason=error.reason, location=location)


@contextmanager
def _rendering_errors(chat: ChatInput) -> Iterator[None]:
    """Convert the errors of a template into DataError. Their text is left out if it quotes the row."""
    try:
        yield
    except DataError:
        raise
    except _TEMPLATE_ERRORS as error:
        quotes = any(core in str(error) for text in chat.texts if len(core := text.strip()) > 3)
        what = type(error).__name__ if quotes else error
        if isinstance(error, jinja2.TemplateError):
            raise _refused(f"the chat template refuses the row: {what}") from None
        part = "row's tools" if chat.tools or chat.calls else "row"
        raise _refused(f"the chat template cannot render the {part}: {what}") from None
