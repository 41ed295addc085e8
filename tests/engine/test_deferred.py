"""At ZeRO 3, weights are read one by one. They equal those of a model loaded whole, and no rank holds all of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.launch import result_of, run_ranks
from helpers.loopback_hub import cached, hub_of
from safetensors.torch import load_file, save_file

SIZES = {
    "vocab_size": 448,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
KINDS = (
    "tied",
    "untied, in parts",
    "scaled rotary",
    "experts merged",
    "renamed",
    "named by its config",
)


def architecture(kind, **sizes):
    """The configuration of a small model. `sizes` replace those of SIZES."""
    from transformers import LlamaConfig, MixtralConfig, Qwen3Config

    sizes = SIZES | sizes
    if kind == "scaled rotary":
        scaling = {
            "rope_type": "llama3",
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 32,
        }
        return LlamaConfig(**sizes, rope_scaling=scaling)
    if kind == "experts merged":
        return MixtralConfig(**{"num_local_experts": 2, "num_experts_per_tok": 1} | sizes)
    return Qwen3Config(**{"head_dim": 8, "tie_word_embeddings": kind in ("tied", "renamed")} | sizes)


def saved(config, folder, dtype=torch.bfloat16, **options):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder, **options)
    return folder


def rewritten(folder, kind):
    """Rewrite a checkpoint in a form that other programs write.

    These forms are names without transformers' prefix; torch's own format; and a file that the config names, next to
    one with the usual name.
    """
    file = folder / "model.safetensors"
    weights = load_file(file) if file.exists() else {}
    if kind == "renamed":
        save_file({name.removeprefix("model."): weight for name, weight in weights.items()}, file, {"format": "pt"})
    elif kind == "named by its config":
        save_file({name: w + 1 for name, w in weights.items()}, folder / "other.safetensors", {"format": "pt"})
        config = folder / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"transformers_weights": "other.safetensors"}))


def facts(fork_server, folder, precision, way):
    outputs = fork_server.run("deferred_worker:main", [folder, precision, way], world_size=2)
    return [result_of(output) for output in outputs]


@pytest.mark.parametrize("kind", KINDS)
def test_deferred_weights_equal_a_model_loaded_whole(fork_server, tmp_path, kind):
    folder = saved(architecture(kind), tmp_path, max_shard_size="50KB" if "parts" in kind else "5GB")
    rewritten(folder, kind)
    deferred, whole = (facts(fork_server, folder, "bf16", way) for way in ("deferred", "whole"))
    for ours, theirs in zip(deferred, whole, strict=True):
        for what in ("weights", "buffers", "tied", "configs", "training"):
            assert ours[what] == theirs[what], what
    assert deferred[0]["conversions"] == whole[0]["conversions"], "otherwise an export would have other names"
    assert bool(whole[0]["conversions"]) == (kind == "experts merged")
    if kind == "named by its config":
        why = "its config.json names other.safetensors"
        assert f"the first rank loads the whole model into host memory: {why}" in deferred[0]["note"]
    else:
        assert deferred[0]["note"] is None


@pytest.mark.parametrize("offline", [True, False], ids=["in the cache", "downloaded, in parts"])
def test_a_hub_model_is_downloaded_once_and_equals_a_local_one(fork_server, tmp_path, offline):
    folder = saved(architecture("untied, in parts"), tmp_path / "model", max_shard_size="5GB" if offline else "50KB")
    (folder / "consolidated.safetensors").write_bytes(b"the same weights in the format of another library")
    home, worker = tmp_path / "home", str(Path(__file__).with_name("deferred_worker.py"))
    if offline:
        cached(folder, "someone/model", home)
    with hub_of(folder, "someone/model") as (address, fetched):
        outputs = run_ranks(
            [worker, "someone/model", "bf16", "deferred"],
            2,
            HF_HOME=str(home),
            HF_ENDPOINT=address,
            HF_HUB_OFFLINE=str(int(offline)),
            PYTHONWARNINGS="ignore",
        )
    weights = [file for file in fetched if file.endswith(".safetensors")]
    expected = [] if offline else [file.name for file in folder.glob("model*.safetensors")]
    assert sorted(weights) == sorted(expected), "only the first rank downloads them, each once"
    for ours, theirs in zip(map(result_of, outputs), facts(fork_server, folder, "bf16", "whole"), strict=True):
        assert ours["note"] is None
        for what in ("weights", "buffers", "tied", "configs", "training"):
            assert ours[what] == theirs[what], what


LARGE = {"vocab_size": 16384, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "sizes", "largest"),
    [
        ("tied", {"head_dim": 64}, 2.5),
        # The halves of a merged tensor have 32 MiB: small enough that glibc keeps them when they are freed.
        ("experts merged", {"intermediate_size": 4096, "num_hidden_layers": 4, "num_local_experts": 4}, 3),
    ],
    ids=["as stored", "experts merged"],
)
def test_no_rank_holds_the_whole_model(fork_server, tmp_path, kind, sizes, largest):
    """A rank holds its shard, and the largest tensor twice: in fp32, as it was read, and in the run's precision. While
    a tensor is merged, it also holds the parts."""
    options = {"num_experts_per_tok": 2} if kind == "experts merged" else {}
    folder = saved(architecture(kind, **LARGE | sizes | options), tmp_path, dtype=torch.float32)
    whole, deferred = (facts(fork_server, folder, "bf16", way) for way in ("whole", "deferred"))
    for rank in deferred:
        assert rank["peak_mib"] < rank["share_mib"] + largest * rank["largest_mib"] + 8, rank["peak_mib"]
        assert rank["peak_mib"] < 0.6 * min(other["peak_mib"] for other in whole)
