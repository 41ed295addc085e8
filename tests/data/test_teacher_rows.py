"""The rows that a teacher reads: rendered with the spec, aligned with the student's, and packed as a tree."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from helpers.chat_oracle import chat, document
from helpers.chat_tokenizers import FAMILIES, fast_tokenizer, tokenizer

from delib_fast.config import AFTConfig
from delib_fast.data import (
    DataError,
    Example,
    Message,
    PackedDataLoader,
    Segment,
    TeacherWeights,
    TokenizedDataset,
    cot_under_pressure,
    encode_rows,
    encode_stream,
    loss_normalizer,
    teacher_stream,
    teacher_weights,
    total_weights,
)
from delib_fast.data.encode.encoder import encoder_for
from delib_fast.data.encode.teacher import with_spec
from delib_fast.data.pack.teacher import _tree

SPEC = "Be honest, be careful, and say so when you do not know.\n\nRefuse what could hurt somebody.\n"
OPTIONS = {"cot": "train", "system_prompt": None, "pack_capacity": 512, "over_long": "drop"}


def read(rows, tok, *, positions=None, spec=SPEC, **changes):
    return list(teacher_stream(rows, tok, spec=spec, positions=positions, **{**OPTIONS, **changes}))


def test_the_spec_begins_the_system_message():
    plain = chat("Hi", None, "Hello")
    (first, *rest) = with_spec(plain, SPEC, None).messages
    assert (first.role, first.content, tuple(rest)) == ("system", SPEC.strip(), plain.messages)
    (first, *_) = with_spec(plain, SPEC, "Answer in French.").messages
    assert first.content == f"{SPEC.strip()}\n\nAnswer in French."
    own = chat("Hi", None, "Hello", system="Answer in German.")
    (first, *rest) = with_spec(own, SPEC, "Answer in French.").messages
    assert first.content == f"{SPEC.strip()}\n\nAnswer in German."
    assert tuple(rest) == own.messages[1:]
    blocks = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    fields = json.dumps({"name": "ops", "content": blocks})
    messages = (Message("developer", "a\n\nb", fields=fields), *plain.messages)
    (first, *_) = with_spec(replace(plain, messages=messages), SPEC, None).messages
    assert (first.role, first.content) == ("developer", f"{SPEC.strip()}\n\na\n\nb")
    assert json.loads(first.fields) == {"name": "ops"}, "a list of blocks would take the place of the joined text"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reply_has_the_same_tokens_and_the_prompt_has_the_spec(family):
    tok = tokenizer(family)
    rows = [
        chat("How do I fix a bug?", "First I look.", "Look at the code."),
        chat("And now?", None, "Think.", system="Be brief."),
        chat("Why?", "So the policy says.\n\n1 + 1 = 2", " naïve café 東京"),
    ]
    students = [found[0] for found in encode_stream(rows, tok, **OPTIONS)]
    for student, (teacher,) in zip(students, read(rows, tok), strict=True):
        for one, other in zip((student, teacher), (teacher, student), strict=True):
            own, their = (e.segments != Segment.PROMPT for e in (one, other))
            assert one.input_ids[own].tolist() == other.input_ids[their].tolist()
            assert one.segments[own].tolist() == other.segments[their].tolist()
        text = tok.decode(teacher.input_ids[teacher.segments == Segment.PROMPT])
        assert SPEC.strip() in text
        assert SPEC.strip() not in tok.decode(student.input_ids)


def test_a_document_and_a_dropped_row_stay_as_they_are():
    tok = tokenizer("chatml")
    rows = [document("a text"), chat("Hi " * 600, None, "too long"), chat("Hi", None, "Hello")]
    students = list(encode_stream(rows, tok, **OPTIONS))
    found = read(rows, tok)
    assert [len(examples) for examples in found] == [len(examples) for examples in students] == [1, 0, 1]
    assert found[0][0].input_ids.tolist() == students[0][0].input_ids.tolist()


def test_rows_that_cannot_be_aligned_are_refused():
    tok = tokenizer("chatml")
    odd = tok.chat_template.replace(
        "{%- for message in messages %}",
        "{%- set n = messages | selectattr('role', 'equalto', 'system') | list | length %}"
        "{%- for message in messages %}{%- if message.role == 'assistant' and n %}{{- '' }}{%- endif %}",
    )
    # With a system message, this template writes another reply.
    odd = odd.replace(
        "message['content'] +", "message['content'] + ('!' if n and message.role == 'assistant' else '') +"
    )
    with pytest.raises(DataError, match=r"^rows.jsonl:1: with the spec in its system message, the chat template gives"):
        read([chat("Hi", None, "Hello")], fast_tokenizer(tok.backend_tokenizer, odd, eos_token=tok.eos_token))
    no_system = (
        "{%- if messages[0].role == 'system' %}{{- raise_exception('no system') }}{%- endif %}" + tok.chat_template
    )
    with pytest.raises(
        DataError, match=r"no system.*\(the row as the teacher reads it, with teacher.spec in its system"
    ):
        read([chat("Hi", None, "Hello")], fast_tokenizer(tok.backend_tokenizer, no_system, eos_token=tok.eos_token))
    (length,) = (len(teacher) for (teacher,) in read([chat("Hi", None, "Hello")], tok))
    read([chat("Hi", None, "Hello")], tok, positions=length)
    (own,) = encode_rows([chat("Hi", None, "Hello")], tok, pack_capacity=512)
    with pytest.raises(
        DataError,
        match=rf"^rows.jsonl:1: with the spec, the teacher reads {length} tokens, more than its {length - 1} positions "
        rf"\(max_position_embeddings\): shorten teacher.spec, or set pack_capacity to at most {len(own) - 1}, so",
    ):
        read([chat("Hi", None, "Hello")], tok, positions=length - 1)
    reserved = next(iter(encoder_for(tok).control.spelling.values()))
    with pytest.raises(DataError, match=r"^teacher.spec: contains the private-use character U\+"):
        read([chat("Hi", None, "Hello")], tok, spec=f"odd {reserved}")


def ids(*parts):
    return np.concatenate([np.arange(n) + start for start, n in parts]).astype(np.int32)


def test_the_tree_shares_every_long_beginning():
    """A spec of 600 tokens, prompts of 30 and 18 with 20 and 2 replies, a row alone, and a row that is there twice."""
    first = [ids((0, 600), (1000, 30), (2000 + 10 * k, 3)) for k in range(20)]
    second = [ids((0, 600), (1100, 18), (3000 + 10 * k, 4)) for k in range(2)]
    rows = [*second, ids((0, 600), (1200, 5)), *first, first[0]]
    nodes = _tree(rows)
    for k, row in enumerate(rows):
        own = sorted((n for n in nodes if k in n.rows), key=lambda n: n.begin)
        assert [n.begin for n in own] == [0, *(n.end for n in own[:-1])], "the nodes of a row follow each other"
        assert own[-1].end == len(row)
        assert [nodes[n.parent] if n.parent >= 0 else None for n in own] == [None, *own[:-1]]
        assert all(row[n.begin : n.end].tolist() == rows[n.rows[0]][n.begin : n.end].tolist() for n in own)
    # the spec; the prompt of the 21 replies; not that of the two, which would save 18 tokens
    assert sorted((n.begin, n.end, len(n.rows)) for n in nodes if len(n.rows) > 2) == [(0, 600, 24), (600, 630, 21)]
    assert sum(n.end - n.begin for n in nodes) == 600 + 30 + 21 * 3 + 2 * 22 + 5


def test_each_row_reads_the_state_that_predicts_its_token():
    tok = tokenizer("qwen3")
    rows = [chat(f"How do I fix bug {k // 3}?" * 4, "First I look." * (k % 3), f"Look {k}.") for k in range(7)]
    rows.append(document("a text about a spec"))
    dataset = encode_rows(rows, tok, pack_capacity=512)
    dataset.teacher = TokenizedDataset([found[0] for found in read(rows, tok)])
    weights = TeacherWeights((0.0, 0.5, 1.0, 0.0), (0.0, 0.25, 0.25, 1.0), share=True)
    for share in (True, False):
        loader = PackedDataLoader(
            dataset,
            pack_capacity=512,
            packs_per_step=1,
            segment_weights=(0, 1, 1, 1),
            seed=0,
            epochs=1,
            rank=0,
            world_size=1,
            share_prompts=share,
            teacher=weights,
        )
        seen = 0
        for step in range(len(loader)):
            (batch,) = loader.step(step)
            teacher = batch.teacher
            assert teacher is not None
            segments = batch.segment_ids[batch.loss_positions]
            taught = segments != Segment.DOCUMENT
            targets = batch.targets[batch.loss_positions]
            # The state of a token predicts the next one of its own row, which for all but the last token of a shared
            # beginning is the next one in the pack.
            pack, at = teacher.batch, teacher.rows[taught]
            last = {end - 1 for end in pack.cu_seqlens_host[1:]}
            inside = np.array([row not in last for row in at.tolist()])
            assert pack.input_ids[at[inside] + 1].tolist() == targets[taught][inside].tolist()
            assert (~inside).sum() <= len(set(batch.example_ids))
            assert teacher.divergence_weights[batch.loss_positions].tolist() == [
                {Segment.COT: 0.5, Segment.RESPONSE: 1.0, Segment.DOCUMENT: 0.0}[s] for s in segments.tolist()
            ]
            assert teacher.nll_weights[batch.loss_positions].tolist() == [
                1.0 if s == Segment.DOCUMENT else 0.25 for s in segments.tolist()
            ]
            assert loss_normalizer([batch]) == len(targets), "the stage's own weights, which are 1"
            seen += int(taught.sum())
        assert seen == int(dataset.target_counts[:, [Segment.COT, Segment.RESPONSE]].sum())


def test_the_weights_of_a_stage():
    teacher = {"spec": "spec.md", "model": "self", "weight": 2, "nll_weight": 0.5, "cot_weight": 0.25}
    stage = AFTConfig(train=["a"], cot_weight=0.5, response_weight=3, teacher=teacher)
    assert teacher_weights(stage, share=False) == TeacherWeights((0, 0.5, 2, 0), (0, 0.25, 1.5, 1), share=False)
    assert total_weights(stage) == (0, 0.75, 3.5, 1)
    assert teacher_weights(AFTConfig(train=["a"]), share=True) is None
    assert total_weights(AFTConfig(train=["a"], cot_weight=0.5)) == (0, 0.5, 1, 1)


@pytest.mark.parametrize(
    ("keys", "pressure"),
    [
        ({}, "SFT"),
        ({"cot": "context"}, "no"),
        ({"cot_weight": 0}, "no"),
        ({"teacher": {}}, "SFT"),
        ({"teacher": {"nll_weight": 0}}, "no"),
        ({"teacher": {"nll_weight": 0, "cot_weight": 1}}, "distillation"),
        ({"cot": "context", "teacher": {"cot_weight": 1}}, "distillation"),
        ({"teacher": {"cot_weight": 1}}, "SFT and distillation"),
    ],
)
def test_what_trains_the_chain_of_thought(keys, pressure):
    if "teacher" in keys:
        keys = {**keys, "teacher": {"spec": "spec.md", "model": "self", **keys["teacher"]}}
    assert cot_under_pressure(AFTConfig(train=["a"], **keys)) == pressure


def test_a_dataset_has_the_digest_of_its_teacher():
    def dataset(spec: int) -> TokenizedDataset:
        made = TokenizedDataset([Example(ids((0, 3)), np.array([0, 2, 2], np.int8), "rows.jsonl:1")])
        segments = np.array([0] * (spec + 1) + [2, 2], np.int8)
        made.teacher = TokenizedDataset([Example(ids((50, spec), (0, 3)), segments, "rows.jsonl:1")])
        return made

    one, other = dataset(4), dataset(5)
    assert one.digest() == dataset(4).digest() != other.digest()
    joined = TokenizedDataset.join([one, other]).take(np.array([1, 0, 1]))
    assert [len(e) for e in joined.teacher] == [8, 7, 8]
