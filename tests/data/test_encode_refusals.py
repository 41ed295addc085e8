"""Rows, chat templates and tokenizers that are refused, with the reason."""

import pytest
from helpers.chat_oracle import chat, document
from helpers.chat_tokenizers import fast_tokenizer, tokenizer

from delib_fast.data import DataError, encode_row
from delib_fast.data.encode.encoder import Encoder


def with_template(template, family="chatml"):
    return fast_tokenizer(tokenizer(family).backend_tokenizer, template, eos_token="<|im_end|>")


TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for m in messages %}{{ m.content }}\n{% endfor %}",
            "writes nothing after the response, so that the model would never learn",
        ),
        (
            TURNS.replace("m.content", "m.content | upper"),
            "changes the reply of a row (other than stripping white space)",
        ),
        (TURNS.replace("messages", "messages[1:]"), "drops the user message"),
        (TURNS.replace("{{ m.content }}", "{{ m.content }}{{ m.content }}"), "drops the response, or writes it twice"),
        (TURNS + "{{ raise_exception('no such role') }}", "the chat template refuses the row: no such role"),
        (TURNS + "{% if add_generation_prompt %}ASSISTANT:{% endif %}", "differently before a reply than as a prompt"),
        (TURNS + "{{ messages[0].x.y }}", "the chat template refuses the row: 'dict object' has no attribute 'x'"),
    ],
)
def test_templates_that_cannot_be_trained_with_raise(template, message):
    with pytest.raises(DataError) as caught:
        encode_row(chat("secret", None, "secret"), with_template(template))
    assert str(caught.value).startswith("rows.jsonl:1: ")
    assert message in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_row_without_anything_to_train_on_raises():
    tok = tokenizer("qwen3")
    assert encode_row(chat("p", "c", ""), tok) is not None
    for cot in ("context", "strip"):
        with pytest.raises(
            DataError, match=f"rows.jsonl:1: there is nothing to train on: .* with cot: {cot} only the response"
        ):
            encode_row(chat("p", "c", " "), tok, cot=cot)


@pytest.mark.parametrize("tag", ["<think>", "</think>"])
@pytest.mark.parametrize("family", ["chatml", "qwen25", "llama3", "plain"])
def test_think_tags_that_are_plain_text_are_refused_in_a_reply(family, tag):
    tok = tokenizer(family)
    for row, part in ((chat("p", f"a {tag} b", "r"), "chain of thought"), (chat("p", "c", f"a {tag} b"), "response")):
        with pytest.raises(DataError, match=f"^rows.jsonl:1: the {part} contains {tag}, which is plain text") as caught:
            encode_row(row, tok)
        assert caught.value.reason == "cot_tags"
    with pytest.raises(DataError, match=f"the response contains {tag}"):
        encode_row(chat("p", None, f"a {tag} b"), tok)
    with pytest.raises(DataError, match=f"the chain of thought contains {tag}"):
        Encoder(tok).encode_with_cots(chat("p", "c", "r"), ["fine", f"a {tag} b"])
    assert encode_row(chat(f"a {tag} b", "a think tag </ think>", "r"), tok) is not None  # a prompt may contain it
    assert encode_row(chat("p", f"a {tag} b", "r"), tok, cot="strip") is not None  # the thought is removed


@pytest.mark.parametrize("family", ["qwen3", "qwen35", "r1", "ours"])
def test_think_tags_that_are_control_tokens_stay_text_in_a_reply(family):
    tok = tokenizer(family)
    ids = encode_row(chat("p", "a </think> <think> b", "c </think> <think> d"), tok).input_ids.tolist()
    assert [ids.count(tok.convert_tokens_to_ids(tag)) for tag in ("<think>", "</think>")] == [1, 1]


WORDS = TURNS.replace("{{ m.content }}", "{% if m.reasoning_content %}{{ before }}{{ m.reasoning_content }}"
                      "{{ after }}{% endif %}{{ m.content }}")  # fmt: skip


@pytest.mark.parametrize(
    ("before", "after", "cot", "response", "refused"),
    [
        ("Thoughts:\\n", "\\nAnswer: ", "a Answer: b", "r", "the chain of thought contains Answer:, "),
        ("Thoughts:\\n", "\\nAnswer: ", "Thoughts: a", "Answer: b", None),  # only the end can be mistaken
        ("[T]", "[/T]\\n", "a [/T] b", "r", r"the chain of thought contains \[/T\], "),
        ("[T]", "[/T]\\n", "a [T] b", "r", r"the chain of thought contains \[T\], "),
        ("[T]", "[/T]\\n", "a", "b [/T]", r"the response contains \[/T\], "),
        ("[T]", "[/T]\\n", "a </think>", "b <think>", None),  # not this template's tags
    ],
)
def test_tags_of_the_template_itself_are_refused_in_a_reply(before, after, cot, response, refused):
    tok = with_template(WORDS.replace("before", f"'{before}'").replace("after", f"'{after}'"))
    if refused is None:
        assert encode_row(chat("p", cot, response), tok) is not None
    else:
        with pytest.raises(DataError, match=f"^rows.jsonl:1: {refused}"):
            encode_row(chat("p", cot, response), tok)


def test_rows_and_tokenizers_that_cannot_be_encoded_raise():
    with pytest.raises(DataError, match=r"rows.jsonl:1: contains the private-use character U\+10FFFD"):
        encode_row(chat("a\U0010fffd", None, "r"), tokenizer("qwen3"))
    with pytest.raises(ValueError, match="cot is 'keep'; it must be 'train', 'context' or 'strip'"):
        encode_row(chat("p", None, "r"), tokenizer("qwen3"), cot="keep")
    no_eos = fast_tokenizer(tokenizer("chatml").backend_tokenizer)
    with pytest.raises(ValueError, match="the tokenizer has no eos_token"):
        encode_row(document("x"), no_eos)
    several = with_template({"default": TURNS, "rag": TURNS})
    with pytest.raises(ValueError, match="several chat templates"):
        Encoder(several)
    with pytest.raises(ValueError, match="str has no fast backend"):
        encode_row(chat("p", None, "r"), FakeSlow())


class FakeSlow(str):
    chat_template = None
    eos_token_id = bos_token_id = None
    __slots__ = ("__weakref__",)


FakeSlow.__name__ = "str"
