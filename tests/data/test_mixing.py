"""Mixing: which examples an epoch contains, for any repeats, limits and shares."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from delib_fast.data import Example, TokenizedDataset, mix_sources

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=40).map(lambda n: np.array(n, np.int64))


def mixed(lengths, repeat=None, caps=None, mix=None, seed=0):
    return mix_sources(
        lengths,
        repeat={name: 1.0 for name in lengths} | (repeat or {}),
        max_tokens={name: None for name in lengths} | (caps or {}),
        mix=mix or {},
        seed=seed,
    )


def test_every_example_is_drawn_once_by_default():
    lengths = {"a": np.array([3, 4]), "b": np.array([5, 6, 7])}
    chosen, shares = mixed(lengths)
    assert chosen.tolist() == [0, 1, 2, 3, 4]
    assert [(s.drawn, s.drawn_tokens, s.times) for s in shares] == [(2, 7, 1.0), (3, 18, 1.0)]


@given(LENGTHS, st.floats(0.2, 4.0), st.integers(0, 5))
def test_a_repeat_is_exact_to_less_than_one_example(n, repeat, seed):
    try:
        chosen, (share,) = mixed({"a": n}, repeat={"a": repeat}, seed=seed)
    except ValueError:
        assert n.sum() * repeat < n.min()
        return
    times = np.bincount(chosen, minlength=len(n))
    assert times.max() - times.min() <= 1
    budget = n.sum() * repeat
    assert share.drawn_tokens == n[chosen].sum() <= budget + 1e-6
    left = n[times == times.min()] if times.max() > times.min() else n
    assert budget - share.drawn_tokens < left.min() + 1


@given(LENGTHS, LENGTHS, st.floats(0.05, 0.95))
def test_a_mix_has_the_requested_shares(a, b, share):
    try:
        _, shares = mixed({"a": a, "b": b}, mix={"a": share, "b": 1 - share})
    except ValueError:
        return
    epoch = min(a.sum() / share, b.sum() / (1 - share))
    for s, n, part in zip(shares, (a, b), (share, 1 - share), strict=True):
        assert part * epoch - n.max() - 1 < s.drawn_tokens <= part * epoch * (1 + 1e-9)
        assert s.times <= 1 + 1e-9
    assert sum(s.share for s in shares) == pytest.approx(1)


def test_max_tokens_and_repeat_limit_the_epoch():
    ones = np.ones(1000, np.int64)
    _, (a, b) = mixed({"a": ones, "b": ones}, repeat={"a": 3.0}, caps={"b": 500}, mix={"a": 3, "b": 1})
    assert (a.drawn_tokens, b.drawn_tokens) == (1500, 500)
    assert (a.wanted, b.wanted) == (0.75, 0.25) == (a.share, b.share)


def test_the_random_part_depends_on_the_seed_only():
    n = {"a": np.full(100, 7)}
    first, again, other = (mixed(n, repeat={"a": 0.3}, seed=seed)[0].tolist() for seed in (1, 1, 2))
    assert first == again != other


def test_a_budget_below_one_example_is_refused():
    with pytest.raises(
        ValueError, match="source 'a' has a budget of 3 tokens in an epoch, fewer than its shortest example"
    ):
        mixed({"a": np.array([10, 20])}, repeat={"a": 0.1})


def test_joined_and_taken_datasets_have_the_same_examples():
    def some(n, base):
        return TokenizedDataset(
            [Example(np.arange(k, dtype=np.int32) + base, np.full(k, 2, np.int8), f"{base}:{k}") for k in range(2, n)]
        )

    sets = [some(5, 100), some(4, 200)]
    joined = TokenizedDataset.join(sets)
    assert [e.location for e in joined] == [e.location for s in sets for e in s]
    taken = joined.take(np.array([4, 0, 4]))
    assert [e.location for e in taken] == ["200:3", "100:2", "200:3"]
    assert [e.input_ids[0] for e in taken] == [200, 100, 200]
    ids, _ = taken.gather(np.array([2, 1]))
    assert ids.tolist() == [200, 201, 202, 100, 101]
    assert (joined.counts.examples, joined.counts.tokens) == (5, 14)
