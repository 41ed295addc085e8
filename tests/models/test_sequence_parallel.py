"""Sequence parallelism: a pack is sharded across 1, 2 or 4 ranks, and loss and gradients stay the same.

The reference is transformers alone, one unpacked document at a time, so that a wrapper that gathers the tokens but
ignores the documents' boundaries (as DeepSpeed's does with sdpa and flex) would be far off.
"""

from __future__ import annotations

import pytest
from helpers.launch import result_of, run_ranks
from helpers.small_models import documents, pack


@pytest.fixture(scope="module")
def results():
    output = run_ranks(["tests/models/sequence_worker.py"], 4, PYTHONWARNINGS="ignore")[0]
    return result_of(output)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    "case",
    [
        "qwen3",
        "qwen3 tied, one kv head",
        "mistral sliding",
        "mimo, sinks and small values",
        "phi3, longrope",
        "checkpointed",
        "shared prompt",
    ],
)
def test_loss_and_gradients(results, case, size):
    """With 2 kv heads on 4 ranks, or 1 on 2 and 4, kv heads are copied and their gradients summed."""
    assert results[f"{case} {size}"] <= 1e-5


def test_uneven_masks(results):
    """The first shard has no supervised token, but takes part in every collective; the last shard is padded."""
    assert [tokens for tokens, _ in results["shards"]] == [12, 12, 12, 9]
    assert results["shards"][0][1] == 0
    assert all(supervised > 0 for _, supervised in results["shards"][1:])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_empty_pack(results, size):
    assert results[f"nothing supervised {size}"] == [1.0, 0.0]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_isolation_check_sees_a_leak(results, size):
    assert results[f"leak {size}"].startswith("packed documents leak")


def test_rejects_heads_that_cannot_be_split(results):
    from delib_fast.models.ulysses import why_not

    assert "4 query heads and 3 kv heads cannot be split across 4 ranks" in results["three kv heads"]
    assert results["six heads"].endswith("set engine.sequence_parallel to 1 or 2 or 6")
    assert why_not(64, 8, 16) is None
    assert why_not(64, 8, 12) == (
        "64 query heads and 8 kv heads cannot be split across 12 ranks; set "
        "engine.sequence_parallel to 1 or 2 or 4 or 8 or 16 or 32 or 64"
    )


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 64])
def test_shards_joined_are_the_pack(size):
    """Every token, target and weight is in one shard, also with more shards than tokens; padding is at the end."""
    whole = pack(documents((13, 1, 24, 7)))
    shards = [whole.shard_of(rank, size) for rank in range(size)]
    assert sum(shard.num_tokens for shard in shards) == 45
    share = len(shards[0].input_ids)
    for name in ("input_ids", "targets", "loss_weights", "segment_ids", "position_ids"):
        joined = [value for shard in shards for value in getattr(shard, name).tolist()]
        assert joined[:45] == getattr(whole, name).tolist()
        assert all(getattr(shard, name).dtype == getattr(whole, name).dtype for shard in shards)
    assert [
        rank * share + at for rank, shard in enumerate(shards) for at in shard.loss_positions.tolist()
    ] == whole.loss_positions.tolist()
    padding = size * share - 45
    for shard in shards:
        assert shard.cu_seqlens_host == (0, 13, 14, 38, 45) + ((45 + padding,) if padding else ())
        assert shard.cu_seqlens.tolist() == list(shard.cu_seqlens_host)
        assert shard.max_seqlen == max(24, padding)
