"""Shared prompts: every token attends to exactly the same tokens as without sharing, and fewer are computed."""

import itertools
import json
import random

import numpy as np
import pytest
from helpers.chat_oracle import chat
from helpers.chat_tokenizers import tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from delib_fast.data import Example, PackedDataLoader, Segment, TokenizedDataset, encode_rows, evaluation_batches
from delib_fast.data.pack.shared_prompts import MIN_SHARED_TOKENS, bundle

WEIGHTS = (0.0, 0.5, 1.0, 2.0)


def replies(prompts, seed=0):
    """Examples with a common prompt for each (prompt length, reply lengths), and some documents."""
    rng = np.random.default_rng(seed)
    found = []
    for n, lengths in prompts:
        prompt = rng.integers(0, 1000, n).astype(np.int32)
        for m in lengths:
            own = rng.integers(0, 1000, m).astype(np.int32)
            segments = np.repeat([Segment.PROMPT, Segment.COT, Segment.RESPONSE], [n, m // 2, m - m // 2])
            found.append(
                Example(
                    np.concatenate([prompt, own]),
                    segments.astype(np.int8),
                    f"f:{len(found)}",
                    float(rng.choice([0.5, 1.0, 3.0])),
                )
            )
    order = rng.permutation(len(found))
    return [found[i] for i in order] + [Example(rng.integers(0, 9, 30).astype(np.int32), np.full(30, 3, np.int8), "d")]


def batches(examples, *, share, capacity=128, packs_per_step=2, **more):
    return PackedDataLoader(
        examples,
        pack_capacity=capacity,
        packs_per_step=packs_per_step,
        segment_weights=WEIGHTS,
        seed=1,
        share_prompts=share,
        **{"epochs": 1, "rank": 0, "world_size": 1} | more,
    )


def replies_of(batch):
    """Yield (example, its full ids, [(position, target, weight, segment), …] where supervised) for each reply."""
    spans = list(itertools.pairwise(batch.cu_seqlens_host))
    prefix = batch.prefix or (-1,) * len(spans)
    for (start, end), parent, example in zip(spans, prefix, batch.example_ids, strict=True):
        before = slice(*spans[parent]) if parent >= 0 else slice(0, 0)
        ids = [*batch.input_ids[before].tolist(), *batch.input_ids[start:end].tolist()]
        positions = [*batch.position_ids[before].tolist(), *batch.position_ids[start:end].tolist()]
        assert positions == list(range(len(ids)))
        assert batch.targets[end - 1] == -100
        assert batch.targets[start : end - 1].tolist() == batch.input_ids[start + 1 : end].tolist()
        at = [t for t in batch.loss_positions.tolist() if start <= t < end]
        if example < 0:
            assert not at
            continue
        yield (
            example,
            ids,
            [
                (
                    int(batch.position_ids[t]),
                    int(batch.targets[t]),
                    float(batch.loss_weights[t]),
                    int(batch.segment_ids[t]),
                )
                for t in at
            ],
        )


@given(
    prompts=st.lists(
        st.tuples(st.integers(1, 60), st.lists(st.integers(2, 60), min_size=1, max_size=9)), min_size=1, max_size=8
    ),
    seed=st.integers(0, 9),
    packs_per_step=st.sampled_from([1, 2, 4]),
)
@settings(max_examples=60, deadline=None)
def test_every_reply_is_trained_on_as_without_sharing(prompts, seed, packs_per_step):
    examples = replies(prompts, seed)
    plain, shared = (batches(examples, share=share, packs_per_step=packs_per_step) for share in (False, True))
    found = []
    for whole in (plain, shared):
        packs = [pack for step in range(len(whole)) for pack in whole.step(step) if not pack.is_empty]
        assert all(pack.num_tokens <= 128 for pack in packs)
        assert sum(pack.num_tokens for pack in packs) == whole.tokens_per_epoch
        found.append(sorted(entry for pack in packs for entry in replies_of(pack)))
    assert found[0] == found[1]
    assert [example for example, _, _ in found[1]] == list(range(len(examples)))
    assert all(ids == examples[example].input_ids.tolist() for example, ids, _ in found[1])
    assert shared.packs_per_epoch <= plain.packs_per_epoch
    saved = shared.prompt_sharing.tokens if shared.prompt_sharing else 0
    assert plain.tokens_per_epoch - shared.tokens_per_epoch == saved
    everything = sum(map(len, examples))
    assert shared.totals().tokens + shared.totals().shared_tokens == everything


def test_the_layout_of_a_pack_with_a_shared_prompt():
    """The prompt without its last token is one sequence; each reply begins with a copy of that token."""
    (prompt, first), (_, second) = [(e.input_ids[:20], e) for e in replies([(20, (6, 9))])[:2]]
    longest, other = sorted((first, second), key=len, reverse=True)
    (pack,) = batches([longest, other], share=True, packs_per_step=1).step(0)
    assert pack.cu_seqlens_host == (0, 19, 29, 36)
    assert (pack.prefix, pack.example_ids, pack.max_seqlen) == ((-1, 0, 0), (-1, 0, 1), 19)
    assert pack.input_ids.tolist() == [*prompt[:19], *longest.input_ids[19:], *other.input_ids[19:]]
    assert pack.input_ids[19] == pack.input_ids[29] == prompt[19]
    assert pack.position_ids.tolist() == [*range(29), *range(19, 26)]


def test_prompts_are_not_shared_if_that_saves_nothing():
    short = replies([(MIN_SHARED_TOKENS, (6, 9))])  # one token too short: its last token is not shared
    assert batches(short, share=True).prompt_sharing is None
    assert all(p.prefix is None for p in batches(short, share=True).step(0))
    assert batches(replies([(40, (5,)), (30, (5,)), (50, (9,))]), share=True).prompt_sharing is None
    # pairs of 60 and 40 tokens fill packs of 100; a bundle of the two 40s would take 63, and not fit with a 60
    awkward = replies([(18, (42, 42)), (18, (22, 22))])[:4]
    assert batches(awkward, share=True, capacity=100).prompt_sharing is None
    assert batches(awkward, share=True, capacity=123).prompt_sharing is not None
    supervised_prompt = PackedDataLoader(
        replies([(40, (5, 5))]),
        pack_capacity=128,
        packs_per_step=1,
        seed=0,
        epochs=1,
        rank=0,
        world_size=1,
        segment_weights=(1, 1, 1, 1),
        share_prompts=True,
    )
    assert supervised_prompt.prompt_sharing is None


def test_a_prompt_with_more_replies_than_fit_is_computed_in_each_bundle():
    examples = TokenizedDataset(replies([(50, (30,) * 10)])[:10])
    found = bundle(examples, 128)
    assert np.diff(found.offsets).tolist() == [2] * 5
    assert found.lengths.tolist() == [49 + 2 * 31] * 5
    assert sorted(found.examples.tolist()) == list(range(10))


def test_smaller_bundles_are_used_if_they_fill_packs_better(monkeypatch):
    draw = random.Random(0)
    examples = TokenizedDataset(replies([(20, [draw.randint(30, 60) for _ in range(8)]) for _ in range(60)]))
    packs = {}
    for parts in ((1,), (1, 2, 3, 4)):
        monkeypatch.setattr("delib_fast.data.pack.shared_prompts._PARTS", parts)
        packs[parts] = batches(examples, share=True, capacity=512).packs_per_epoch
    assert packs[(1, 2, 3, 4)] < packs[(1,)] <= batches(examples, share=False, capacity=512).packs_per_epoch


def test_ranks_split_the_same_steps_and_totals_and_costs_are_exact():
    examples = TokenizedDataset(replies([(40, (20, 30, 10, 5)), (25, (9, 9)), (60, (40, 40)), (30, (4,))] * 4))
    whole = batches(examples, share=True, packs_per_step=4, epochs=3, max_steps=7)
    assert whole.steps_per_epoch < 7 < 3 * whole.steps_per_epoch
    ranks = [
        batches(examples, share=True, packs_per_step=4, epochs=3, max_steps=7, rank=r, world_size=4) for r in range(4)
    ]
    for step in range(7):
        assert [r.step(step)[0].example_ids for r in ranks] == [p.example_ids for p in whole.step(step)]
    ids = [i for step in range(7) for i in whole.step_example_ids(step)]
    assert whole.totals().repeats.tolist() == np.bincount(ids, minlength=len(examples)).tolist()
    assert whole.totals().tokens == sum(p.num_tokens for step in range(7) for p in whole.step(step) if not p.is_empty)
    for example in random.Random(0).sample(range(len(examples)), 5):
        without = np.ones(len(examples), bool)
        without[whole.step_example_ids(3)] = False
        without[example] = False
        whole.examples.weights = without.astype(np.float32)
        unsupervised = [s for s in range(7) if not without[whole.step_example_ids(s)].any()]
        with pytest.raises(ValueError, match=f"no token of step {unsupervised[0]} is supervised"):
            whole.refuse_unsupervised_steps()
    cost = whole.cost_of_ranks(0, 1, 0.01)[0]  # each token against all that it sees
    pairs = sum(len(text) ** 2 for pack in whole.step(0) for _, text, _ in replies_of(pack))
    again = sum(
        2 * (end - start) ** 2
        for pack in whole.step(0)
        for (start, end), example in zip(itertools.pairwise(pack.cu_seqlens_host), pack.example_ids, strict=True)
        if example < 0
    )
    heads = sum(
        (end - start) ** 2 * (pack.prefix or ()).count(k)
        for pack in whole.step(0)
        for k, (start, end) in enumerate(itertools.pairwise(pack.cu_seqlens_host))
    )
    tokens = sum(pack.num_tokens for pack in whole.step(0) if not pack.is_empty)
    assert cost == pytest.approx(tokens + 0.01 * (pairs - heads + again / 2))


def test_different_prompts_with_the_same_hash_are_refused():
    examples = TokenizedDataset(replies([(40, (20, 30)), (40, (20, 30))])[:4])
    examples.prompt_keys[:, 1] = 7
    with pytest.raises(ValueError, match=r"f:\d and f:\d have different prompts with the same hash; set share_prompts"):
        batches(examples, share=True, capacity=200, packs_per_step=1).step(0)


def test_evaluation_shares_prompts_and_has_each_reply_once():
    examples = replies([(40, (20, 30, 10, 5)), (25, (9, 9))])
    packs = evaluation_batches(
        examples, pack_capacity=128, segment_weights=(0, 1, 1, 1), rank=0, world_size=1, share_prompts=True
    )
    assert sorted(e for pack in packs for e, _, _ in replies_of(pack)) == list(range(len(examples)))
    assert sum(p.num_tokens for p in packs) < sum(map(len, examples))


@pytest.mark.data
def test_sharing_real_prompts_saves_seven_of_eight_copies(shared_data):
    """Real prompts with eight replies each, encoded with a chat template."""
    lines = (shared_data / "math_cot_100x8.jsonl").read_text().splitlines()[:20]
    rows = [chat(item["question"], None, reply) for item in map(json.loads, lines) for reply in item["code"]]
    encoded = encode_rows(rows, tokenizer("qwen3"), pack_capacity=16384)
    sharing = batches(encoded, share=True, capacity=16384).prompt_sharing
    assert (sharing.prompts, sharing.examples) == (20, 160)
    assert sharing.tokens == 7 * encoded.prompt_keys[::8, 0].sum()
