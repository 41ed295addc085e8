"""Encoding: segments are exact for every token, compared with an oracle, and ids are those of the chat template."""

import itertools
import random

import numpy as np
import pytest
from helpers.chat_oracle import CONTROL_TAGS, KNOWS_REASONING, C, D, R, chat, document, nasty_text, oracle, spell
from helpers.chat_tokenizers import CORPUS, FAMILIES, LLAMA3, QWEN3, fast_tokenizer, tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from delib_fast.data import (
    PLAIN_TEMPLATE,
    DataError,
    Example,
    Message,
    encode_row,
    encode_rows,
    encode_stream,
    read_source,
    split_document,
)


@pytest.mark.parametrize("in_vocabulary", [False, True], ids=["added", "in-vocabulary"])
@pytest.mark.parametrize("family", FAMILIES)
def test_adversarial_rows_match_the_oracle(family, in_vocabulary):
    draw = random.Random(f"{family}{in_vocabulary}")
    ours = tokenizer(family, in_vocabulary=in_vocabulary)
    theirs = tokenizer(family)
    name_of = {token: name for name, token in ours.get_vocab().items()}
    compared = 0
    while compared < 150:
        cot = draw.choice([None, nasty_text(draw, empty=False)])
        response = nasty_text(draw, empty=cot is not None)
        system = draw.choice([None, "sys" + nasty_text(draw)])
        row = chat(nasty_text(draw, empty=False), cot, response, system=system)
        if family not in CONTROL_TAGS and any(tag in (cot or "") + "\n" + response for tag in ("<think>", "</think>")):
            with pytest.raises(DataError, match=r"^rows.jsonl:1: the (chain of thought|response) contains </?think>, "):
                encode_row(row, ours)
            continue
        compared += 1
        example = encode_row(row, ours)
        ids, segments = oracle(family, row)
        got = [name_of[int(i)] for i in example.input_ids]
        assert got == [theirs.convert_ids_to_tokens(i) for i in ids]
        assert example.segments.tolist() == segments


CLEAN = ["I", " think", "\n", ".", ".\n", "\n\n", " naïve", " 東京", "🙂", " 1", "2", "  ", "\t", "?", ")\n", "e\u0301"]


def clean_text(draw):
    return "".join(draw.choice(CLEAN) for _ in range(draw.randrange(1, 15))) + draw.choice(["", "x"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("in_vocabulary", [False, True], ids=["added", "in-vocabulary"])
def test_clean_rows_have_the_ids_of_apply_chat_template(family, in_vocabulary):
    draw = random.Random(family)
    made = tokenizer(family, in_vocabulary=in_vocabulary)
    for _ in range(80):
        cot = draw.choice([None, "c" + clean_text(draw)])
        row = chat(
            "p" + clean_text(draw),
            cot,
            "r" + clean_text(draw),
            system=draw.choice([None, clean_text(draw)]),
            history=draw.choice(
                [
                    (),
                    (
                        Message("user", "h" + clean_text(draw)),
                        Message("assistant", "a" + clean_text(draw), draw.choice([None, "hc"])),
                    ),
                ]
            ),
        )
        messages = [
            {"role": m.role, "content": m.content} | ({"reasoning_content": m.cot} if m.cot else {})
            for m in row.messages
        ]
        reply = {"role": "assistant", "content": row.response}
        if cot and family in KNOWS_REASONING:
            reply["reasoning_content"] = cot
        elif cot:
            reply["content"] = f"<think>\n{cot}\n</think>\n\n{row.response}"
        if family == "r1" and cot:  # its template removes the CoT: ours is after the generation prompt
            prompt = made.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            expected = made(f"{prompt}{cot}\n</think>\n\n{row.response}<|eos|>", add_special_tokens=False)["input_ids"]
        else:
            kwargs = {"chat_template": PLAIN_TEMPLATE} if made.chat_template is None else {}
            expected = made.apply_chat_template([*messages, reply], return_dict=False, **kwargs)
        assert encode_row(row, made).input_ids.tolist() == list(expected)


# --- segments ------------------------------------------------------------------------------------------------


def test_the_tags_that_the_model_has_to_write_are_part_of_the_cot():
    row = chat("Hi.", "Think.", "Yes.")
    assert spell(tokenizer("qwen3"), encode_row(row, tokenizer("qwen3")))[1:] == [
        ("COT", "<think>\nThink.\n</think>\n\n"),
        ("RESPONSE", "Yes.<|im_end|>"),
        ("PROMPT", "\n"),
    ]
    # Qwen3.5's generation prompt opens the think block, so the model never writes that tag
    assert spell(tokenizer("qwen35"), encode_row(row, tokenizer("qwen35")))[0][1].endswith("assistant\n<think>\n")
    assert spell(tokenizer("qwen35"), encode_row(row, tokenizer("qwen35")))[1:] == [
        ("COT", "Think.\n</think>\n\n"),
        ("RESPONSE", "Yes.<|im_end|>"),
        ("PROMPT", "\n"),
    ]
    assert spell(tokenizer("r1"), encode_row(row, tokenizer("r1")))[0][1].endswith("<|Assistant|><think>\n")


def test_an_empty_think_block_of_the_template_is_prompt():
    for family in ("qwen3", "qwen35"):
        for row, cot in ((chat("Hi.", None, "Yes."), "train"), (chat("Hi.", "Think.", "Yes."), "strip")):
            spans = spell(tokenizer(family), encode_row(row, tokenizer(family), cot=cot))
            assert spans[0][1].endswith("<think>\n\n</think>\n\n")
            assert spans[1:] == [("RESPONSE", "Yes.<|im_end|>"), ("PROMPT", "\n")]


@pytest.mark.parametrize("family", FAMILIES)
def test_train_and_context_have_equal_tokens_and_strip_removes_the_cot(family):
    tok = tokenizer(family)
    row = chat("Hi.", "Think twice.", "Yes.")
    train, context, strip = (encode_row(row, tok, cot=cot) for cot in ("train", "context", "strip"))
    assert np.array_equal(train.input_ids, context.input_ids)
    assert np.array_equal(train.segments, context.segments)
    assert C in train.segments
    assert C not in strip.segments
    assert "twice" not in tok.decode(strip.input_ids)
    assert np.array_equal(strip.input_ids, encode_row(chat("Hi.", None, "Yes."), tok).input_ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_end_of_the_turn_is_supervised_and_nothing_after_it(family):
    tok = tokenizer(family)
    example = encode_row(chat("Hi.", None, "Yes."), tok)
    supervised = example.input_ids[example.segments == R].tolist()
    assert supervised[-1] == tok.eos_token_id
    assert supervised.count(tok.eos_token_id) == 1


def test_the_cot_of_an_earlier_turn_is_dropped_as_in_inference():
    history = (Message("user", "a"), Message("assistant", "b", "old thought"))
    for family in ("qwen3", "qwen35", "chatml", "plain"):
        tok = tokenizer(family)
        text = tok.decode(encode_row(chat("c", "new thought", "d", history=history), tok).input_ids)
        assert "old thought" not in text
        assert "new thought" in text


def test_the_system_prompt_is_prepended_to_rows_without_one():
    tok = tokenizer("qwen25")
    with_ours = tok.decode(encode_row(chat("p", None, "r"), tok, system_prompt="Be kind.").input_ids)
    assert with_ours.startswith("<|im_start|>system\nBe kind.<|im_end|>")
    own = encode_row(chat("p", None, "r", system="Be brief."), tok, system_prompt="Be kind.")
    assert "Be kind." not in tok.decode(own.input_ids)


def test_document_is_bos_text_eos():
    tok = tokenizer("qwen3")
    text = "A spec may mention <|im_end|> and </think>.\n"
    example = encode_row(document(text), tok)
    assert example.input_ids[-1] == tok.eos_token_id
    assert tok.eos_token_id not in example.input_ids[:-1]
    assert tok.decode(example.input_ids[:-1]) == text
    assert set(example.segments.tolist()) == {D}
    from tokenizers.processors import TemplateProcessing

    with_bos = tokenizer("llama3")
    backend = Tokenizer.from_str(with_bos.backend_tokenizer.to_str())
    bos = with_bos.bos_token
    backend.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, with_bos.bos_token_id)])
    with_bos = fast_tokenizer(backend, bos_token=bos, eos_token="<|eot_id|>")
    ids = encode_row(document("one"), with_bos).input_ids
    assert (ids[0], ids[-1]) == (with_bos.bos_token_id, with_bos.eos_token_id)
    # The plain template begins with it too, once.
    ids = encode_row(chat("p", None, "r"), with_bos).input_ids.tolist()
    assert (ids[0], ids.count(with_bos.bos_token_id)) == (with_bos.bos_token_id, 1)


def test_a_token_across_a_boundary_belongs_to_the_segment_where_it_begins():
    tok = tokenizer("chatml")  # its think tags are plain text, so `.\n` may be one token across the boundary
    assert ".\n" in [tok.decode(i) for i in range(len(tok))]
    example = encode_row(chat("p.", "thought.", "Yes."), tok)
    assert spell(tok, example)[1] == ("COT", "<think>\nthought.\n</think>\n\n")
    # A reply that begins with newlines: the merged token begins in the prompt, and the prompt is never supervised.
    spans = spell(tok, encode_row(chat("p", None, "\n\nYes."), tok))
    assert "".join(text for _, text in spans).count("assistant\n\n\nYes.<|im_end|>") == 1
    assert spans[1][0] == "RESPONSE"
    assert spans[1][1].endswith("Yes.<|im_end|>")


# --- other kinds of tokenizer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_tokenizers_like_sentencepiece(kind, scheme):
    backend = Tokenizer(models.Unigram() if kind == "unigram" else models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    if kind == "unigram":
        trainer = trainers.UnigramTrainer(
            vocab_size=300, special_tokens=specials[:3], unk_token="<unk>", show_progress=False
        )
    else:
        trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=specials, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens(["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"])
    tok = fast_tokenizer(backend, bos_token="<s>", eos_token="<|eot_id|>", unk_token="<unk>")
    tok.chat_template = LLAMA3
    row = chat("How to fix a bug. ", "I look at\n the code.", "It said: be honest.")
    messages = [
        {"role": "user", "content": row.messages[0].content},
        {"role": "assistant", "content": f"<think>\n{row.cot}\n</think>\n\n{row.response}"},
    ]
    example = encode_row(row, tok)
    assert example.input_ids.tolist() == tok.apply_chat_template(messages, return_dict=False)
    supervised = tok.decode(example.input_ids[example.segments == R])
    assert supervised.replace(" ", "").replace("\u2581", "").endswith("behonest.<|eot_id|>")
    typed = encode_row(chat("a <|eot_id|> <s>b", None, "r"), tok).input_ids.tolist()
    assert typed.count(tok.eos_token_id) == 2  # the two of the template
    assert typed.count(tok.bos_token_id) == 1


def test_a_chat_template_that_is_replaced_later_is_used():
    tok = fast_tokenizer(tokenizer("chatml").backend_tokenizer, eos_token="<|im_end|>")
    before = encode_row(chat("p", None, "r"), tok)
    tok.chat_template = QWEN3
    after = encode_row(chat("p", None, "r"), tok)
    assert not np.array_equal(before.input_ids, after.input_ids)


# --- many rows ------------------------------------------------------------------------------------------------


def test_encode_rows_equals_encode_row_and_counts():
    tok = tokenizer("qwen3")
    draw = random.Random(1)
    rows = [chat(nasty_text(draw, empty=False), "c", "r") for _ in range(1100)] + [document("some text")]
    encoded = encode_rows(rows, tok, pack_capacity=4096)
    for i in (0, 511, 512, 1099, 1100, -1):
        single = encode_row(rows[i], tok)
        assert np.array_equal(encoded[i].input_ids, single.input_ids)
        assert np.array_equal(encoded[i].segments, single.segments)
    assert len(encoded) == encoded.counts.examples == encoded.counts.rows == 1101
    assert encoded.counts.tokens == sum(map(len, encoded)) == encoded.lengths.sum()
    targets = np.bincount(np.concatenate([e.segments[1:] for e in encoded]), minlength=4).tolist()
    assert list(encoded.counts.targets.values()) == targets
    assert list(encoded.counts.targets) == ["prompt", "cot", "response", "document"]


def test_chunks_are_limited_by_rows_and_by_characters(monkeypatch):
    from delib_fast.data.encode import stream

    monkeypatch.setattr(stream, "_CHUNK_CHARS", 100)
    rows = [document("x" * n) for n in (10, 60, 40, 500, 1, 1)]
    assert [len(chunk) for chunk in stream.chunks_of(rows)] == [2, 1, 1, 2]
    encoded = encode_rows(rows, tokenizer("plain"), pack_capacity=2048)
    assert [len(tokenizer("plain").decode(e.input_ids[:-1])) for e in encoded] == [10, 60, 40, 500, 1, 1]
    monkeypatch.setattr(stream, "_CHUNK_ROWS", 4)
    assert [len(chunk) for chunk in stream.chunks_of([document("x")] * 6)] == [4, 2]


def test_a_stream_yields_the_examples_of_each_row():
    rows = [document("one"), document("one two " * 400), chat("p " * 500, None, "r")]
    split = list(encode_stream(rows, tokenizer("qwen3"), pack_capacity=128, over_long="split"))
    assert (len(split[0]), len(split[1]) > 1, len(split[2])) == (1, True, 0)
    assert list(encode_stream([], tokenizer("qwen3"), pack_capacity=128)) == []


def test_over_long_rows_are_dropped_split_or_raise():
    tok = tokenizer("qwen3")
    short, long_chat, long_text = chat("p", None, "r"), chat("p " * 500, None, "r"), document("one two " * 400)
    dropped = encode_rows([short, long_chat, long_text], tok, pack_capacity=128)
    assert (dropped.counts.rows, dropped.counts.examples, dropped.counts.dropped_over_long) == (3, 1, 2)
    split = encode_rows([short, long_chat, long_text], tok, pack_capacity=128, over_long="split")
    assert (split.counts.dropped_over_long, split.counts.split_documents) == (1, 1)
    assert max(split.lengths) <= 128
    with pytest.raises(
        DataError,
        match=r"rows.jsonl:1: \d+ tokens are more than pack_capacity \(128\): raise it, or set over_long: drop$",
    ):
        encode_rows([short, long_chat], tok, pack_capacity=128, over_long="error")
    with pytest.raises(DataError, match=r"all 1 examples are longer than pack_capacity \(128 tokens\) and were"):
        encode_rows([long_chat], tok, pack_capacity=128)


@pytest.mark.parametrize("n", [3, 4, 5, 127, 128, 1000])
@pytest.mark.parametrize("capacity", [2, 3, 4, 100])
def test_splitting_a_document_keeps_every_target(n, capacity):
    whole = Example(np.arange(n, dtype=np.int32), np.full(n, D, np.int8), "f:1", 0.5)
    pieces = list(split_document(whole, capacity)) if n > capacity else [whole]
    assert all(2 <= len(piece) <= capacity for piece in pieces) or n <= capacity
    targets = np.concatenate([piece.input_ids[1:] for piece in pieces])
    assert targets.tolist() == list(range(1, n))  # every token except the first is a target, once, in order
    assert all(b.input_ids[0] == a.input_ids[-1] for a, b in itertools.pairwise(pieces))
    assert {(p.location, p.weight) for p in pieces} == {("f:1", 0.5)}


# --- real data ------------------------------------------------------------------------------------------------


@pytest.mark.data
class TestRealData:
    def test_star1_has_exact_ids_and_segments(self, shared_data):
        from delib_fast.config import SourceConfig

        rows = read_source("star1", SourceConfig(path=str(shared_data / "star1.json")))
        for family in ("qwen3", "llama3"):
            tok = tokenizer(family)
            some = rows if family == "qwen3" else rows[:100]
            encoded = encode_rows(some, tok, pack_capacity=8192)
            assert encoded.counts.dropped_over_long == 0
            for row, example in zip(rows[:100], encoded, strict=False):
                user = {"role": "user", "content": row.messages[0].content}
                tagged = {"role": "assistant", "content": f"<think>\n{row.cot}\n</think>\n\n{row.response}"}
                assert example.input_ids.tolist() == tok.apply_chat_template([user, tagged], return_dict=False)
                supervised = [span for span in spell(tok, example) if span[0] != "PROMPT"]
                assert supervised == [
                    ("COT", f"<think>\n{row.cot}\n</think>\n\n"),
                    ("RESPONSE", f"{row.response.rstrip()}{tok.eos_token}"),
                ]

    def test_model_spec_splits_without_loss(self, shared_data):
        from delib_fast.config import SourceConfig

        rows = read_source("spec", SourceConfig(path=str(shared_data / "model_spec.md"), cut="headings"))
        tok = tokenizer("qwen3")
        encoded = encode_rows(rows, tok, pack_capacity=512, over_long="split")
        whole = encode_rows(rows, tok, pack_capacity=8192, over_long="split")
        assert encoded.counts.dropped_over_long == 0
        assert encoded.counts.targets == whole.counts.targets
