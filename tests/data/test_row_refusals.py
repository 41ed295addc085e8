"""Rows with a field that carries meaning and that no format reads, or whose meaning is ambiguous, are refused."""

import pytest
from source_files import CHAT, USER, line, read, write
from test_row_formats import BYE, CALL, HI, TOOLS, assistant, chat, pair

from delib_fast.data import DataError

REFUSED = {
    "two thoughts": (
        chat(HI, assistant("<think>a</think>r", reasoning_content="b")),
        "ambiguous",
        "messages[1] has its chain of thought twice: as 'reasoning_content' and in the content",
    ),
    "two thoughts of a pair": (
        {"prompt": "p", "cot": "b", "response": "<think>a</think>r"},
        "ambiguous",
        "has its chain of thought twice: as 'cot' and in the content",
    ),
    "a thought with its tags": (
        {"prompt": "p", "cot": "<think>\nc\n</think>", "response": "r"},
        "cot_tags",
        "has <think> in 'cot', which holds the chain of thought without tags; remove the tags",
    ),
    "a thought with a closing tag": (
        chat(HI, assistant("r", reasoning_content="c\n[/THINK]\n")),
        "cot_tags",
        "messages[1] has [/THINK] in 'reasoning_content', which holds the chain of thought without tags",
    ),
    "a reasoning block with its tags": (
        chat(HI, assistant([{"type": "thinking", "thinking": "<think>c"}, {"type": "text", "text": "r"}])),
        "cot_tags",
        "messages[1] has <think> in a reasoning block, which holds",
    ),
    "a switch as a thought": (
        pair(reasoning="on"),
        "ambiguous",
        "has no chain of thought in 'reasoning', but a switch",
    ),
    "a thought after a text": (
        chat(HI, assistant([{"type": "text", "text": "r"}, {"type": "thinking", "thinking": "c"}])),
        "bad_block",
        "messages[1].content[1] is a reasoning block after a text",
    ),
    "a closing tag in a sentence": (
        {"prompt": "p", "response": "Close it with </think> and go on."},
        "cot_tags",
        "</think> without <think> is followed by text on its line",
    ),
    "an unknown think tag": (
        {"prompt": "p", "response": "<Think>\nc\n</Think>\nr"},
        "cot_tags",
        "the reply begins with a tag that is similar to <think> but not known",
    ),
    "harmony text": (
        {"prompt": "p", "response": "<|channel|>analysis<|message|>c<|end|>"},
        "cot_tags",
        "the reply begins with the markup of a chat template",
    ),
    "thoughts in two fields that differ": (
        chat(HI, assistant("r", reasoning="c", reasoning_content="d")),
        "ambiguous",
        "messages[1] has both 'reasoning_content' and 'reasoning'",
    ),
    "a reply that was cut off": (
        chat(HI, BYE | {"finish_reason": "length"}),
        "unread_field",
        "messages[1].finish_reason says that the reply was cut off",
    ),
    "tools of a message": (
        chat({"role": "system", "content": "s", "tools": "[{}]"}, HI, BYE),
        "unread_field",
        "messages[0].tools holds tools; write them as 'tools' of the row",
    ),
    "a harmony message": (
        chat(HI, BYE | {"channel": "analysis"}, BYE | {"channel": "final"}),
        "unread_field",
        "messages[1].channel separates a chain of thought from a reply",
    ),
    "a rationale": (
        {"question": "q", "answer": "r", "rationale": "c"},
        "unread_field",
        "'rationale' looks like a chain of thought, which is read from 'cot', 'reasoning_content'",
    ),
    "thoughts of a message": (
        chat(HI, BYE | {"thoughts": "c"}),
        "unread_field",
        "messages[1].thoughts looks like a chain of thought",
    ),
    "a thought outside of the messages": (
        chat(HI, BYE, reasoning="c"),
        "unread_field",
        "'reasoning' is outside of the messages and would be ignored",
    ),
    "a thought outside of the completion": (
        {"prompt": [HI], "completion": [BYE], "cot": "c"},
        "unread_field",
        "'cot' is outside of the messages and would be ignored",
    ),
    "a user's thought": (
        chat(HI | {"reasoning_content": "c"}, BYE),
        "bad_block",
        "messages[0] is a user message with 'reasoning_content', but only assistant messages",
    ),
    "two systems": (
        chat({"role": "system", "content": "a"}, HI, BYE, system="b"),
        "ambiguous",
        "has two system prompts: 'system' and a system message, which differ; keep one",
    ),
    "two systems of a TRL row": (
        {"prompt": [{"role": "system", "content": "a"}, HI], "completion": [BYE], "system": "b"},
        "ambiguous",
        "has two system prompts",
    ),
    "two system fields": (pair(system="a", system_prompt="b"), "ambiguous", "has both 'system' and 'system_prompt'"),
    "preference data": (
        chat(HI, BYE, rejected_response="no"),
        "unread_field",
        "'rejected_response' belongs to preference",
    ),
    "kto": (
        {"prompt": "p", "completion": "r", "label": False},
        "unread_field",
        "'label' marks a reply that is not wanted",
    ),
    "a picture next to a chat": (chat(HI, BYE, images=["a.jpg"]), "unread_field", "'images' is not text"),
    "choices of a question": (
        {"question": "q", "choices": ["a", "b"], "answer": "a"},
        "unread_field",
        "'choices' would be missing in the prompt; write it into the text of the prompt",
    ),
    "a context of a question": (
        {"question": "q", "context": "c", "answer": "a"},
        "unread_field",
        "'context' would be missing in the prompt",
    ),
    "an input of a prompt": (pair(input="x"), "unread_field", "'input' is read only after an 'instruction'"),
    "input and context": (
        {"instruction": "i", "input": "a", "context": "b", "output": "r"},
        "ambiguous",
        "has both 'input' and 'context'",
    ),
    "documents": (
        chat(HI, BYE, documents=[{"text": "d"}]),
        "unread_field",
        "'documents' would be missing in the prompt",
    ),
    "template arguments": (
        chat(HI, BYE, chat_template_kwargs={"enable_thinking": False}),
        "unread_field",
        "'chat_template_kwargs' holds arguments of the chat template",
    ),
    "history of a chat": (chat(HI, BYE, history=[["a", "b"]]), "unread_field", "'history' holds earlier turns"),
    "history of one text": (pair(history=["a", "b"]), "wrong_type", "history[0] is not a pair (prompt, reply)"),
    "a document with a reply": (
        {"text": "q", "response": "r"},
        "unread_field",
        "'response' belongs to a chat, but the row has 'text'",
    ),
    "a message of a tree": ({"text": "q", "role": "prompter"}, "unread_field", "'role' belongs to a chat"),
    "encoded data": ({"text": "a", "input_ids": [1]}, "unread_field", "'input_ids' belongs to encoded data"),
    "labels of tokens": (pair(labels=[-100, 1]), "unread_field", "'labels' belongs to encoded data"),
    "train is a word": (
        chat(HI, BYE | {"train": "yes"}),
        "bad_weight",
        "messages[1].train is a string, but true or false",
    ),
    "loss of a row": (pair(loss=1.5), "bad_weight", "'loss' is a number, but true or false is expected; rename it"),
    "every reply is muted": (chat(HI, BYE | {"masked": True}), "nothing_supervised", "every reply has weight 0"),
    "the row is muted": (pair(train=False), "nothing_supervised", "every reply has weight 0"),
    "flags that contradict each other": (
        chat(HI, BYE | {"train": True, "mask": True}),
        "ambiguous",
        "messages[1] has 'train' and 'mask', which contradict each other",
    ),
    "a user message to train on": (
        chat(HI | {"train": True}, BYE),
        "bad_weight",
        "messages[0].train asks to train on a user message",
    ),
    "a user message with a weight": (
        chat(HI | {"weight": 1}, BYE),
        "bad_weight",
        "messages[0].weight asks to train on",
    ),
    "a part of a message": (
        chat(HI, BYE | {"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]}),
        "unread_field",
        "messages[1].train_detail selects parts of a message",
    ),
    "a row to leave out": (pair(skip=True), "unread_field", "'skip' may say that the row is not to be trained on"),
    "a message to leave out": (
        chat(HI, BYE | {"is_masked": True}),
        "unread_field",
        "messages[1].is_masked may say that the message is not to be trained on; write it as 'train': false",
    ),
    "a loss scale": (
        chat(HI, BYE | {"loss_scale": 0.0}),
        "unread_field",
        "messages[1].loss_scale would not change the loss",
    ),
    "a huge weight": (pair(weight=10**400), "bad_weight", "'weight' is too large"),
    "an unfinished message": (
        chat(HI, BYE | {"prefix": True}),
        "unread_field",
        "messages[1].prefix says that the message",
    ),
    "a message without an end": (
        chat(HI, BYE | {"eot": False}),
        "unread_field",
        "messages[1].eot says that the message",
    ),
    "a refusal": (
        chat(HI, assistant("", refusal="I cannot.")),
        "unread_field",
        "messages[1].refusal is what the assistant said",
    ),
    "two roles": (chat(HI | {"from": "gpt"}, BYE), "ambiguous", "messages[0] has both 'role' and 'from'"),
    "two contents": (chat(HI | {"value": "a"}, BYE), "ambiguous", "messages[0] has both 'content' and 'value'"),
    "two texts of a block": (
        chat({"role": "user", "content": [{"type": "text", "text": "a", "value": "b"}]}, BYE),
        "ambiguous",
        "messages[0].content[0] has both 'text' and 'value'",
    ),
    "calls of OLMo": (
        chat(HI, BYE | {"function_calls": "f(x=1)"}),
        "unread_field",
        "messages[1].function_calls holds calls",
    ),
    "two forms of a call": (
        chat(HI, assistant("", tool_calls=[CALL], function_call=CALL)),
        "ambiguous",
        "messages[1] has both 'tool_calls' and 'function_call'",
    ),
    "arguments of another name": (
        chat(HI, assistant("", tool_calls=[{"name": "f", "parameters": {"x": 1}}])),
        "tools",
        "messages[1].tool_calls[0].parameters would be ignored: the arguments of a call are read from 'arguments'",
    ),
    "arguments outside of the function": (
        chat(HI, assistant("", tool_calls=[{"function": {"name": "f"}, "arguments": {"x": 1}}])),
        "tools",
        "messages[1].tool_calls[0].arguments would be ignored",
    ),
    "tools and functions": (
        pair(tools=TOOLS, functions=[{"name": "f"}]),
        "ambiguous",
        "has both 'tools' and 'functions'",
    ),
    "a chat and another reply": (
        chat(HI, BYE, response="other"),
        "unread_field",
        "'response' is outside of the messages and would be ignored",
    ),
    "a call and another reply": (
        chat(HI, assistant("", tool_calls=[{"name": "f"}]), completion="other"),
        "unread_field",
        "'completion' is outside of the messages and would be ignored",
    ),
    "a context of a chat": (chat(HI, BYE, context="c"), "unread_field", "'context' would be missing in the prompt"),
    "a call of another name": (
        chat(HI, BYE | {"tool_call": {"name": "f"}}),
        "unread_field",
        "messages[1].tool_call holds calls of tools",
    ),
    "instructions": (
        pair(instructions="Be brief."),
        "unread_field",
        "'instructions' would be missing in the prompt; rename it to 'system', or remove it",
    ),
    "a thought of another spelling": (pair(CoT="c"), "unread_field", "'CoT' is read only if it is spelled 'cot'"),
    "a weight of another spelling": (pair(Weight=0), "unread_field", "'Weight' is read only if it is spelled 'weight'"),
    "a flag of another spelling": (
        chat(HI, BYE | {"Train": False}),
        "unread_field",
        "messages[1].Train is read only if it is spelled 'train'",
    ),
    "preference data of another spelling": (
        pair(Rejected="no"),
        "unread_field",
        "'Rejected' belongs to preference data",
    ),
    "a chain of thought with hyphens": (
        pair(**{"chain-of-thought": "c"}),
        "unread_field",
        "'chain-of-thought' looks like a chain of thought",
    ),
    "text of Cohere": (
        {"prompt": "p", "response": "<|START_THINKING|>c<|END_THINKING|>r"},
        "cot_tags",
        "the reply begins with the markup of a chat template",
    ),
    "a monologue": (
        {"prompt": "p", "response": "<inner_monologue>c</inner_monologue>r"},
        "cot_tags",
        "the reply begins with a tag that is similar to <think> but not known",
    ),
    "a reasoning block and tags": (
        chat(HI, assistant([{"type": "thinking", "thinking": "c"}, {"type": "text", "text": "<think>d</think>r"}])),
        "ambiguous",
        "messages[1] has its chain of thought twice: in a reasoning block and in the content",
    ),
    "a chat and another prompt": (chat(USER, CHAT, prompt="other"), "ambiguous", "has both 'messages' and 'prompt'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_field_that_would_be_lost_is_refused(tmp_path, name):
    item, reason, why = REFUSED[name]
    with pytest.raises(DataError) as caught:
        read(write(tmp_path, "\n" + line(item)))
    assert caught.value.reason == reason
    assert f"rows.jsonl:2: {why}" in str(caught.value)
