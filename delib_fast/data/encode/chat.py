"""Render chats, and track which text comes from the chat template, from the row, and from the model.

A template is rendered once for each *shape* of row (the roles, which texts are empty, the white space around them),
with one private-use character as a placeholder for each text. The content of a row can therefore not influence the
template, and a million rows of one shape need one rendering.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jinja2

from delib_fast.data.encode.control_tokens import ControlTokens
from delib_fast.data.read.tools import NO_TOOLS, Tools
from delib_fast.data.rows import DataError

THINK = ("<think>", "</think>")
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

_SLOT = 0xF0000  # first private-use character that is a placeholder for a text of a row
_SLOTS = re.compile(f"[{chr(_SLOT)}-{chr(_SLOT + 0xFFFD)}]")
_MAX_SHAPES = 10_000
_PROBE_SLOT = chr(_SLOT + 0xFFFD)

Shape = tuple[str, bool, str]
ReplyFormat = Callable[[str, str], dict[str, Any]]
"""(CoT, response) → the assistant message that a chat template receives."""


def shape_of(text: str) -> Shape:
    """Return (leading white space, whether there is more, trailing white space).

    This is all that a template may depend on in a text.
    """
    core = text.strip()
    if not core:
        return text, False, ""
    start = len(text) - len(text.lstrip())
    return text[:start], True, text[start + len(core) :]


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A rendered template with slots for the texts: `pieces[0] text[slots[0]] pieces[1] …`.

    Control tokens are written as private-use characters (control_tokens.py).
    """

    pieces: tuple[str, ...]
    slots: tuple[int, ...]
    boundaries: tuple[tuple[int, int], ...]
    """The beginning of the chain of thought, the beginning of the response, and the end of the response (after the end
    of its turn). Each is (number of slots before it, number of the template's characters before it)."""

    def fill(self, cores: Sequence[str]) -> tuple[str, tuple[int, ...]]:
        """Return (the whole text, the three boundaries as positions in it). `cores` are the stripped texts."""
        parts = [self.pieces[0]]
        lengths = [0]
        for slot, piece in zip(self.slots, self.pieces[1:], strict=True):
            parts += (cores[slot], piece)
            lengths.append(lengths[-1] + len(cores[slot]))
        return "".join(parts), tuple(lengths[slots] + chars for slots, chars in self.boundaries)

    def fill_before(self, slot: int, cores: Sequence[str]) -> str:
        """Return the text before a slot that occurs exactly once."""
        end = self.slots.index(slot)
        return "".join(
            [
                *(part for k in range(end) for part in (self.pieces[k], cores[self.slots[k]])),
                self.pieces[end],
            ]
        )


@dataclass
class ChatRenderer:
    """Renders the skeletons of one tokenizer's chat template, and keeps them by shape."""

    tokenizer: Any
    control: ControlTokens
    add_bos: bool = False
    """Whether the plain template begins with BOS; a model's own template decides for itself."""
    _skeletons: dict[Any, Skeleton] = field(default_factory=dict)

    def skeleton(
        self, roles: tuple[str, ...], texts: Sequence[str], has_cot: bool, location: str, tools: Tools = NO_TOOLS
    ) -> Skeleton:
        """Return the skeleton of a row, from the cache if a row of its shape was rendered before.

        Args:
            roles: the roles of the messages before the reply.
            texts: the content and the CoT of each message, then the CoT and the response of the reply.
            has_cot: whether the reply has a CoT.
            location: the location of the row, for errors.
            tools: the tools of the chat.
        Raises:
            DataError: the template refuses the row, drops a text or the tools, or writes nothing after the response.
        """
        key = (roles, has_cot, tuple(map(shape_of, texts)), tools)
        found = self._skeletons.get(key)
        if found is None:
            if len(self._skeletons) >= _MAX_SHAPES:
                self._skeletons.clear()
            try:
                found = self._skeletons[key] = self._build(roles, key[2], has_cot, tools.map(self.control.escape))
            except jinja2.TemplateError as error:
                raise DataError(
                    f"the chat template refuses the row: {error}", reason="template", location=location
                ) from None
            except TypeError as error:  # the template expects tools of another structure
                raise DataError(
                    f"the chat template cannot render the row's tools: {error}", reason="template", location=location
                ) from None
            except DataError as error:
                raise DataError(str(error), reason=error.reason, location=location) from None
        return found

    def _build(self, roles: tuple[str, ...], shapes: Sequence[Shape], has_cot: bool, tools: Tools) -> Skeleton:
        marked = [f"{lead}{chr(_SLOT + k) if core else ''}{trail}" for k, (lead, core, trail) in enumerate(shapes)]
        text, prompt_chars, reply_format = self._render_reply(roles, marked, has_cot, tools)
        for k in range(0, len(shapes) - 2, 2):
            if shapes[k][1] and chr(_SLOT + k) not in text:
                raise DataError(
                    f"the chat template drops the {roles[k // 2]} message (number {k // 2})", reason="template"
                )
        if tools:
            self._refuse_dropped_tools(text, roles, marked, tools, reply_format)
        skeleton = _cut(self.control, text, prompt_chars, len(shapes), has_cot, tools.replies_with_calls)
        self._check(skeleton, text, roles, shapes, reply_format, tools)
        return skeleton

    # --- rendering ------------------------------------------------------------------------------------------

    def render(self, messages: list[dict[str, Any]], **kwargs: Any) -> str:
        """Apply the chat template."""
        if self.tokenizer.chat_template is None:
            kwargs |= {"chat_template": PLAIN_TEMPLATE, "add_bos": self.add_bos}
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **kwargs))

    def _render_reply(
        self, roles: tuple[str, ...], texts: Sequence[str], has_cot: bool, tools: Tools
    ) -> tuple[str, int, ReplyFormat | None]:
        """Return (rendering, number of its characters that the generation prompt supplies, format of the reply).

        The chain of thought is passed to the template in the first format that the template keeps: in the field
        `reasoning_content`, or between think tags inside the content. A template that removes it from every finished
        turn supports neither. It is then appended to the generation prompt, where the model will write it, and the
        third value is None.
        """
        before = _messages(roles, texts, tools)
        wanted = [text for text in texts[-2:] if _SLOTS.search(text)]
        for reply_format in (_with_reasoning_field, _with_cot_in_content) if has_cot else (_with_reasoning_field,):
            reply = tools.add_to(reply_format(texts[-2] if has_cot else "", texts[-1]), -1)
            text = self.render([*before, reply], **tools.template_kwargs())
            if _once_in_order(text, wanted):
                return text, self._supplied(before, text, has_cot, tools), reply_format
        if tools.replies_with_calls:
            raise DataError(
                "the chat template drops the text next to a tool call, or the chain of thought before it",
                reason="template",
            )
        if not has_cot:
            raise DataError("the chat template drops the response, or writes it twice", reason="template")
        text, prompt_chars = self._after_generation_prompt(before, texts[-2], texts[-1], tools)
        return text, prompt_chars, None

    def _supplied(self, before: list[dict[str, Any]], text: str, has_cot: bool, tools: Tools) -> int:
        """Count the leading characters of a rendering that the generation prompt supplies at inference."""
        prompts = [
            self.render(before, add_generation_prompt=True, **kwargs, **tools.template_kwargs())
            for kwargs in ({}, {"enable_thinking": has_cot})
        ]
        for prompt in prompts:
            if text.startswith(prompt):
                return len(prompt)
        differ = (k for k, (a, b) in enumerate(zip(text, prompts[0], strict=False)) if a != b)
        common = next(differ, min(len(text), len(prompts[0])))
        if prompts[0][common:].replace(THINK[0], "").replace(THINK[1], "").strip():
            raise DataError(
                "the chat template writes these messages differently before a reply than as a prompt for one, "
                "so that it is unclear what the model has to write",
                reason="template",
            )
        return common

    def _after_generation_prompt(
        self, before: list[dict[str, Any]], cot: str, response: str, tools: Tools
    ) -> tuple[str, int]:
        opening, closing = THINK
        for kwargs in ({}, {"enable_thinking": True}):
            prompt = self.render(before, add_generation_prompt=True, **kwargs, **tools.template_kwargs())
            if not prompt.rstrip().endswith(closing):
                break
        else:
            raise DataError(
                "the chat template removes the chain of thought from replies, and its generation prompt closes the "
                "think block: a chain of thought cannot be trained on with this template; set cot: strip, or use "
                "another template",
                reason="template",
            )
        finished = self.render([*before, _with_reasoning_field("", _PROBE_SLOT)], **tools.template_kwargs())
        turn_end = finished[finished.rindex(_PROBE_SLOT) + 1 :]
        tag = "" if prompt.rstrip().endswith(opening) else f"{opening}\n"
        return f"{prompt}{tag}{cot}\n{closing}\n\n{response}{turn_end}", len(prompt)

    def _check(
        self,
        skeleton: Skeleton,
        text: str,
        roles: tuple[str, ...],
        shapes: Sequence[Shape],
        reply_format: ReplyFormat | None,
        tools: Tools,
    ) -> None:
        """Raise DataError if the ids of a sample row of this shape differ from those of `apply_chat_template`."""
        if self.control.is_escaped(text):
            return  # the tools spell out control tokens, which the tokenizer itself would not treat as text
        cores = [f"Probe {k}, of no meaning" if core else "" for k, (_, core, _) in enumerate(shapes)]
        ours = self.control.encode_batch([skeleton.fill(cores)[0]])[0].ids
        if reply_format is None:
            whole = _SLOTS.sub(lambda match: cores[ord(match[0]) - _SLOT], text)
        else:
            texts = [lead + core + trail for (lead, _, trail), core in zip(shapes, cores, strict=True)]
            reply = tools.add_to(reply_format(texts[-2], texts[-1]), -1)
            whole = self.render([*_messages(roles, texts, tools), reply], **tools.template_kwargs())
        theirs = self.tokenizer.backend_tokenizer.encode(whole, add_special_tokens=False).ids
        if ours != theirs:
            raise DataError(
                "the chat template changes the texts of a row (other than stripping white space), so that loss masks "
                "cannot be exact; use another template",
                reason="template",
            )

    def _refuse_dropped_tools(
        self, text: str, roles: tuple[str, ...], marked: Sequence[str], tools: Tools, reply_format: ReplyFormat | None
    ) -> None:
        """Raise DataError if the template writes the same text without the available tools, or without the calls."""
        if reply_format is None:
            return
        without = [("available tools", replace(tools, offered=""))] if tools.offered else []
        without += [("tool calls", replace(tools, calls=()))] if tools.calls else []
        for what, fewer in without:
            reply = fewer.add_to(reply_format(marked[-2], marked[-1]), -1)
            if self.render([*_messages(roles, marked, fewer), reply], **fewer.template_kwargs()) == text:
                raise DataError(
                    f"the chat template does not write the {what}: use one that does (tokenizer.chat_template), or "
                    "remove them from the rows",
                    reason="template",
                )


def _with_reasoning_field(cot: str, response: str) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": response}
    return message | {"reasoning_content": cot} if cot else message


def _with_cot_in_content(cot: str, response: str) -> dict[str, Any]:
    return {"role": "assistant", "content": f"{THINK[0]}\n{cot}\n{THINK[1]}\n\n{response}"}


def _messages(roles: Sequence[str], texts: Sequence[str], tools: Tools) -> list[dict[str, Any]]:
    messages = []
    for k, role in enumerate(roles):
        message: dict[str, Any] = {"role": role, "content": texts[2 * k]}
        if texts[2 * k + 1]:
            message["reasoning_content"] = texts[2 * k + 1]
        messages.append(tools.add_to(message, k))
    return messages


def _once_in_order(text: str, wanted: Sequence[str]) -> bool:
    slots = [slot for piece in wanted for slot in _SLOTS.findall(piece)]
    return [slot for slot in _SLOTS.findall(text) if slot in slots] == slots


# --- cutting ------------------------------------------------------------------------------------------------


def _cut(
    control: ControlTokens, raw: str, prompt_chars: int, num_texts: int, has_cot: bool, has_calls: bool
) -> Skeleton:
    """Split a rendering at its placeholders, and find its boundaries."""
    text = control.spell(raw)
    supplied = len(control.spell(raw[:prompt_chars]))
    closing = control.spell(THINK[1])
    cot_slot, response_slot = chr(_SLOT + num_texts - 2), chr(_SLOT + num_texts - 1)
    response_at = text.find(response_slot)
    cot_start = text.index(cot_slot) if has_cot else supplied
    if has_cot and response_at >= 0:
        response_start = response_at
    else:  # search after the think block: a template may write an empty one for a reply without a CoT
        closed = text.find(closing, cot_start, response_at if response_at >= 0 else len(text))
        after = cot_start + has_cot if closed < 0 else closed + len(closing)
        response_start = after if closed < 0 else after + len(text[after:]) - len(text[after:].lstrip())
    end = _reply_end(control, text, response_at + 1 if response_at >= 0 else response_start, has_calls)
    positions = (supplied if has_cot else response_start, response_start, end)
    slots = [(match.start(), ord(match[0]) - _SLOT) for match in _SLOTS.finditer(text)]
    boundaries = tuple((n := sum(at < position for at, _ in slots), position - n) for position in positions)
    return Skeleton(tuple(_SLOTS.split(text)), tuple(slot for _, slot in slots), boundaries)


def _reply_end(control: ControlTokens, text: str, after: int, has_calls: bool) -> int:
    """The position after the control token that ends the reply, where generation stops.

    It is the first one after the response; after calls, which contain control tokens themselves, it is the last one.
    """
    positions = range(after, len(text))
    for at in reversed(positions) if has_calls else positions:
        if control.is_control(text[at]):
            return at + 1
    end = len(text.rstrip())
    if end <= after:
        raise DataError(
            "the chat template writes nothing after the response, so that the model would never learn to stop: let the "
            "template end the turn with the tokenizer's end-of-turn token",
            reason="template",
        )
    return end
