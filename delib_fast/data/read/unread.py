"""What becomes of fields that no format reads: those that carry meaning are refused, the others are counted.

A field carries meaning if another trainer would train on it, mask with it, or show it to the model. An empty value
(false, "", [], {}) says nothing, and is ignored.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from delib_fast.data.read.fields import (
    MASK_FLAGS,
    SYSTEM_KEYS,
    TOOL_KEYS,
    TRAIN_FLAGS,
    WEIGHT_KEYS,
    Fields,
    fail,
    says_nothing,
)
from delib_fast.data.read.strict_json import SAFE_KEY

COT_KEYS = ("cot", "reasoning_content", "reasoning", "thinking")
_COT_LIKE = (
    "analysis", "chain_of_thought", "deepseek_reasoning", "deepseek_thinking_trajectory", "rationale",
    "reasoning_details", "reasoning_text", "reasoning_trace", "scratchpad", "think", "thinking_blocks",
    "thinking_content", "thinking_trajectory", "thought", "thoughts",
)  # fmt: skip

_MEDIA = "is not text, which is all that can be trained on; remove the row, or the field if the text does not need it"
_WEIGHT = "would not change the loss; a row's or a message's weight is read from 'weight'"
_PREFERENCE = "belongs to preference data: only prompts with one reply can be trained on; remove it"
_TOKENS = "belongs to encoded data, and would be ignored: a row is text, which is encoded here; remove it"
_UNFINISHED = "says that the message is not finished, but the end of a turn would be trained on; remove the row"
_CUT_OFF = "says that the reply was cut off, but the end of its turn would be trained on; remove the row"
_LEFT_OUT = ("ignore", "ignored", "is_masked", "no_loss", "no_train", "skip")
_SHOWN = "would be missing in the prompt; write it into the text of the prompt, and remove the field"

_SPELLED = frozenset(
    (*COT_KEYS, *WEIGHT_KEYS, *TRAIN_FLAGS, *MASK_FLAGS, *SYSTEM_KEYS, *TOOL_KEYS, "history", "tool_calls",
     "function_call", "tool_call_id")
)  # fmt: skip
"""Fields whose names must be spelled so: `CoT` or `Weight` would be lost otherwise."""

_ANYWHERE = {
    **dict.fromkeys(("image", "images", "image_url", "video", "videos", "audio", "audios", "input_audio"), _MEDIA),
    **dict.fromkeys(("loss_scale", "loss_weights", "sample_weight", "token_weights", "weights"), _WEIGHT),
    **dict.fromkeys(("documents",), _SHOWN),
}
_ROW = {
    **dict.fromkeys(("chosen", "chosen_response", "rejected", "rejected_response", "rejected_messages"), _PREFERENCE),
    **dict.fromkeys(("input_ids", "loss_mask", "completion_mask", "assistant_mask", "assistant_masks"), _TOKENS),
    "chat_template_kwargs": "holds arguments of the chat template, which are not passed to it; remove it",
    "history": "holds earlier turns, which this kind of row does not have; write them as messages",
    **dict.fromkeys(_LEFT_OUT, "may say that the row is not to be trained on; remove the row, or the field"),
}
_INSTRUCTIONS = dict.fromkeys(
    ("developer", "developer_message", "developer_prompt", "instructions", "system_instruction", "system_instructions"),
    "would be missing in the prompt; rename it to 'system', or remove it",
)
_CHAT = dict.fromkeys(("context", "contexts", "passage", "passages"), _SHOWN)
_PAIR = {
    **dict.fromkeys(("choices", "options", "context", "contexts", "passage", "passages"), _SHOWN),
    "input": "is read only after an 'instruction'; write it into the prompt, and remove the field",
    "suffix": "is what follows the reply, and would be missing; remove the row",
}
_DOCUMENT = {
    key: "belongs to a chat, but the row has 'text' and is read as a document; keep one of the two"
    for key in (
        "answer", "completion", "output", "response", *COT_KEYS, *SYSTEM_KEYS, *TOOL_KEYS, "role", "from",
    )
}  # fmt: skip
_MESSAGE = {
    **dict.fromkeys(("train_detail", "training_detail"), "selects parts of a message, which is not supported"),
    **dict.fromkeys(("partial", "prefill", "prefix"), _UNFINISHED),
    "channel": "separates a chain of thought from a reply; join the messages into one with 'reasoning_content'",
    "ipython": "marks a call of a code interpreter, which is not supported; write it as 'tool_calls'",
    "recipient": "names the tool that is called; write the call as 'tool_calls'",
    "refusal": "is what the assistant said; write it as the content",
    **dict.fromkeys(("function_calls", "tool_call"), "holds calls of tools; write them as 'tool_calls'"),
    **dict.fromkeys(TOOL_KEYS, "holds tools; write them as 'tools' of the row"),
    **dict.fromkeys(("tool_results", "tool_responses"), "holds results of tools; write them as messages of role tool"),
    **dict.fromkeys(_LEFT_OUT, "may say that the message is not to be trained on; write it as 'train': false"),
    **dict.fromkeys(("attachments", "file", "files"), _MEDIA),
    **dict.fromkeys(("rejected", "rejected_content"), _PREFERENCE),
    "context": _SHOWN,
}
_BY_FORMAT = {
    "pair": _ROW | _INSTRUCTIONS | _PAIR,
    "chat": _ROW | _INSTRUCTIONS | _CHAT,
    "document": _ROW | _DOCUMENT,
    "message": _MESSAGE,
    "block": {},
}
_SWITCHES = ("on", "off", "true", "false", "yes", "no")


def settle(fields: Fields, kind: str, ignored: Counter[str], *, prefix: str = "", has_cot: bool = True) -> None:
    """Refuse or count the fields that were not read.

    Args:
        kind: what the fields describe: a pair, chat, document, message or block.
        ignored: counts how often each field is ignored.
        prefix: what precedes the name of an ignored field, e.g. "messages[].".
        has_cot: whether the reply already has a chain of thought. A field that looks like one is refused if not.
    """
    refused = _ANYWHERE | _BY_FORMAT[kind]
    for key, value in fields.unread().items():
        why = _why_refused(key, value, refused, kind, has_cot=has_cot)
        if why:
            fail("unread_field", f"{fields.name(key)} {why}")
        ignored[prefix + key if SAFE_KEY.fullmatch(key) else f"{prefix}(a key that is not a name)"] += 1


def _why_refused(key: str, value: Any, refused: Mapping[str, str], kind: str, *, has_cot: bool) -> str | None:
    spelled = re.sub(r"[- ]", "_", key).lower()
    if spelled != key:
        if spelled in _SPELLED and not (has_cot and spelled in COT_KEYS) and value not in ("", [], {}):
            return f"is read only if it is spelled {spelled!r}; rename or remove it"
        key = spelled
    if key in ("label", "kto_tag"):
        return (
            "marks a reply that is not wanted; remove the row" if value is False and kind in ("pair", "chat") else None
        )
    if key in ("finish_reason", "stop_reason"):
        return _CUT_OFF if value in ("length", "max_tokens", "model_length") else None
    if key in ("eot", "end_turn"):
        return _UNFINISHED if value is False and kind == "message" else None
    if key == "labels":
        return _TOKENS if isinstance(value, list) and value and isinstance(value[0], int) else None
    if says_nothing(value) or (key == "channel" and value == "final") or (key == "recipient" and value == "all"):
        return None
    if key in _COT_LIKE and not has_cot:
        return (
            f"looks like a chain of thought, which is read from {', '.join(map(repr, COT_KEYS))}; rename or remove it"
        )
    return refused.get(key)


def is_switch(value: Any) -> bool:
    """Whether a value turns reasoning on or off instead of being a chain of thought, e.g. "on"."""
    return isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in _SWITCHES)
