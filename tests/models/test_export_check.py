"""The check of an export: it names a tensor that differs, and sees what only the logits show."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.small_models import build, pack
from safetensors.torch import load_file, save_file

from delib_fast.config import LoraConfig

CPU = torch.device("cpu")
DOCUMENTS = [torch.arange(5, 45), torch.arange(60, 90)]


@pytest.fixture(scope="module", autouse=True)
def heavy_imports():
    """Import when the first test runs, not when tests are collected."""
    global TrainableLM, check, export_model, tokenizer
    from delib_fast.models import TrainableLM, export_check, export_model, train_tokenizer

    check = export_check
    tokenizer = train_tokenizer(["Some words, and some more words; words again and again."], 262)


def exported(tmp_path, name="qwen2", dtype=torch.float32):
    """A model in training, and its export."""
    module = TrainableLM(build(name).to(dtype))
    return module, export_model(module, tokenizer, tmp_path / "model")


def compare(module, folder):
    weights = {key: weight.float() for key, weight in module.model.state_dict().items()}
    return check.compare_weights(check.reload_model(folder), module.model, weights)


def change(folder, edit):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("qwen2", torch.bfloat16),
        ("qwen2 tied", torch.float32),
        ("qwen2 tied", torch.bfloat16),
        ("qwen3 moe", torch.float32),
    ],
)
def test_an_export_has_every_weight_bitwise(tmp_path, name, dtype):
    module, folder = exported(tmp_path, name, dtype)
    names = {key for key, _ in module.model.named_parameters()}
    assert compare(module, folder) == len(names)


@pytest.mark.parametrize("name", ["qwen2", "qwen2 tied"])
def test_a_changed_value_is_named(tmp_path, name):
    module, folder = exported(tmp_path, name)

    def edit(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] += 1e-6

    change(folder, edit)
    with pytest.raises(
        check.ExportCheckError, match=r"1 of the 1,536 values of model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        compare(module, folder)


def test_a_missing_or_an_unknown_tensor_is_named(tmp_path):
    module, folder = exported(tmp_path)
    change(folder, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(check.ExportCheckError, match=r"model lacks model\.norm\.weight \(1 in all\)"):
        compare(module, folder)
    change(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(32), "extra": torch.ones(1)}))
    with pytest.raises(check.ExportCheckError, match=r"model has an unknown tensor extra"):
        compare(module, folder)


def test_nan_is_equal_to_nan(tmp_path):
    model = build("qwen2")
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    module = TrainableLM(model)
    assert compare(module, export_model(module, tokenizer, tmp_path / "model")) > 0


def trained(module) -> list[torch.Tensor]:
    """Logits as the model in training computes them: all documents in one pack, through the fused head."""
    batch = pack([(document, torch.ones(len(document))) for document in DOCUMENTS])
    logits = check.trained_logits(module, lambda: module.eval()(batch))
    assert not module.head._forward_pre_hooks
    return list(logits.split([len(document) for document in DOCUMENTS]))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("qwen2", torch.bfloat16),
        ("qwen2 tied", torch.float32),
        ("qwen3 sliding", torch.float32),
        ("qwen3 moe", torch.bfloat16),
        ("gemma2, capped logits", torch.float32),
        ("cohere, scaled logits", torch.float32),
    ],
)
def test_logits_of_training_and_of_the_export_agree(tmp_path, name, dtype):
    module, folder = exported(tmp_path, name, dtype)
    found = check.compare_logits(trained(module), check.stock_logits(check.reload_model(folder), DOCUMENTS, CPU))
    assert found.typical <= check.TOLERANCE[dtype] / 4
    assert found.typical <= found.largest


@pytest.mark.parametrize(
    ("key", "value"),
    [("rope_parameters", {"rope_theta": 100.0, "rope_type": "default"}), ("rms_norm_eps", 0.5), ("hidden_act", "relu")],
)
def test_logits_show_a_changed_config(tmp_path, key, value):
    """All weights are equal, but the reloaded model computes something else."""
    module, folder = exported(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    assert key in config
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    compare(module, folder)
    found = check.compare_logits(trained(module), check.stock_logits(check.reload_model(folder), DOCUMENTS, CPU))
    assert found.typical > 1.5 * check.TOLERANCE[torch.bfloat16]


def test_logits_show_an_untied_head(tmp_path):
    module, folder = exported(tmp_path, "qwen2 tied")
    reloaded = check.reload_model(folder)
    reloaded.lm_head.weight = torch.nn.Parameter(reloaded.lm_head.weight * 1.01 + 0.1)
    found = check.compare_logits(trained(module), check.stock_logits(reloaded, DOCUMENTS, CPU))
    assert found.typical > check.TOLERANCE[torch.float32]


def test_logits_of_another_vocabulary_are_refused():
    with pytest.raises(check.ExportCheckError, match=r"logits have the shape \(3, 5\) in the folder, and \(3, 4\)"):
        check.compare_logits([torch.zeros(3, 4)], [torch.zeros(3, 5)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_lost_effect_of_an_adapter(dtype, share):
    """Merges leave out a known share of an adapter, also where the whole effect is as small as the rounding."""
    from delib_fast.models import add_adapter, merged_weights

    model = build("qwen2").to(dtype)
    base = {key: weight.clone() for key, weight in model.state_dict().items()}
    add_adapter(model, LoraConfig(r=4, alpha=8), base=None, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "lora_B" in key:
                weight.copy_(
                    torch.randn(weight.shape, generator=generator) * (0.02 if dtype is torch.bfloat16 else 1e-4)
                )
    module = TrainableLM(model)
    ours = trained(module)
    stock = module.unpatch()
    adapted = check.stock_logits(stock, DOCUMENTS, CPU)
    merged = merged_weights(stock, stock.state_dict())
    plain = build("qwen2").to(dtype)
    plain.load_state_dict(base)
    without = check.stock_logits(plain, DOCUMENTS, CPU)
    assert check.compare_logits(ours, adapted).typical <= check.TOLERANCE[dtype]
    plain.load_state_dict({k: (w.float() * (1 - share) + base[k].float() * share).to(dtype) for k, w in merged.items()})
    lost = check.lost_effect(check.stock_logits(plain, DOCUMENTS, CPU), ours, without, adapted)
    assert lost == pytest.approx(share, abs=0.02 if dtype is torch.float32 else 0.08)


def test_an_effect_below_the_rounding_errors_is_not_judged():
    noise = torch.randn(50, 60, generator=torch.Generator().manual_seed(0))
    adapted = [torch.zeros(50, 60)]
    assert check.lost_effect(adapted, [noise], [adapted[0] + 0.01], adapted) is None
