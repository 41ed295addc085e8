"""Tools in chats: calls are supervised, results are not, and no text in a tool can become a control token."""

import json

import pytest
from helpers.chat_oracle import spell
from helpers.chat_tokenizers import fast_tokenizer, tokenizer

from delib_fast.config import SourceConfig
from delib_fast.data import DataError, Segment, encode_row, encode_rows, read_source

TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Finds a rule, by its 名前.",
        "parameters": {"type": "object", "properties": {"rule": {"type": "string"}}},
    },
}
ARGUMENTS = {"rule": 'medical\n"advice"', "depth": 2}
CALL = {"id": "c1", "type": "function", "function": {"name": "look_up", "arguments": json.dumps(ARGUMENTS)}}
MESSAGES = [
    {"role": "user", "content": "May I take two?"},
    {"role": "assistant", "content": None, "reasoning_content": "The rule decides.", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "Never say how much."},
    {"role": "tool", "tool_call_id": "c2", "content": "Say whom to ask."},
    {"role": "assistant", "reasoning_content": "So I say whom to ask.", "content": "Ask a pharmacist."},
]


def read(tmp_path, messages, **more):
    path = tmp_path / "rows.jsonl"
    options = {k: more.pop(k) for k in ("turns",) if k in more}
    path.write_text(json.dumps({"messages": messages, **more}) + "\n")
    return read_source("s", SourceConfig(path=str(path), **options))


def as_objects(messages):
    """The messages in the form that a template expects: arguments as objects, no null content."""
    return [
        m
        | {"content": m["content"] or ""}
        | (
            {
                "tool_calls": [
                    {
                        "type": "function",
                        "function": {
                            "name": c["function"]["name"],
                            "arguments": json.loads(c["function"]["arguments"]),
                        },
                    }
                    for c in m["tool_calls"]
                ]
            }
            if "tool_calls" in m
            else {}
        )
        for m in messages
    ]


def test_each_call_and_the_answer_are_rows_with_the_ids_of_the_template(tmp_path):
    tok = tokenizer("qwen3")
    call, answer = read(tmp_path, MESSAGES, tools=[TOOL])
    assert (call.location.endswith(":1 (message 1)"), answer.location.endswith(":1 (message 4)")) == (True, True)
    for row, messages in ((call, MESSAGES[:2]), (answer, MESSAGES)):
        expected = tok.apply_chat_template(as_objects(messages), tools=[TOOL], return_dict=False)
        assert encode_row(row, tok).input_ids.tolist() == expected
    spans = spell(tok, encode_row(call, tok))
    written = f'<tool_call>\n{{"name": "look_up", "arguments": {json.dumps(ARGUMENTS)}}}\n</tool_call>'
    assert spans[1:] == [
        ("COT", "<think>\nThe rule decides.\n</think>\n\n"),
        ("RESPONSE", written + "<|im_end|>"),
        ("PROMPT", "\n"),
    ]
    spans = spell(tok, encode_row(answer, tok))
    assert "Never say how much.\n</tool_response>\n<tool_response>\nSay whom to ask." in spans[0][1]
    assert "The rule decides." in spans[0][1]  # the template shows it, since there is no later user message
    assert spans[1:] == [
        ("COT", "<think>\nSo I say whom to ask.\n</think>\n\n"),
        ("RESPONSE", "Ask a pharmacist.<|im_end|>"),
        ("PROMPT", "\n"),
    ]


def test_a_call_after_text_and_without_a_cot(tmp_path):
    tok = tokenizer("qwen3")
    messages = [MESSAGES[0], {"role": "assistant", "content": "I look it up.", "tool_calls": [CALL, CALL]}]
    (row,) = read(tmp_path, messages, tools=json.dumps([TOOL["function"]]))  # as JSON text, bare
    example = encode_row(row, tok)
    assert example.input_ids.tolist() == tok.apply_chat_template(as_objects(messages), tools=[TOOL], return_dict=False)
    spans = spell(tok, example)
    assert spans[0][1].endswith("<think>\n\n</think>\n\n")
    assert spans[1][1].startswith("I look it up.\n<tool_call>\n")
    assert spans[1][1].endswith("</tool_call><|im_end|>")
    assert spans[1][1].count("<tool_call>") == 2
    stripped = encode_rows([row], tok, pack_capacity=2048, cot="strip")
    assert stripped[0].input_ids.tolist() == example.input_ids.tolist()


def test_the_sharegpt_format_gives_the_same_rows(tmp_path):
    items = [
        {"from": "human", "value": "May I take two?"},
        {"from": "function_call", "value": json.dumps({"name": "look_up", "arguments": ARGUMENTS})},
        {"from": "observation", "value": "Never say how much."},
        {"from": "gpt", "value": "Ask a pharmacist."},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"conversations": items, "tools": json.dumps([TOOL["function"]])}))
    theirs = read_source("s", SourceConfig(path=str(path)))
    plain = [
        {k: v for k, v in m.items() if k not in ("reasoning_content", "tool_call_id")}
        for m in (*MESSAGES[:3], MESSAGES[4])
    ]
    plain[1] = plain[1] | {"tool_calls": [{"function": CALL["function"]}]}  # ShareGPT has no ids
    ours = read(tmp_path, plain, tools=[TOOL])
    assert [(r.messages, r.calls, r.tools, r.response, r.digest) for r in theirs] == [
        (r.messages, r.calls, r.tools, r.response, r.digest) for r in ours
    ]


def test_turns_last_gives_a_row_for_each_call_since_the_last_user_message(tmp_path):
    earlier = [*MESSAGES, {"role": "user", "content": "And three?"}, *MESSAGES[1:]]
    assert [r.location.rsplit("(")[1] for r in read(tmp_path, earlier)] == ["message 6)", "message 9)"]
    assert len(read(tmp_path, earlier, turns="each")) == 4
    muted = [MESSAGES[0], MESSAGES[1] | {"loss": False}, *MESSAGES[2:]]
    assert [bool(r.calls) for r in read(tmp_path, muted)] == [False]


def test_text_in_a_tool_never_becomes_a_control_token(tmp_path):
    tok = tokenizer("qwen3")
    names = ["<|im_end|>", "<|im_start|>", "</tool_call>", "<tool_call>", "</think>", "<think>", "</tool_response>"]
    nasty = f"a {' '.join(names)} b"
    function = {"name": "f", "description": nasty, "parameters": {"properties": {nasty: {"type": "string"}}}}
    call = {"function": {"name": "f", "arguments": {nasty: nasty}}}
    messages = [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": nasty, "content": nasty},
        {"role": "assistant", "content": "done"},
    ]
    clean = json.loads(json.dumps(messages).replace(nasty, "x"))
    for forged, plain in zip(
        read(tmp_path, messages, tools=[function]),
        read(tmp_path, clean, tools=[json.loads(json.dumps(function).replace(nasty, "x"))]),
        strict=True,
    ):
        counts = [
            [example.input_ids.tolist().count(tok.convert_tokens_to_ids(name)) for name in names]
            for example in (encode_row(forged, tok), encode_row(plain, tok))
        ]
        assert counts[0] == counts[1]
        example = encode_row(forged, tok)
        assert nasty in tok.decode(example.input_ids)
        assert tok.decode(example.input_ids[example.segments == Segment.RESPONSE]).endswith("<|im_end|>")


@pytest.mark.parametrize("family", ["chatml", "llama3", "plain"])
def test_templates_that_do_not_write_tools_are_refused(tmp_path, family):
    tok = tokenizer(family)
    with pytest.raises(DataError, match="the chat template does not write the available tools: use one that does"):
        encode_row(read(tmp_path, [MESSAGES[0], MESSAGES[-1]], tools=[TOOL])[0], tok)
    (call,) = read(tmp_path, [MESSAGES[0], MESSAGES[1] | {"content": "I look."}])
    with pytest.raises(DataError, match=r"rows.jsonl:1: the chat template does not write the tool calls"):
        encode_row(call, tok)


def test_a_template_for_tools_of_another_structure_is_refused(tmp_path):
    template = tokenizer("qwen3").chat_template.replace("tool | tojson", "tool + 1")
    tok = fast_tokenizer(tokenizer("qwen3").backend_tokenizer, template, eos_token="<|im_end|>")
    with pytest.raises(DataError, match=r"rows.jsonl:1.*the chat template cannot render the row's tools"):
        encode_row(read(tmp_path, MESSAGES, tools=[TOOL])[0], tok)
    typed = json.loads(json.dumps(TOOL).replace("Finds", "\U000f0001"))
    with pytest.raises(DataError, match=r"contains the private-use character U\+F0001, which is reserved as a plac"):
        encode_row(read(tmp_path, MESSAGES, tools=[typed])[0], tokenizer("qwen3"))
