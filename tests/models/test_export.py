"""Export: AutoModelForCausalLM computes the same logits, no pickle, tied weights once, never a partial folder."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.small_models import build, documents, pack, tiny_qwen3
from safetensors import safe_open

TOKENS = torch.arange(40)[None] % 90


@pytest.fixture(scope="module", autouse=True)
def heavy_imports():
    """Import when the first test runs, not when tests are collected."""
    global AutoModelForCausalLM, AutoTokenizer, TrainableLM, build_model, export_model, train_tokenizer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from delib_fast.models import TrainableLM, build_model, export_model, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["Some words, and some more words; words again and again."], 262)


def logits(folder) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder)(TOKENS).logits


@pytest.mark.parametrize("name", ["qwen2", "qwen3 tied, one kv head", "qwen3 sliding", "llama", "qwen3 moe"])
def test_round_trip(name, tokenizer, tmp_path) -> None:
    model = build(name)
    expected = model(TOKENS).logits
    trainable = TrainableLM(model)
    assert export_model(trainable, tokenizer, tmp_path / "out" / "model") == tmp_path / "out" / "model"
    folder = tmp_path / "out" / "model"
    assert torch.equal(logits(folder), expected)
    assert sorted(file.name for file in folder.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert [file.name for file in folder.parent.iterdir()] == ["model"]
    config = json.loads((folder / "config.json").read_text())
    assert config["use_cache"] is True
    assert config["dtype"] == "float32"
    loaded = AutoTokenizer.from_pretrained(folder)
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.get_vocab() == tokenizer.get_vocab()
    trainable(pack(documents())).loss_sum.backward()  # still wrapped, still trains
    assert trainable.model.config.use_cache is False


def test_new_model_round_trip_in_bf16(tokenizer, tmp_path) -> None:
    from delib_fast.config import ModelConfig

    model = build_model(ModelConfig(architecture=tiny_qwen3()), tokenizer, dtype="bf16")
    expected = model(TOKENS).logits
    export_model(TrainableLM(model), tokenizer, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded(TOKENS).logits, expected)
    assert loaded.generation_config.eos_token_id == [2, 0]
    out = loaded.generate(TOKENS[:, :5], max_new_tokens=3, do_sample=False)
    assert out.shape[1] > 5


def test_tied_weights_are_saved_once(tokenizer, tmp_path) -> None:
    model = build("qwen2 tied")
    numbers = sum(parameter.numel() for parameter in model.parameters())
    export_model(TrainableLM(model), tokenizer, tmp_path / "model")
    with safe_open(tmp_path / "model" / "model.safetensors", framework="pt") as tensors:
        names = list(tensors.keys())
        assert sum(tensors.get_tensor(name).numel() for name in names) == numbers
    assert "lm_head.weight" not in names
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("name", ["qwen2", "qwen2 tied"])
@pytest.mark.parametrize("names_of", ["trainable", "model"])
def test_weights_gathered_elsewhere(name, names_of, tokenizer, tmp_path) -> None:
    """fp32 master weights under either set of names, tied ones as separate copies, are saved in the model's dtype."""
    trainable = TrainableLM(build(name)).bfloat16()
    source = trainable if names_of == "trainable" else trainable.model
    gathered = {key: weight.float() + 1 for key, weight in source.state_dict().items()}
    export_model(trainable, tokenizer, tmp_path / "model", state_dict=gathered)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    expected = {key: weight.bfloat16() + 1 for key, weight in trainable.model.state_dict().items()}
    assert loaded.dtype == torch.bfloat16
    for key, weight in loaded.state_dict().items():
        torch.testing.assert_close(weight, expected[key], rtol=0.01, atol=0)


def test_replaces_the_old_folder_whole(tokenizer, tmp_path) -> None:
    folder = tmp_path / "model"
    export_model(TrainableLM(build("llama", seed=0)), tokenizer, folder)
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"stale")
    second = build("llama", seed=1)
    expected = second(TOKENS).logits
    export_model(second, tokenizer, folder)  # a model that is not wrapped
    assert torch.equal(logits(folder), expected)
    assert not (folder / "model-00001-of-00002.safetensors").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_a_failure_keeps_the_old_folder(tokenizer, tmp_path) -> None:
    folder, model = tmp_path / "model", build("llama")
    expected = model(TOKENS).logits
    export_model(model, tokenizer, folder)

    class Broken:
        def save_pretrained(self, folder):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        export_model(build("llama", seed=1), Broken(), folder)
    assert torch.equal(logits(folder), expected)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_rejects_incomplete_weights(tokenizer, tmp_path) -> None:
    model = build("llama")
    weights = model.state_dict()
    part = {key: weight for key, weight in weights.items() if "layers.1.mlp" not in key}
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.down_proj.weight is missing \(3 names differ\); gather"):
        export_model(model, tokenizer, tmp_path / "model", state_dict=part)
    with pytest.raises(ValueError, match=r"strange is not a parameter of it"):
        export_model(model, tokenizer, tmp_path / "model", state_dict=weights | {"strange": torch.ones(1)})
    empty = weights | {"model.norm.weight": torch.empty(0)}
    with pytest.raises(ValueError, match=r"model.norm.weight has shape \(0,\), not \(32,\)"):
        export_model(model, tokenizer, tmp_path / "model", state_dict=empty)
    assert not list(tmp_path.iterdir())


def test_prints_nothing(tokenizer, tmp_path, capfd) -> None:
    """transformers would draw a progress bar; its setting for other code is restored."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    export_model(build("llama"), tokenizer, tmp_path / "model")
    assert capfd.readouterr() == ("", "")
    assert logging.is_progress_bar_enabled() == shown
