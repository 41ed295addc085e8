"""The expected ids and segments of a chat, computed without the code under test.

Chats are written out by hand, with a segment for each character. Control tokens are inserted as ids, and the text
between them is tokenized with a tokenizer without added tokens. So the oracle shares neither the rendering with
placeholders nor the renamed control tokens with delib_fast.data.
"""

from __future__ import annotations

from helpers.chat_tokenizers import FAMILIES, tokenizer, trained_backend
from tokenizers import Tokenizer

from delib_fast.data import Message, Row, Segment

P, C, R, D = Segment.PROMPT, Segment.COT, Segment.RESPONSE, Segment.DOCUMENT
CONTROL_TAGS = ("qwen3", "qwen35", "ours", "r1")
KNOWS_REASONING = ("qwen3", "qwen35", "ours", "plain")


def chat(prompt, cot, response, *, system=None, history=(), **more):
    messages = [Message("system", system)] if system is not None else []
    messages += [*history, Message("user", prompt)]
    return Row(
        kind="chat",
        location="rows.jsonl:1",
        source="s",
        digest="0",
        messages=tuple(messages),
        cot=cot,
        response=response,
        **more,
    )


def document(text, **more):
    return Row(kind="document", location="docs.jsonl:1", source="s", digest="0", text=text, **more)


# --- the oracle -----------------------------------------------------------------------------------------------


def written(family, row):
    """[(text, whether it is one control token, segment)] as the family's template writes the row."""
    out = []

    def put(segment, *texts):
        for text in texts:
            out.append((text.removeprefix("\0"), text.startswith("\0"), segment))

    def turn(role, content):
        if family == "llama3":
            put(P, "\0<|start_header_id|>", role, "\0<|end_header_id|>", "\n\n", content.strip(), "\0<|eot_id|>")
        elif family == "r1":
            put(P, *(["\0<|User|>"] if role == "user" else []), content)
        elif family == "plain":
            put(P, role.capitalize() + ":\n", content, "\n\n")
        else:
            put(
                P,
                "\0<|im_start|>",
                role,
                "\n",
                content.strip() if family == "qwen35" else content,
                "\0<|im_end|>",
                "\n",
            )

    opening, closing = ("\0<think>", "\0</think>") if family in CONTROL_TAGS else ("<think>", "</think>")
    has_cot = bool((row.cot or "").strip())
    cot, response = row.cot or "", row.response
    if family in ("llama3", "r1"):
        put(P, "\0<|begin_of_text|>" if family == "llama3" else "\0<|bos|>")
    if family == "qwen25" and row.messages[0].role != "system":
        turn("system", "You are a helpful assistant.")
    for message in row.messages:
        turn(message.role, message.content)
    if family == "llama3":
        put(P, "\0<|start_header_id|>", "assistant", "\0<|end_header_id|>", "\n\n")
        # trimmed as one text: `<think>…` and the response together
        whole = (f"<think>\n{cot}\n</think>\n\n{response}" if has_cot else response).strip()
        if has_cot and response.strip():
            put(C, whole[: len(whole) - len(response.strip())])
            put(R, response.strip(), "\0<|eot_id|>")
        else:
            put(C if has_cot else R, whole)
            put(R, "\0<|eot_id|>")
        return out
    if family == "r1":
        put(P, "\0<|Assistant|>")
    else:
        put(P, *(["Assistant:\n"] if family == "plain" else ["\0<|im_start|>", "assistant", "\n"]))
    if family == "qwen3":
        cot, response = cot.strip("\n"), response.lstrip("\n")
    if family == "qwen35":
        cot, response = cot.strip(), response.strip()
    core = response.lstrip()
    lead = response[: len(response) - len(core)]
    if has_cot:
        put(P if family in ("qwen35", "r1") else C, opening, "\n")
        put(C, cot, "\n", closing, "\n\n", lead)
        put(R, core)
    elif family in ("qwen3", "qwen35"):
        put(P, opening, "\n", "\n", closing, "\n\n", lead)
        put(R, core)
    else:
        put(R, response)
    end = {"r1": "\0<|eos|>", "plain": "\0<|endoftext|>"}.get(family, "\0<|im_end|>")
    put(R, end)
    if end == "\0<|im_end|>":
        put(P, "\n")
    return out


def oracle(family, row):
    """(ids, segments) of what `written` returns; the first character of a token decides its segment."""
    specials = FAMILIES[family][1]
    plain = Tokenizer.from_str(trained_backend(specials, False).to_str())
    plain.post_processor = None
    names = tokenizer(family).get_vocab()
    ids, segments = [], []
    pending, marks = "", []

    def flush():
        nonlocal pending, marks
        encoding = plain.encode(pending, add_special_tokens=False)
        ids.extend(encoding.ids)
        segments.extend(marks[start] for start, _ in encoding.offsets)
        pending, marks = "", []

    for text, is_control, segment in written(family, row):
        if is_control:
            flush()
            ids.append(names[text])
            segments.append(segment)
        else:
            pending += text
            marks += [segment] * len(text)
    flush()
    return ids, segments


NASTY = [
    "<|im_end|>",
    "<|im_start|>",
    "<|im_start|>assistant\n",
    "</think>",
    "<think>",
    "<think>\n\n</think>\n\n",
    "<|eot_id|>",
    "<|endoftext|>",
    "<|eos|>",
    "<|Assistant|>",
    "<tool_response>",
    "</tool_response>",
    "|im_end|>",
    "<",
    ">",
    "<|",
    ".",
    "\n",
    "\n\n",
    "\n\n\n",
    " ",
    "  ",
    "\t",
    "\r\n",
    ".\n",
    "?\n\n",
    "\u00a0",
    "\u3000",
    "é",
    "e\u0301",
    "\u0301",
    "🙂",
    "\U0001f469\u200d\U0001f680",
    "東京",
    "ﬁ",
    "\u2028",
    "\ufeff",
    "\ue000",
    "User:",
    "Assistant:\n",
    "assistant",
    "the policy",
    " says",
    " to",
    " refuse",
    "1",
    "22",
    "'s",
    "{{ x }}",
    "{%",
]


def nasty_text(draw, most=12, *, empty=True):
    text = "".join(draw.choice(NASTY) for _ in range(draw.randrange(0 if empty else 1, most)))
    return text if empty or text.strip() else text + "x"


def spell(tok, example):
    """[(segment, text)] of an example: neighbouring tokens of one segment, decoded."""
    spans = []
    for token, segment in zip(example.input_ids.tolist(), example.segments.tolist(), strict=True):
        if not spans or spans[-1][0] != segment:
            spans.append((segment, []))
        spans[-1][1].append(token)
    return [(Segment(segment).name, tok.decode(ids)) for segment, ids in spans]
