"""An adapter under DeepSpeed: what is frozen stays, what is trained is fp32, and a resume is exact, dropout too."""

from __future__ import annotations

import pytest
from helpers.launch import result_of, run_ranks

CASES = [(precision, stage) for precision in ("fp32", "bf16") for stage in (0, 1, 2, 3)]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    first = run_ranks(["tests/engine/lora_worker.py", str(tmp_path_factory.mktemp("lora"))], 2)[0]
    return result_of(first)


@pytest.mark.parametrize(("precision", "stage"), CASES)
def test_adapter_trains_and_resumes(found, precision, stage):
    case = f"{precision} z{stage}"
    assert found[f"{case} resumed"] == 0.0
    assert found[f"{case} moved"] == [".lora_"], "the base must not move by a bit, and the adapter must move"
    assert found[f"{case} saved"], "a checkpoint of an adapter holds no frozen weight"
    base = "torch.float32" if precision == "fp32" else "torch.bfloat16"
    assert found[f"{case} dtypes"] == ["adapter torch.float32", f"base {base}"]
