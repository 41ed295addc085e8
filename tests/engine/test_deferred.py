"""At ZeRO 3 weights are read one by one: the same to the bit as of a model loaded whole, and no rank holds it all."""

from __future__ import annotations

import pytest
import torch
from launch import result_of
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Qwen3Config

SIZES = {"vocab_size": 448, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2}
MODELS = {
    "tied": Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True),
    "untied, in parts": Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=False),
    "scaled rotary": LlamaConfig(**SIZES, rope_scaling={
        "rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 32}),
    "converted": MixtralConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1),
}


def saved(config, folder, dtype=torch.bfloat16, **options):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder, **options)
    return folder


def facts(fork_server, folder, precision, way):
    told = fork_server.run("deferred_worker:main", [folder, precision, way], world_size=2)
    return [result_of(output) for output in told]


@pytest.mark.parametrize("kind", MODELS)
def test_is_what_was_loaded_whole(fork_server, tmp_path, kind):
    folder = saved(MODELS[kind], tmp_path, max_shard_size="50KB" if "parts" in kind else "5GB")
    deferred, whole = (facts(fork_server, folder, "bf16", way) for way in ("deferred", "whole"))
    for ours, theirs in zip(deferred, whole, strict=True):
        for what in ("weights", "buffers", "tied", "configs", "training"):
            assert ours[what] == theirs[what], what
    assert (deferred[0]["note"] is None) == (kind != "converted")
    if kind == "converted":
        assert "transformers converts the checkpoints of MixtralForCausalLM" in deferred[0]["note"]


@pytest.mark.slow
def test_no_rank_holds_it_all(fork_server, tmp_path):
    """A rank's share, and the largest tensor as it was read, in fp32 and in the run's precision, at most twice."""
    config = Qwen3Config(**SIZES | {"vocab_size": 16384, "hidden_size": 512, "intermediate_size": 2048,
                                    "num_hidden_layers": 8}, head_dim=64, tie_word_embeddings=True)
    folder = saved(config, tmp_path, dtype=torch.float32)
    whole, deferred = (facts(fork_server, folder, "bf16", way) for way in ("whole", "deferred"))
    for rank in deferred:
        assert rank["peak_mib"] < rank["share_mib"] + 2.5 * rank["largest_mib"] + 8, rank["peak_mib"]
        assert rank["peak_mib"] < 0.6 * min(other["peak_mib"] for other in whole)
