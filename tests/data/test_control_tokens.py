"""Only a chat template can write a control token, and ordinary added tokens are text."""

import pytest
from helpers.chat_oracle import chat, document
from helpers.chat_tokenizers import CHATML, fast_tokenizer, tokenizer, trained_backend
from tokenizers import AddedToken, Tokenizer, trainers

from delib_fast.data import DataError, encode_row
from delib_fast.data.encode.encoder import Encoder


def test_a_control_token_of_one_character_cannot_be_written_by_a_row():
    backend = Tokenizer.from_str(tokenizer("chatml").backend_tokenizer.to_str())
    backend.add_special_tokens([AddedToken("§", normalized=False)])
    tok = fast_tokenizer(backend, CHATML, eos_token="<|im_end|>")
    with pytest.raises(DataError, match=r"^rows.jsonl:1: contains '§', which is a control token of the tokenizer"):
        encode_row(chat("a § b", None, "r"), tok)


def test_a_vocabulary_that_spells_a_control_token_cannot_write_it():
    backend = Tokenizer.from_str(trained_backend("plain", False).to_str())
    backend.train_from_iterator(["ab ab abc"] * 9, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    assert backend.encode("ab").tokens == ["ab"]  # the result of a merge
    backend.add_special_tokens(["ab"])
    tok = fast_tokenizer(backend, eos_token="ab")
    assert tok.convert_ids_to_tokens(encode_row(document("ab abc"), tok).input_ids) == [
        "a",
        "b",
        "Ġ",
        "a",
        "b",
        "c",
        "ab",
    ]


def test_a_vocabulary_with_private_use_characters_and_html_tags():
    backend = Tokenizer.from_str(tokenizer("chatml").backend_tokenizer.to_str())
    backend.add_tokens([AddedToken("\U0010fffd", normalized=False), AddedToken("</h3>", normalized=False)])
    tok = fast_tokenizer(backend, CHATML, eos_token="<|im_end|>")
    encoder = Encoder(tok)
    assert not set(encoder.control.spelling.values()) & set("\U0010fffd")
    row = chat("a </h3> \U0010fffd b", None, "</h3>")
    messages = [{"role": "user", "content": "a </h3> \U0010fffd b"}, {"role": "assistant", "content": "</h3>"}]
    ids = encode_row(row, tok).input_ids.tolist()
    assert ids == tok.apply_chat_template(messages, return_dict=False)
    assert ids.count(tok.convert_tokens_to_ids("</h3>")) == 2


def test_added_words_and_spaces_are_ordinary_text():
    backend = Tokenizer.from_str(tokenizer("chatml").backend_tokenizer.to_str())
    backend.add_tokens([AddedToken("  ", normalized=False), AddedToken("proteinX"), AddedToken("user")])
    tok = fast_tokenizer(backend, eos_token="<|im_end|>")
    tok.chat_template = tokenizer("chatml").chat_template
    row = chat("a  proteinX user  b", None, "  proteinX")
    messages = [{"role": "user", "content": row.messages[0].content}, {"role": "assistant", "content": row.response}]
    example = encode_row(row, tok)
    assert example.input_ids.tolist() == tok.apply_chat_template(messages, return_dict=False)
    assert tok.convert_tokens_to_ids("proteinX") in example.input_ids


def test_names_of_control_tokens_may_begin_alike():
    backend = Tokenizer.from_str(tokenizer("chatml").backend_tokenizer.to_str())
    names = [f"<unused{k}>" for k in range(3000)] + ["<unused1>x", "<|im_end|>>"]
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    control = Encoder(fast_tokenizer(backend, CHATML, eos_token="<|im_end|>")).control
    text = "<unused1>x<unused12><unused3000><|im_end|>><|im_end|><unused1>"
    spelled = control.spell(text)
    assert [control.unspell(char) for char in spelled if control.is_control(char)] == [
        "<unused1>x", "<unused12>", "<|im_end|>>", "<|im_end|>", "<unused1>",
    ]  # fmt: skip
    assert control.spell(control.escape(text)) == text
