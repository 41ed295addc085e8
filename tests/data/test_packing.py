"""plan_packs: every example once, no pack above the capacity, and the compiled planner equals the reference."""

import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from delib_fast.data.pack.packing import MAX_CAPACITY, _compiled, _plan_in_python, plan_packs, seeded_permutation

BACKENDS = [
    pytest.param("cpp", marks=pytest.mark.skipif(_compiled() is None, reason="delib_fast._C is not built")),
    "python",
]


@st.composite
def lengths_and_capacity(draw):
    # 64, 4096 and 262144 are where the integer set of the compiled planner gets another level
    capacity = draw(st.sampled_from([1, 2, 7, 63, 64, 65, 4095, 4096, 4097, 262143, 262145]))
    longest = draw(st.sampled_from([capacity, max(1, capacity // 3), min(capacity, 5)]))
    return draw(st.lists(st.integers(1, longest), min_size=1, max_size=300)), capacity


def count_best_fit_packs(lengths, capacity):
    """Count the packs of best-fit decreasing with a naive quadratic implementation."""
    spaces = []
    for length in sorted(lengths, reverse=True):
        fitting = [s for s in spaces if s >= length]
        if fitting:
            spaces.remove(min(fitting))
            spaces.append(min(fitting) - length)
        else:
            spaces.append(capacity - length)
    return len(spaces)


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=lengths_and_capacity(), seed=st.integers(0, 2**64 - 1))
@example(case=([1], 1), seed=0)
@example(case=([5] * 300, 7), seed=1)
@settings(max_examples=150, deadline=None)
def test_each_example_is_packed_once_within_the_capacity(backend, case, seed):
    lengths, capacity = case
    plan = plan_packs(lengths, capacity, seed=seed, backend=backend)
    assert sorted(plan.examples.tolist()) == list(range(len(lengths)))
    sizes = [sum(lengths[i] for i in plan.pack(p)) for p in range(plan.num_packs)]
    assert max(sizes) <= capacity
    assert min(np.diff(plan.pack_offsets)) >= 1
    assert plan.num_packs == count_best_fit_packs(lengths, capacity)
    assert plan.fill == pytest.approx(sum(lengths) / (plan.num_packs * capacity))
    again = plan_packs(
        np.asarray(lengths, np.int16 if capacity < 2**15 else np.int64), capacity, seed=seed, backend=backend
    )
    assert np.array_equal(again.examples, plan.examples)
    assert np.array_equal(again.pack_offsets, plan.pack_offsets)


@pytest.mark.skipif(_compiled() is None, reason="delib_fast._C is not built")
@given(case=lengths_and_capacity(), seed=st.integers(0, 2**64 - 1))
@settings(max_examples=200, deadline=None)
def test_compiled_plan_is_the_reference_plan(case, seed):
    lengths, capacity = case
    values = np.asarray(lengths, np.int32)
    offsets, examples = _plan_in_python(values, capacity, seed)
    plan = plan_packs(lengths, capacity, seed=seed, backend="cpp")
    assert np.array_equal(plan.pack_offsets, offsets)
    assert np.array_equal(plan.examples, examples)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_seed_changes_the_packs_but_not_their_number(backend):
    lengths = np.random.default_rng(0).integers(1, 50, 2000)
    plans = [plan_packs(lengths, 200, seed=seed, backend=backend) for seed in range(4)]
    assert len({plan.num_packs for plan in plans}) == 1
    packs_of_plan = [{frozenset(p.pack(i).tolist()) for i in range(p.num_packs)} for p in plans]
    assert len(packs_of_plan[0] & packs_of_plan[1]) < 0.2 * len(packs_of_plan[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_packs_are_nearly_full_at_scale(backend):
    """Best fit over the whole dataset wastes almost nothing. bench/bench_packing.py measures 1M examples."""
    rng = np.random.default_rng(0)
    lengths = np.clip(np.exp(rng.normal(np.log(6000), 0.9, 100_000)), 64, 32768).astype(np.int64)
    assert plan_packs(lengths, 32768, backend=backend).fill > 0.9997


def test_the_largest_capacity_is_supported():
    plan = plan_packs([MAX_CAPACITY, 1, MAX_CAPACITY - 1, 2], MAX_CAPACITY)
    assert plan.num_packs == 3
    assert [plan.pack(i).tolist() for i in range(3)] == [[0], [2, 1], [3]]


@pytest.mark.parametrize(
    ("lengths", "capacity", "message"),
    [
        ([3, 0, 4], 8, "the length of example 1 is 0; an example must have at least one token"),
        ([3, -2, -5], 8, "the length of example 1 is negative (-2) (2 such lengths); an example must have at least"),
        (
            [3, 9, 4],
            8,
            "example 1 has 9 tokens, more than the pack capacity 8: raise pack_capacity, or drop or split it first",
        ),
        ([2**40], 8, "example 0 has 1099511627776 tokens, more than the pack capacity 8"),
        ([], 8, "there is nothing to pack: lengths is empty"),
        ([1.5], 8, "lengths must be integers, not float64"),
        ([[1, 2]], 8, "lengths must have one dimension, not shape (1, 2)"),
        ([1], 0, "pack capacity is 0; it must be in 1 … 16777216 tokens"),
        ([1], 2**24 + 1, "pack capacity is 16777217; it must be in 1 … 16777216 tokens"),
    ],
)
def test_invalid_arguments_raise(lengths, capacity, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plan_packs(lengths, capacity)


def test_an_unknown_backend_raises():
    with pytest.raises(ValueError, match="packing backend 'rust' is unknown; use 'auto', 'cpp' or 'python'"):
        plan_packs([1], 2, backend="rust")


def test_without_a_compiler_auto_uses_python_and_cpp_is_refused(monkeypatch):
    from delib_fast.data.pack import packing

    monkeypatch.setattr(packing, "_compiled", lambda: None)
    assert plan_packs([3, 2, 1], 4).num_packs == 2
    with pytest.raises(ValueError, match="packing backend 'cpp' is not available"):
        plan_packs([1], 2, backend="cpp")


@given(N=st.integers(1, 3000), seed=st.integers(0, 2**64 - 1))
@settings(max_examples=100, deadline=None)
def test_seeded_permutation_is_a_permutation(N, seed):
    assert sorted(seeded_permutation(N, seed).tolist()) == list(range(N))


def test_seeded_permutation_is_pinned():
    """These numbers must never change, since a resumed run depends on them."""
    assert seeded_permutation(10, 7).tolist() == [7, 0, 6, 3, 9, 5, 8, 2, 1, 4]
