"""delib_fast.apply and unapply: the same loss and gradients as transformers' own, and the original model again."""

from __future__ import annotations

import copy
import gc
import json
import logging
import subprocess
import sys

import pytest
import torch
from tiny import MODELS, VOCAB, alone, assert_same, build, gradients, padded, rows

import delib_fast

ALLOWED = 1e-5  # relative, fp32


@pytest.fixture(scope="module", autouse=True)
def heavy_imports():
    """Import when the first test runs, not when tests are collected."""
    global DataCollatorWithFlattening, UnsupportedModelError, WeightedFlattening
    from transformers import DataCollatorWithFlattening

    from delib_fast.integrations.hf import WeightedFlattening
    from delib_fast.models import UnsupportedModelError


def flattened(some, **keys):
    return DataCollatorWithFlattening(**keys)([{k: row[k] for k in ("input_ids", "labels")} for row in some])


def batch_of(shape: str, some) -> dict:
    """The same rows, in each of the forms in which trainers pass them."""
    weightless = {k: v for k, v in padded(some).items() if k != "loss_weights"}
    if shape == "axolotl":  # one row, whose mask numbers the sequences
        batch = flattened(some)
        lengths = torch.tensor([len(row["input_ids"]) for row in some])
        batch["attention_mask"] = torch.repeat_interleave(torch.arange(1, len(some) + 1), lengths)[None]
        return batch
    return {
        "padded": weightless,
        "padded left": {k: v for k, v in padded(some, "left").items() if k in weightless},
        "position_ids": flattened(some),
        "cu_seq_lens": flattened(some, return_flash_attn_kwargs=True),
        "weighted flattening": {k: v for k, v in WeightedFlattening()(some).items() if k != "loss_weights"},
    }[shape]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", ["padded", "position_ids", "cu_seq_lens"])
def test_loss_and_gradients_are_those_of_transformers(name, shape) -> None:
    model = build(name)
    some = rows()
    true_loss, true_gradients = alone(model, some)
    delib_fast.apply(model)
    output = model(**batch_of(shape, some))
    output.loss.backward()
    assert output.logits is None
    assert abs(output.loss.item() / true_loss.item() - 1) <= ALLOWED
    assert_same(gradients(model), true_gradients)


@pytest.mark.parametrize("shape", ["padded left", "axolotl", "weighted flattening"])
def test_other_forms_of_batches(shape) -> None:
    model, some = build(), rows()
    true_loss, true_gradients = alone(model, some)
    delib_fast.apply(model)
    loss = model(**batch_of(shape, some)).loss
    loss.backward()
    torch.testing.assert_close(loss.detach(), true_loss, rtol=ALLOWED, atol=0)
    assert_same(gradients(model), true_gradients)


@pytest.mark.parametrize("options", [{"attention": False}, {"loss": False}], ids=str)
def test_each_half_alone(options) -> None:
    model, some = build(), rows()
    true_loss, true_gradients = alone(model, some)
    delib_fast.apply(model, **options)
    output = model(**batch_of("position_ids", some), use_cache=False)
    output.loss.backward()
    assert (output.logits is None) == options.get("loss", True)
    torch.testing.assert_close(output.loss.detach(), true_loss, rtol=ALLOWED, atol=0)
    assert_same(gradients(model), true_gradients)


@pytest.mark.parametrize("shape", ["padded", "packed"])
def test_weights(shape) -> None:
    model, some = build(), rows()
    true_loss, true_gradients = alone(model, some, weighted=True)
    delib_fast.apply(model)
    loss = model(**(padded(some) if shape == "padded" else WeightedFlattening()(some))).loss
    loss.backward()
    torch.testing.assert_close(loss.detach(), true_loss, rtol=ALLOWED, atol=0)
    assert_same(gradients(model), true_gradients)


def test_denominators() -> None:
    model, some = delib_fast.apply(build()), rows()
    plain = {k: v for k, v in padded(some).items() if k != "loss_weights"}
    count = (plain["labels"][:, 1:] != -100).sum()
    mean = model(**plain).loss
    torch.testing.assert_close(model(**plain, num_items_in_batch=count * 4).loss, mean / 4)
    torch.testing.assert_close(model(**plain, num_items_in_batch=int(count) * 4).loss, mean / 4)
    shifted = torch.nn.functional.pad(plain["labels"][:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(
        model(input_ids=plain["input_ids"], attention_mask=plain["attention_mask"], shift_labels=shifted).loss, mean
    )
    torch.testing.assert_close(
        model(**plain, loss_weights=torch.ones_like(plain["labels"]).float(), loss_normalizer=count.float()).loss, mean
    )
    with pytest.raises(ValueError, match="num_items_in_batch, which counts labels and is not the sum of their weights"):
        model(**padded(some), num_items_in_batch=count)
    with pytest.raises(ValueError, match="loss_weights must have the shape of the labels"):
        model(**plain, loss_weights=torch.ones(3))
    with pytest.raises(ValueError, match="loss_weights need labels"):
        model(input_ids=plain["input_ids"], loss_weights=torch.ones(3))
    nothing = dict(plain, labels=torch.full_like(plain["labels"], -100))
    assert model(**nothing).loss == 0


def test_rejects_labels_after_padding() -> None:
    model, batch = delib_fast.apply(build()), padded(rows())
    batch.pop("loss_weights")
    batch["labels"] = batch["input_ids"]
    with pytest.raises(ValueError, match="labels would be predicted from padding"):
        model(**batch)


def test_packed_rows_are_isolated() -> None:
    model, batch = delib_fast.apply(build()), WeightedFlattening()(rows((9, 8, 7)))
    before = model(**batch).nll[0]
    batch["input_ids"][0, 11] = (batch["input_ids"][0, 11] + 1) % VOCAB
    change = (model(**batch).nll[0] - before).abs()
    assert change[12:17].max() > 1e-3
    assert not change[:9].any()
    assert not change[17:].any()


def test_no_logits_no_mask_and_no_padding() -> None:
    model, some = delib_fast.apply(build()), rows((40, 3, 3))
    seen = []
    model.model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0].shape[1], kwargs["attention_mask"])), with_kwargs=True
    )
    head_shapes = []
    model.lm_head.register_forward_hook(lambda _, args, output: head_shapes.append(output[0].shape))
    model(**padded(some))
    assert seen == [(46, None)]
    assert head_shapes == [torch.Size([])]


def test_a_call_with_labels_returns_the_hidden_states_that_it_requests() -> None:
    """As transformers does; the attention weights too, for which such a call runs the model's own attention."""
    model = build("llama").eval()
    model.set_attn_implementation("eager")
    batch = {name: value for name, value in padded(rows()).items() if name != "loss_weights"}
    expected = model(**batch, output_hidden_states=True, output_attentions=True)
    delib_fast.apply(model)
    got = model(**batch, output_hidden_states=True, output_attentions=True)
    kept = batch["attention_mask"].bool()
    assert len(got.hidden_states) == len(expected.hidden_states)
    for one, other in zip(got.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(one[kept], other[kept])
    assert len(got.attentions) == len(expected.attentions)
    torch.testing.assert_close(got.loss, expected.loss)


def test_without_labels_the_model_is_unchanged() -> None:
    model = build().eval()
    batch = {k: v for k, v in padded(rows(), "left").items() if k in ("input_ids", "attention_mask")}
    before = model(**batch).logits
    words = model.generate(**batch, max_new_tokens=6, do_sample=False, pad_token_id=0)
    delib_fast.apply(model)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(model(**batch).logits[real], before[real], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(**batch, use_cache=False).logits[real], before[real], rtol=1e-5, atol=1e-5)
    assert model(**batch, output_hidden_states=True).hidden_states[0].shape[:2] == batch["input_ids"].shape
    assert torch.equal(model.generate(**batch, max_new_tokens=6, do_sample=False, pad_token_id=0), words)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_unapply_restores_everything(attention) -> None:
    model = build("qwen2 tied")
    model.set_attn_implementation(attention)
    batch = {k: v for k, v in padded(rows()).items() if k != "loss_weights"}
    parts = (model, model.model, model.lm_head)

    def state():
        return (
            [dict(vars(p)) for p in parts],
            [id(m) for m in model.modules()],
            [id(p) for p in model.parameters()],
            [m.config._attn_implementation for m in parts[:2]],
            model.config.to_dict(),
        )

    before, logits = state(), model(**batch).logits
    with delib_fast.applied(model) as same:
        assert same is model
        model(**batch).loss.backward()
        assert model.config._attn_implementation == f"delib_fast_or_{attention}"
    assert state() == before
    assert torch.equal(model(**batch).logits, logits)
    with pytest.raises(ValueError, match="was not applied"):
        delib_fast.unapply(model)
    delib_fast.apply(model)
    with pytest.raises(ValueError, match="was already applied to this Qwen2ForCausalLM; unapply it first"):
        delib_fast.apply(model)


def test_unapply_beneath_a_wrapper(caplog) -> None:
    """accelerate wraps forward for mixed precision, and never unwraps it."""
    model = build()
    batch = {k: v for k, v in padded(rows()).items() if k != "loss_weights"}
    logits = model(**batch).logits
    delib_fast.apply(model)
    ours = model.forward
    model.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    with caplog.at_level(logging.WARNING, "delib_fast"):
        delib_fast.unapply(model)
    assert "was wrapped by test_patching after delib_fast patched it" in caplog.text
    assert torch.equal(model(**batch).logits, logits)


def test_unapplying_a_copy_leaves_the_original_patched() -> None:
    model = delib_fast.apply(build())
    batch = padded(rows())
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.lm_head.weight.zero_()
    assert abs(copied(**batch).loss.item() - torch.tensor(float(VOCAB)).log().item()) < 1e-5
    delib_fast.unapply(copied)
    assert model(**batch).logits is None


def test_activation_checkpointing_recomputes_the_pack() -> None:
    model, some = build(), rows()
    _, true_gradients = alone(model, some)
    delib_fast.apply(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss = model(**batch_of("position_ids", some)).loss
    model.eval()(input_ids=torch.arange(5)[None])  # a call without labels in between changes nothing
    model.train()
    loss.backward()
    assert_same(gradients(model), true_gradients)


def lora(model, **keys):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, **keys))


@pytest.mark.parametrize("first", ["peft", "apply"])
def test_peft(first) -> None:
    torch.manual_seed(3)
    model = lora(build(), target_modules=["q_proj", "v_proj", "down_proj"])
    plain = {k: v for k, v in padded(rows()).items() if k != "loss_weights"}
    expected = model(**plain).loss
    expected.backward()
    true_gradients = {k: v.clone() for k, v in gradients(model).items()}
    model.zero_grad()
    delib_fast.apply(model if first == "peft" else model.get_base_model())
    output = model(**plain)
    output.loss.backward()
    assert output.logits is None
    torch.testing.assert_close(output.loss, expected, rtol=ALLOWED, atol=0)
    assert_same(gradients(model), true_gradients)
    delib_fast.unapply(model)
    assert torch.equal(model(**plain).loss, expected)


def test_rejects_unsupported_models_and_options() -> None:
    with pytest.raises(UnsupportedModelError, match="output head of Qwen3ForCausalLM is wrapped by an adapter"):
        delib_fast.apply(lora(build(), target_modules=["q_proj", "lm_head"]))
    other = build("gemma2, capped logits")
    other.config.logit_scale = 0.5  # a key that this architecture does not read
    with pytest.raises(UnsupportedModelError, match=r"that its config describes \({'logit_scale': 0.5, 'soft"):
        delib_fast.apply(other)
    for layers in ("auto", "fast"):
        with pytest.raises(ValueError, match=f"layers='{layers}' does not exist; choose from eager, compile, liger"):
            delib_fast.apply(build(), layers=layers)
    with pytest.raises(ValueError, match="Linear is not a transformers model"):
        delib_fast.apply(torch.nn.Linear(2, 2))
    model = delib_fast.apply(build())
    with pytest.raises(ValueError, match="logits_to_keep"):
        model(input_ids=torch.arange(4)[None], labels=torch.arange(4)[None], logits_to_keep=1)


def test_compiled_layers_of_a_peft_model(monkeypatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr("delib_fast.models.layers.BACKEND", "aot_eager")
    model = lora(build(), target_modules=["q_proj", "up_proj"])
    true_loss, true_gradients = alone(model, rows())
    with delib_fast.applied(model, layers="compile"):
        for lengths in ((5, 9), (13, 2, 7, 30, 3, 11)):  # the first pass of a block is not compiled
            model.zero_grad()
            loss = model(**batch_of("weighted flattening", rows(lengths))).loss
            loss.backward()
    torch.testing.assert_close(loss.detach(), true_loss, rtol=1e-5, atol=0)
    assert_same(gradients(model), true_gradients)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_model_saved_while_applied_loads_without_delib_fast(tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    model = delib_fast.apply(build())
    model.save_pretrained(tmp_path)
    assert "delib_fast" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.arange(9)[None]
    delib_fast.unapply(model)
    torch.testing.assert_close(loaded(tokens).logits, model.eval()(tokens).logits)


def test_apply_keeps_no_reference_to_the_model() -> None:
    import weakref

    model = delib_fast.apply(build())
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_import_stays_light() -> None:
    code = """import sys, delib_fast, delib_fast.ops
print([m for m in ("transformers", "trl", "peft") if m in sys.modules])"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
