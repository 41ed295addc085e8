"""An adapter under DeepSpeed: frozen weights stay unchanged, trained ones are fp32, and a resume is exact, with
dropout."""

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
    assert found[f"{case} moved"] == [".lora_"], "the base must stay bitwise identical, and the adapter must change"
    assert found[f"{case} saved"], "a checkpoint of an adapter has no frozen weights"
    base = "torch.float32" if precision == "fp32" else "torch.bfloat16"
    assert found[f"{case} dtypes"] == ["adapter torch.float32", f"base {base}"]
