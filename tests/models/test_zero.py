"""TrainableLM under DeepSpeed ZeRO on two real ranks: the same weights as one process with the whole batch."""

from __future__ import annotations

import pytest
import torch
from helpers.launch import result_of, run_ranks
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero")
    command = ["tests/models/zero_worker.py", str(folder)]
    # PYTHONWARNINGS: thousands of deprecation warnings would hide an error.
    output = run_ranks(command, 2, DS_ACCELERATOR="cpu", PYTHONWARNINGS="ignore")[0]
    return result_of(output), folder


@pytest.mark.parametrize(
    "run",
    [
        "qwen3 tied, one kv head, ZeRO 0, 0 layers checkpointed, eager",
        "qwen3 tied, one kv head, ZeRO 3, 0 layers checkpointed, eager",
        "qwen3 tied, one kv head, ZeRO 3, 3 layers checkpointed, eager",
        "llama, ZeRO 3, 3 layers checkpointed, eager",
        "llama, ZeRO 3, 2 layers checkpointed, eager",
        "qwen3 tied, one kv head, ZeRO 3, 0 layers checkpointed, compile",
        "qwen3 tied, one kv head, ZeRO 3, 3 layers checkpointed, compile",
        "llama, ZeRO 3, 2 layers checkpointed, compile",
    ],
)
def test_weights_after_three_steps(outcome, run) -> None:
    """A compiled block is one graph, also with the weights that ZeRO 3 gathers and frees around it."""
    deviation, graphs = outcome[0][run]
    assert deviation < 1e-6
    assert graphs == (1 if run.endswith("compile") else 0)


def test_gathered_weights_are_exported(outcome) -> None:
    stage0, stage3 = (load_file(outcome[1] / number / "model.safetensors") for number in ("0", "1"))
    assert stage0.keys() == stage3.keys()
    assert "lm_head.weight" not in stage0
    for key, weight in stage0.items():
        torch.testing.assert_close(stage3[key], weight, rtol=1e-5, atol=1e-6)
