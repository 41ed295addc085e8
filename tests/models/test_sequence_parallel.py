"""Sequence parallelism: 1, 2 or 4 ranks share out a pack, and nothing of the loss or the gradients changes.

The truth is stock transformers, one document at a time and unpacked, so that a wrapper which gathers the tokens and
forgets the documents' borders (as DeepSpeed's does with sdpa and flex) would be far off.
"""

from __future__ import annotations

import pytest
from helpers.launch import result_of, run_ranks
from small_models import documents, pack

from delib_fast.models.ulysses import why_not


@pytest.fixture(scope="module")
def found():
    output = run_ranks(["tests/models/sequence_worker.py"], 4, PYTHONWARNINGS="ignore")[0]
    return result_of(output)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    "case", ["qwen3", "qwen3 tied, one kv head", "mistral sliding", "checkpointed", "shared prompt"]
)
def test_loss_and_gradients(found, case, size):
    """2 kv heads for 4 ranks, and 1 for 2 and 4: copied, their gradients summed."""
    assert found[f"{case} {size}"] <= 1e-5


def test_uneven_masks(found):
    """The first part has no supervised token, and still takes part in every collective; the last one is padded."""
    assert [tokens for tokens, _ in found["parts"]] == [12, 12, 12, 9]
    assert found["parts"][0][1] == 0
    assert all(supervised > 0 for _, supervised in found["parts"][1:])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_empty_pack(found, size):
    assert found[f"nothing supervised {size}"] == [1.0, 0.0]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_isolation_check_sees_a_leak(found, size):
    assert found[f"leak {size}"].startswith("packed documents leak")


def test_refuses(found):
    assert "4 query heads and 3 kv heads can't be shared out over 4 ranks" in found["three kv heads"]
    assert found["six heads"].endswith("set engine.sequence_parallel to 1 or 2 or 6")
    assert why_not(64, 8, 16) is None
    assert why_not(64, 8, 12) == (
        "64 query heads and 8 kv heads can't be shared out over 12 ranks; set "
        "engine.sequence_parallel to 1 or 2 or 4 or 8 or 16 or 32 or 64"
    )


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 64])
def test_parts_put_together_are_the_pack(size):
    """Also where there are more parts than tokens: every token, target and weight once, padding at the end alone."""
    whole = pack(documents((13, 1, 24, 7)))
    parts = [whole.shard_of(rank, size) for rank in range(size)]
    assert sum(part.num_tokens for part in parts) == 45
    share = len(parts[0].input_ids)
    for name in ("input_ids", "targets", "loss_weights", "segment_ids", "position_ids"):
        joined = [value for part in parts for value in getattr(part, name).tolist()]
        assert joined[:45] == getattr(whole, name).tolist()
        assert all(getattr(part, name).dtype == getattr(whole, name).dtype for part in parts)
    assert [
        rank * share + at for rank, part in enumerate(parts) for at in part.loss_positions.tolist()
    ] == whole.loss_positions.tolist()
    padding = size * share - 45
    for part in parts:
        assert part.cu_seqlens_host == (0, 13, 14, 38, 45) + ((45 + padding,) if padding else ())
        assert part.cu_seqlens.tolist() == list(part.cu_seqlens_host)
        assert part.max_seqlen == max(24, padding)
