"""A tokenizer's chat template, rendered as stock transformers does."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from functools import partial
from typing import Any

import jinja2

from delib_fast.data.encode.chat_input import ChatInput, TemplateInput
from delib_fast.data.encode.control_tokens import ControlTokens
from delib_fast.data.encode.skeleton import PromptForm
from delib_fast.data.encode.template_limits import render_within_limits
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


_TIME_OF_DAY = re.compile(r"strftime_now\(\s*[\"'][^\"']*%[-#]?[HIMSTXcfprsR]")
Request = tuple[list[dict[str, Any]], dict[str, Any]]
"""The messages and the keyword arguments of one rendering."""


def finished_request(inputs: TemplateInput) -> Request:
    """A chat with its reply."""
    return [*inputs.messages(), inputs.reply()], inputs.kwargs()


def prompt_request(inputs: TemplateInput, form: PromptForm) -> Request:
    """The messages before the reply, as a generation prompt."""
    kwargs = {"add_generation_prompt": True, **form.kwargs, **inputs.kwargs()}
    return inputs.messages(earlier_cots=form.earlier_cots), kwargs


@dataclass(frozen=True)
class ChatTemplate:
    """Renders the chat template of a tokenizer."""

    tokenizer: Any
    control: ControlTokens
    add_bos: bool = False
    """Whether the plain template begins with BOS; a model's own template decides for itself."""

    @property
    def day(self) -> date | None:
        """Today, if the template may write it.

        Raises:
            DataError: the template writes the time of day.
        """
        template = self.tokenizer.chat_template or ""
        if _TIME_OF_DAY.search(template):
            raise refused(
                "the chat template writes the time of day (strftime_now), so that a row would have other ids from one "
                "moment to the next; let it write a fixed date"
            )
        return date.today() if "strftime_now" in template else None

    def finished(self, inputs: TemplateInput) -> str:
        """Render a chat with its reply. Raises what the template raises (TEMPLATE_ERRORS)."""
        messages, kwargs = finished_request(inputs)
        return self._apply([messages], kwargs)[0]

    def prompt(self, inputs: TemplateInput, form: PromptForm) -> str:
        """Render the messages before the reply as a generation prompt. Raises what the template raises."""
        messages, kwargs = prompt_request(inputs, form)
        return self._apply([messages], kwargs)[0]

    def render_all(self, requests: Sequence[Request]) -> list[str | None]:
        """Render many chats, those with equal arguments in one call. None where the template raises an error."""
        groups: dict[str, list[int]] = {}
        for k, (_, kwargs) in enumerate(requests):
            groups.setdefault(json.dumps(kwargs), []).append(k)
        rendered: list[str | None] = [None] * len(requests)
        for members in groups.values():
            kwargs = requests[members[0]][1]
            texts: Sequence[str | None]
            try:
                texts = self._apply([requests[k][0] for k in members], kwargs)
            except DataError:  # the template does not finish
                raise
            except TEMPLATE_ERRORS:
                if len(members) == 1:
                    continue
                texts = [self.render_all([requests[k]])[0] for k in members]
            for k, text in zip(members, texts, strict=True):
                rendered[k] = text
        return rendered

    def _apply(self, chats: list[list[dict[str, Any]]], kwargs: dict[str, Any]) -> list[str]:
        template = self.tokenizer.chat_template
        if template is None:
            kwargs = kwargs | {"chat_template": PLAIN_TEMPLATE, "add_bos": self.add_bos}
        apply = partial(self.tokenizer.apply_chat_template, chats, tokenize=False, **kwargs)
        return list(render_within_limits(template, len(chats), apply))


TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
"""What a template may raise while it renders a row."""


def refused(message: str) -> DataError:
    """The error of a row that cannot be rendered."""
    return DataError(message, reason="template")


@contextmanager
def located(location: str) -> Iterator[None]:
    """Add the location of the row to a DataError."""
    try:
        yield
    except DataError as error:
        raise DataError(str(error), reason=error.reason, location=location) from None


@contextmanager
def rendering_errors(chat: ChatInput) -> Iterator[None]:
    """Convert the errors of a template into DataError. Their text is omitted if it quotes the row."""
    try:
        yield
    except DataError:
        raise
    except TEMPLATE_ERRORS as error:
        quotes = any(core in str(error) for text in chat.texts if len(core := text.strip()) > 3)
        what = type(error).__name__ if quotes else error
        if isinstance(error, jinja2.TemplateError):
            raise refused(f"the chat template refuses the row: {what}") from None
        part = "row's tools" if chat.tools or chat.calls else "row"
        raise refused(f"the chat template cannot render the {part}: {what}") from None
