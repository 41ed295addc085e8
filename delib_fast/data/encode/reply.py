"""Find the end of a reply in a rendering, and refuse templates that drop tools or calls."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace

from delib_fast.data.encode.chat_input import ChatInput, TemplateInput
from delib_fast.data.encode.skeleton import slot, turn_end
from delib_fast.data.encode.template import TEMPLATE_ERRORS, refused
from delib_fast.data.rows import DataError

Render = Callable[[TemplateInput], str]


def reply_end(inputs: TemplateInput, text: str, start: int, render: Render) -> int:
    """Return the position after the token that ends the reply, where generation stops.

    Args:
        inputs: the chat.
        text: its rendering, with control tokens as private-use characters.
        start: a position after the text of the response.
        render: renders a chat with its reply.
    Raises:
        DataError: the template writes nothing after the reply, so that the model would never learn to stop.
    """
    control = inputs.control
    if not inputs.chat.has_calls:
        end = turn_end(control, text, start)
        if end <= start:
            raise _endless("response")
        return end
    tail = _tail_of_a_text(inputs, render)
    controls = [at + 1 for at in range(start, len(text)) if control.is_control(text[at])]
    end = controls[-1] if controls else len(text.rstrip())
    if tail and text.rstrip().endswith(tail):
        return end
    if not controls or _is_part_of_a_call(inputs, text, text[end - 1], render):
        raise _endless("call")
    return end


def _tail_of_a_text(inputs: TemplateInput, render: Render) -> str:
    """What the template writes after a reply that is only text; "" if nothing, or if it refuses one here."""
    chat = inputs.chat
    last = slot(len(chat.texts) - 1)
    plain = replace(chat, calls=(*chat.calls[:-1], "")).with_texts([*chat.texts[:-1], last])
    try:
        text = inputs.control.spell(render(replace(inputs, chat=plain)))
    except TEMPLATE_ERRORS:
        return ""
    return text.rpartition(last)[2].strip()


def _is_part_of_a_call(inputs: TemplateInput, text: str, token: str, render: Render) -> bool:
    """Whether a control token is written again for each call, so that it does not end the turn."""
    chat = inputs.chat
    calls = json.loads(chat.calls[-1])
    twice = replace(chat, calls=(*chat.calls[:-1], json.dumps([*calls, *calls], ensure_ascii=False)))
    try:
        longer = inputs.control.spell(render(replace(inputs, chat=twice)))
    except TEMPLATE_ERRORS:
        return False  # the template writes one call, and what follows it
    return longer.count(token) > text.count(token)


def _endless(what: str) -> DataError:
    return refused(
        f"the chat template writes nothing after the {what}, so that the model would never learn to stop: let the "
        "template end the turn with the tokenizer's end-of-turn token"
    )


def refuse_dropped_tools(inputs: TemplateInput, finished: str, reply: str, render: Render) -> None:
    """Raise DataError if a template does not write the available tools, a call, or the name of a called function.

    Args:
        inputs: the chat.
        finished: its rendering.
        reply: the part of its rendering that the model has to write.
        render: renders a chat with its reply.
    """
    for what, fewer in _without(inputs.chat):
        try:
            same = render(replace(inputs, chat=fewer)) == finished
        except TEMPLATE_ERRORS:
            continue  # the template reads what was removed
        if same:
            raise refused(
                f"the chat template does not write {what}: use one that does (tokenizer.chat_template), or remove "
                "them from the rows"
            )
    for call in json.loads(inputs.chat.calls[-1]) if inputs.chat.has_calls else ():
        name = inputs.control.escape(call["name"])
        if name not in reply and json.dumps(name, ensure_ascii=False)[1:-1] not in reply:
            raise refused(
                "the chat template does not write the name of the called function, only the id of the call: give each "
                'call an "id" that contains the name, as the model\'s documentation describes'
            )


def _without(chat: ChatInput) -> Iterator[tuple[str, ChatInput]]:
    """Yield copies of a chat in which something is missing that a template has to write."""
    if chat.tools:
        yield "the available tools", replace(chat, tools="")
    if not chat.calls:
        return
    yield "the tool calls", replace(chat, calls=())
    calls = json.loads(chat.calls[-1]) if chat.has_calls else []
    for k in range(len(calls)):
        fewer = json.dumps(calls[:k] + calls[k + 1 :], ensure_ascii=False) if len(calls) > 1 else ""
        if len(calls) > 1 or any(chat.calls[:-1]):
            yield "all of the tool calls", replace(chat, calls=(*chat.calls[:-1], fewer))
