"""At ZeRO 3 weights are read one by one: the same to the bit as of a model loaded whole, and no rank holds it all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.launch import result_of, run_ranks
from helpers.loopback_hub import cached, hub_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Qwen3Config

SIZES = {
    "vocab_size": 448,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODELS = {
    "tied": Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True),
    "untied, in parts": Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=False),
    "scaled rotary": LlamaConfig(
        **SIZES,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "experts merged": MixtralConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1),
    "renamed": Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True),
    "no safetensors": Qwen3Config(**SIZES, head_dim=8),
    "named by its config": Qwen3Config(**SIZES, head_dim=8),
}


def saved(config, folder, dtype=torch.bfloat16, **options):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder, **options)
    return folder


def rewritten(folder, kind):
    """As others write checkpoints: a trunk's, whose names transformers puts a prefix before; torch's own format; in a
    file that the config names, beside one of the usual name."""
    file = folder / "model.safetensors"
    weights = load_file(file) if file.exists() else {}
    if kind == "renamed":
        save_file({name.removeprefix("model."): weight for name, weight in weights.items()}, file, {"format": "pt"})
    elif kind == "no safetensors":
        file.unlink()
        torch.save(weights, folder / "pytorch_model.bin")
    elif kind == "named by its config":
        save_file({name: w + 1 for name, w in weights.items()}, folder / "other.safetensors", {"format": "pt"})
        config = folder / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"transformers_weights": "other.safetensors"}))


def facts(fork_server, folder, precision, way):
    told = fork_server.run("deferred_worker:main", [folder, precision, way], world_size=2)
    return [result_of(output) for output in told]


@pytest.mark.parametrize("kind", MODELS)
def test_is_what_was_loaded_whole(fork_server, tmp_path, kind):
    folder = saved(MODELS[kind], tmp_path, max_shard_size="50KB" if "parts" in kind else "5GB")
    rewritten(folder, kind)
    deferred, whole = (facts(fork_server, folder, "bf16", way) for way in ("deferred", "whole"))
    for ours, theirs in zip(deferred, whole, strict=True):
        for what in ("weights", "buffers", "tied", "configs", "training"):
            assert ours[what] == theirs[what], what
    assert deferred[0]["conversions"] == whole[0]["conversions"], "an export would have other names"
    assert bool(whole[0]["conversions"]) == (kind == "experts merged")
    why = {"no safetensors": "it has no safetensors", "named by its config": "its config.json names other.safetensors"}
    if kind in why:
        assert f"the first rank loads the whole model into the host's memory: {why[kind]}" in deferred[0]["note"]
    else:
        assert deferred[0]["note"] is None


@pytest.mark.parametrize("offline", [True, False], ids=["in the cache", "fetched, in parts"])
def test_hub_name(fork_server, tmp_path, offline):
    folder = saved(MODELS["untied, in parts"], tmp_path / "model", max_shard_size="5GB" if offline else "50KB")
    (folder / "consolidated.safetensors").write_bytes(b"the same weights, as another library wants them")
    home, worker = tmp_path / "home", str(Path(__file__).with_name("deferred_worker.py"))
    if offline:
        cached(folder, "someone/model", home)
    with hub_of(folder, "someone/model") as (address, fetched):
        told = run_ranks(
            [worker, "someone/model", "bf16", "deferred"],
            2,
            HF_HOME=str(home),
            HF_ENDPOINT=address,
            HF_HUB_OFFLINE=str(int(offline)),
            PYTHONWARNINGS="ignore",
        )
    weights = [file for file in fetched if file.endswith(".safetensors")]
    expected = [] if offline else [file.name for file in folder.glob("model*.safetensors")]
    assert sorted(weights) == sorted(expected), "the first rank alone fetches them, each once"
    for ours, theirs in zip(map(result_of, told), facts(fork_server, folder, "bf16", "whole"), strict=True):
        assert ours["note"] is None
        for what in ("weights", "buffers", "tied", "configs", "training"):
            assert ours[what] == theirs[what], what


LARGE = SIZES | {"vocab_size": 16384, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "largest"),
    [
        (Qwen3Config(**LARGE, head_dim=64, tie_word_embeddings=True), 2.5),
        # halves of what is merged are 32 MiB: less than that glibc keeps when it is freed
        (MixtralConfig(**LARGE | {"intermediate_size": 4096, "num_hidden_layers": 4}, num_local_experts=4), 3),
    ],
    ids=["as they lie", "experts merged"],
)
def test_no_rank_holds_it_all(fork_server, tmp_path, config, largest):
    """A rank's share, and the largest tensor as it was read, in fp32 and in the run's precision, at most twice; while
    it is merged, its parts too."""
    folder = saved(config, tmp_path, dtype=torch.float32)
    whole, deferred = (facts(fork_server, folder, "bf16", way) for way in ("whole", "deferred"))
    for rank in deferred:
        assert rank["peak_mib"] < rank["share_mib"] + largest * rank["largest_mib"] + 8, rank["peak_mib"]
        assert rank["peak_mib"] < 0.6 * min(other["peak_mib"] for other in whole)
