"""PackedBatch and PackedDataLoader: targets, weights, sequence boundaries, the order of steps, and ranks."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from delib_fast.data import (
    IGNORE_INDEX,
    Example,
    PackedDataLoader,
    TokenizedDataset,
    empty_pack,
    evaluation_batches,
    plan_packs,
)
from delib_fast.data.pack.epochs import bucket_by_cost, pack_costs
from delib_fast.data.pack.packing import seeded_permutation

WEIGHTS = (0.0, 0.5, 1.0, 2.0)


def make(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Example(
            rng.integers(0, 1000, n).astype(np.int32),
            rng.integers(0, 4, n).astype(np.int8),
            f"f:{i}",
            float(rng.choice([0.5, 1.0, 3.0])),
        )
        for i, n in enumerate(lengths)
    ]


def batches(examples, *, rank=0, world_size=1, packs_per_step=4, capacity=64, seed=1, epochs=2, **more):
    return PackedDataLoader(
        examples,
        pack_capacity=capacity,
        packs_per_step=packs_per_step,
        segment_weights=WEIGHTS,
        seed=seed,
        epochs=epochs,
        rank=rank,
        world_size=world_size,
        **more,
    )


def check(batch, examples):
    """Compare all fields of a batch with their definition, token by token."""
    at = 0
    spans = itertools.pairwise(batch.cu_seqlens_host)
    for i, (start, end) in zip(batch.example_ids, spans, strict=True):
        example = examples[i]
        assert (start, end) == (at, at + len(example))
        for k in range(len(example)):
            token = at + k
            assert batch.input_ids[token] == example.input_ids[k]
            assert batch.position_ids[token] == k
            if k + 1 < len(example):
                assert batch.targets[token] == example.input_ids[k + 1]
                assert batch.segment_ids[token] == example.segments[k + 1]
                assert batch.loss_weights[token] == np.float32(WEIGHTS[example.segments[k + 1]] * example.weight)
            else:
                assert batch.targets[token] == IGNORE_INDEX
                assert batch.segment_ids[token] == 0
                assert batch.loss_weights[token] == 0
        at = end
    assert batch.num_tokens == at == len(batch.input_ids)
    assert batch.cu_seqlens.tolist() == list(batch.cu_seqlens_host)
    assert batch.max_seqlen == max(np.diff(batch.cu_seqlens_host))
    supervised = (batch.loss_weights > 0) & (batch.targets != IGNORE_INDEX)
    assert batch.loss_positions.tolist() == supervised.nonzero()[:, 0].tolist()
    for name in ("input_ids", "targets", "position_ids", "loss_positions"):
        assert getattr(batch, name).dtype == torch.int64
    assert [batch.loss_weights.dtype, batch.segment_ids.dtype, batch.cu_seqlens.dtype] == [
        torch.float32,
        torch.int8,
        torch.int32,
    ]


@given(
    lengths=st.lists(st.integers(1, 64), min_size=1, max_size=60),
    seed=st.integers(0, 9),
    packs_per_step=st.sampled_from([1, 2, 4, 8]),
    epochs=st.integers(1, 3),
)
@settings(max_examples=40, deadline=None)
def test_an_epoch_has_every_example_once_with_correct_tokens(lengths, seed, packs_per_step, epochs):
    examples = make([*lengths, 5], seed)
    all_steps = batches(examples, packs_per_step=packs_per_step, epochs=epochs, seed=seed)
    assert all_steps.num_steps == len(all_steps) == epochs * all_steps.steps_per_epoch
    assert all_steps.tokens_per_epoch == sum(map(len, examples))
    for epoch in range(epochs):
        trained_on = []
        for step in range(epoch * all_steps.steps_per_epoch, (epoch + 1) * all_steps.steps_per_epoch):
            assert all_steps.epoch_of(step) == epoch
            packs = all_steps.step(step)
            assert len(packs) == packs_per_step
            ids = [i for pack in packs for i in pack.example_ids]
            assert ids == all_steps.step_example_ids(step)
            trained_on += ids
            for pack in packs:
                assert pack.num_tokens <= 64
                if not pack.is_empty:
                    check(pack, examples)
        assert sorted(trained_on) == list(range(len(examples)))


def test_the_last_example_of_the_dataset_ends_correctly():
    examples = make([7])
    (pack,) = batches(examples, packs_per_step=1).step(0)
    check(pack, examples)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_steps_do_not_depend_on_the_world_size(world_size):
    examples = make(np.random.default_rng(3).integers(1, 64, 300))
    alone = batches(examples, packs_per_step=8)
    ranks = [batches(examples, packs_per_step=8, rank=r, world_size=world_size) for r in range(world_size)]
    assert {r.num_steps for r in ranks} == {alone.num_steps}
    for step in range(alone.num_steps):
        shares = [r.step(step) for r in ranks]
        assert {len(share) for share in shares} == {8 // world_size}
        everywhere = [shares[p % world_size][p // world_size].example_ids for p in range(8)]
        assert everywhere == [pack.example_ids for pack in alone.step(step)]


def test_steps_can_be_requested_in_any_order():
    examples = make(np.random.default_rng(3).integers(1, 64, 300))
    forward = batches(examples, epochs=4)
    expected = [forward.step_example_ids(i) for i in range(forward.num_steps)]
    for step in (forward.num_steps - 1, 0, forward.num_steps // 2, 1):
        assert batches(examples, epochs=4).step_example_ids(step) == expected[step]
    backward = batches(examples, epochs=4)
    assert [backward.step_example_ids(i) for i in range(forward.num_steps)][::-1] == expected[::-1]


def test_the_order_and_the_packs_change_with_seed_and_epoch():
    examples = make(np.random.default_rng(3).integers(1, 64, 300))
    one, other = batches(examples, seed=1), batches(examples, seed=2)
    assert one.step_example_ids(0) != other.step_example_ids(0)
    assert one.step_example_ids(0) != one.step_example_ids(one.steps_per_epoch)
    assert one.num_steps == other.num_steps


def test_the_order_of_examples_is_pinned():
    """The order for a given seed must never change, since a resumed run depends on it."""
    assert batches(make(range(1, 20))).step_example_ids(0) == [
        15,
        14,
        13,
        12,
        5,
        11,
        10,
        8,
        7,
        6,
        4,
        3,
        2,
        1,
        0,
        18,
        17,
        16,
        9,
    ]


def test_a_short_last_step_is_filled_with_empty_packs():
    examples = make([64] * 5)
    everything = batches(examples, packs_per_step=4, rank=1, world_size=2)
    assert everything.steps_per_epoch == 2
    assert [pack.is_empty for pack in everything.step(1)] == [True, True]
    assert [pack.is_empty for pack in batches(examples, packs_per_step=4).step(3)] == [False, True, True, True]
    empty = empty_pack()
    assert (empty.num_tokens, empty.num_supervised, empty.max_seqlen) == (1, 0, 1)
    assert (empty.targets == IGNORE_INDEX).all()
    assert empty.loss_weights.sum() == 0
    assert len(empty.loss_positions) == 0


@pytest.mark.parametrize("packs", [1, 7, 8, 9, 300])
def test_packs_of_similar_cost_share_a_step(packs):
    rng = np.random.default_rng(0)
    lengths = [n for _ in range(packs) for n in ([64] if rng.random() < 0.3 else [16] * 4)]
    examples = make(lengths)
    even = batches(examples, packs_per_step=8, quadratic_cost=0.1, epochs=2)
    for epoch in range(2):
        steps = range(epoch * even.steps_per_epoch, (epoch + 1) * even.steps_per_epoch)
        assert sorted(i for s in steps for i in even.step_example_ids(s)) == list(range(len(examples)))
        kinds = [{lengths[i] for i in even.step_example_ids(s)} for s in steps]
        assert sum(len(kind) > 1 for kind in kinds) <= 2  # at most where one kind ends, and in the incomplete step
        if packs == 300:  # and the order of the steps is still shuffled
            assert sum(a != b for a, b in itertools.pairwise(kinds)) > 4
    shares = [batches(examples, packs_per_step=8, quadratic_cost=0.1, rank=r, world_size=4) for r in range(4)]
    for step in range(even.num_steps):
        parts = [share.step(step) for share in shares]
        everywhere = [parts[p % 4][p // 4].example_ids for p in range(8)]
        assert everywhere == [pack.example_ids for pack in even.step(step)]


def test_bucketing_balances_the_cost_of_ranks():
    """Compare the maximum with the mean cost of 32 ranks that take one 64k pack each, for long chains of thought."""
    rng = np.random.default_rng(0)
    lengths = np.clip(np.exp(rng.normal(np.log(6000), 0.9, 100_000)), 64, 65536).astype(np.int64)
    plan = plan_packs(lengths, 65536)
    q = 28 * 2048 / 1.7e9  # Qwen3-1.7B: layers × attention width / parameters
    costs = pack_costs(plan, lengths, q)
    random_order = seeded_permutation(plan.num_packs, 0)

    def imbalance(order):
        steps = costs[order[: len(order) // 32 * 32]].reshape(-1, 32)
        return (steps.max(1) / steps.mean(1)).mean()

    assert imbalance(random_order) > 1.3
    assert imbalance(bucket_by_cost(random_order, costs, 32, 0)) < 1.005


def test_loss_average_example_gives_each_example_the_same_weight():
    lengths = [3, 60, 17, 40]
    examples = [
        Example(np.arange(n, dtype=np.int32), np.full(n, 2, np.int8), "f:1", w)
        for n, w in zip(lengths, [1.0, 1.0, 1.0, 2.0], strict=True)
    ]
    examples.append(
        Example(np.arange(5, dtype=np.int32), np.zeros(5, np.int8), "f:1")
    )  # without a target of weight above 0

    def weight_by_example(loss_average):
        packs = batches(examples, packs_per_step=2, epochs=1, loss_average=loss_average).step(0)
        return {
            i: float(pack.loss_weights[start:end].sum())
            for pack in packs
            for i, (start, end) in zip(pack.example_ids, itertools.pairwise(pack.cu_seqlens_host), strict=True)
        }

    assert weight_by_example("token") == {0: 2, 1: 59, 2: 16, 3: 78, 4: 0}
    assert weight_by_example("example") == pytest.approx({0: 29, 1: 29, 2: 29, 3: 58, 4: 0})
    with pytest.raises(ValueError, match="loss_average is 'row'; it must be 'token' or 'example'"):
        batches(examples, loss_average="row")


def test_max_steps_limits_the_number_of_steps():
    examples = make([64] * 8)
    assert batches(examples, max_steps=3, epochs=5).num_steps == 3
    assert batches(examples, max_steps=100, epochs=5).num_steps == 10
    with pytest.raises(IndexError, match="step 3 of 3"):
        batches(examples, max_steps=3, epochs=5).step(3)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_evaluation_has_each_example_once_and_the_same_number_of_packs_on_every_rank(world_size):
    examples = TokenizedDataset(make(np.random.default_rng(3).integers(1, 64, 50)))
    shares = [
        evaluation_batches(examples, pack_capacity=64, segment_weights=WEIGHTS, rank=r, world_size=world_size)
        for r in range(world_size)
    ]
    assert len({len(share) for share in shares}) == 1
    assert sorted(i for share in shares for pack in share for i in pack.example_ids) == list(range(50))
    for pack in shares[0]:
        check(pack, examples)


def test_to_device_keeps_all_fields():
    examples = make([5, 9, 30])
    (pack,) = batches(examples, packs_per_step=1, capacity=64).step(0)
    moved = pack.to("cpu")
    check(moved, examples)
    assert (moved.cu_seqlens_host, moved.example_ids) == (pack.cu_seqlens_host, pack.example_ids)
    assert pack.to("meta").input_ids.device.type == "meta"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"packs_per_step": 3, "world_size": 2},
            "3 packs per step cannot be divided evenly among 2 ranks: set "
            "tokens_per_step to a multiple of pack_capacity × 2 (the nearest is 4 packs)",
        ),
        ({"packs_per_step": 1, "world_size": 4}, "1 packs per step cannot be divided evenly among 4 ranks"),
        ({"rank": 2, "world_size": 2}, "rank 2 of world_size 2 does not exist"),
        ({"segment_weights": (0, 1, 1)}, "segment_weights is [0, 1, 1]; it must be four finite numbers ≥ 0"),
        (
            {"segment_weights": (0, -1, 1, 1)},
            "it must be four finite numbers ≥ 0, for PROMPT, COT, RESPONSE and DOCUMENT",
        ),
        ({"segment_weights": (0, float("nan"), 1, 1)}, "four finite numbers"),
        ({"pack_capacity": 16}, "example 1 has 30 tokens, more than the pack capacity 16"),
        (
            {"segment_weights": (1, 0, 0, 0)},
            "no token is supervised: segment_weights is [1.0, 0.0, 0.0, 0.0] (for PROMPT, COT, RESPONSE and DOCUMENT), "
            "and the segments in the data are RESPONSE",
        ),
    ],
)
def test_invalid_arguments_raise(change, message):
    examples = [Example(np.arange(n, dtype=np.int32), np.full(n, 2, np.int8), "f:1") for n in (5, 30)]
    arguments = {
        "pack_capacity": 64,
        "packs_per_step": 4,
        "segment_weights": WEIGHTS,
        "seed": 0,
        "epochs": 1,
        "rank": 0,
        "world_size": 1,
    } | change
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        PackedDataLoader(examples, **arguments)
    assert message in str(caught.value)


def test_the_first_token_of_an_example_is_not_a_target():
    example = Example(np.arange(3, dtype=np.int32), np.array([2, 0, 0], np.int8), "f:1")
    with pytest.raises(ValueError, match="no token is supervised"):
        batches([example])


def test_prefetched_steps_equal_the_steps():
    whole = batches(make(range(1, 60)), packs_per_step=2)
    prefetched = list(whole.from_step(3))
    assert len(prefetched) == whole.num_steps - 3
    for step, packs in enumerate(prefetched, start=3):
        assert [p.example_ids for p in packs] == [p.example_ids for p in whole.step(step)]
        assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(packs, whole.step(step), strict=True))
