"""A few real steps with HF Trainer, TRL's SFTTrainer and axolotl's hooks, with and without delib_fast."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import logging
import sys
from types import ModuleType

import pytest
import torch
from tiny import VOCAB, alone, build, padded, rows

import delib_fast

ALLOWED = 1e-5  # relative, fp32
STEPS, BATCH, ACCUMULATED = 3, 3, 2
COMMON = {
    "max_steps": STEPS,
    "per_device_train_batch_size": BATCH,
    "gradient_accumulation_steps": ACCUMULATED,
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "logging_steps": 1,
    "report_to": [],
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 1,
    "max_grad_norm": 0.0,
}
# SGD, since Adam magnifies rounding; unequal lengths, so that a mean of means would show.
LENGTHS = (13, 2, 7, 30, 3, 11, 5, 19, 23, 4, 8, 40, 6, 17, 9, 12, 21, 10)


@pytest.fixture(scope="module", autouse=True)
def heavy_imports():
    """Import when the first test runs, not when tests are collected."""
    global Dataset, Trainer, TrainingArguments, hf, is_applied
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    from delib_fast.integrations import hf
    from delib_fast.integrations.patching import is_applied


@pytest.fixture
def data() -> Dataset:
    return Dataset.from_list(rows(LENGTHS))


def weightless(some) -> dict:
    return {
        k: v
        for k, v in padded([{"loss_weights": [1.0] * len(r["input_ids"]), **r} for r in some]).items()
        if k != "loss_weights"
    }


def trained(trainer) -> tuple[list[float], dict[str, torch.Tensor]]:
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS
    return losses, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_same_run(ours, theirs) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=ALLOWED)
    for name, weight in ours[1].items():
        torch.testing.assert_close(weight, theirs[1][name], rtol=ALLOWED, atol=ALLOWED, msg=name)


def hf_trainer(tmp_path, data, collator, model=None, **keys) -> Trainer:
    arguments = TrainingArguments(str(tmp_path), **COMMON, **keys)
    return Trainer(model=model or build(), args=arguments, train_dataset=data, data_collator=collator)


@pytest.mark.parametrize("form", ["padded", "packed"])
def test_hf_trainer_gives_the_same_run(form, data, tmp_path) -> None:
    from transformers import DataCollatorWithFlattening

    collator = weightless if form == "padded" else DataCollatorWithFlattening()
    data = data.remove_columns("loss_weights")
    expected = trained(hf_trainer(tmp_path, data, collator))
    assert_same_run(trained(hf.prepare(hf_trainer(tmp_path, data, collator))), expected)


@pytest.mark.parametrize("extra", [{"gradient_checkpointing": True}, {"torch_empty_cache_steps": 1}], ids=str)
def test_hf_trainer_with_a_patched_lora_model(extra, data, tmp_path) -> None:
    """Applied to a PEFT model, before the trainer is created."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    wrapped = get_peft_model(build(), LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    data = data.remove_columns("loss_weights")
    expected = trained(hf_trainer(tmp_path, data, weightless, copy.deepcopy(wrapped), **extra))
    ours = trained(hf.prepare(hf_trainer(tmp_path, data, weightless, delib_fast.apply(wrapped), **extra)))
    assert_same_run(ours, expected)


def test_weights_reach_the_loss(data, tmp_path) -> None:
    """The first step's loss is Σ w·nll / Σ w over all accumulated batches, whatever their share."""
    trainer = hf.prepare(hf_trainer(tmp_path, data, hf.WeightedFlattening()))
    model, order = copy.deepcopy(trainer.model), []
    collate = trainer.data_collator
    trainer.data_collator = lambda some: (order.extend(some), collate(some))[1]
    first = trained(trainer)[0][0]
    delib_fast.unapply(model)
    assert first == pytest.approx(alone(model, order[: BATCH * ACCUMULATED], weighted=True)[0].item(), rel=ALLOWED)


def test_a_prepared_trainer_evaluates(data, tmp_path) -> None:
    trainer = hf.prepare(hf_trainer(tmp_path, data, hf.WeightedFlattening(), per_device_eval_batch_size=18))
    model = copy.deepcopy(trainer.model)
    delib_fast.unapply(model)
    assert trainer.evaluate(data)["eval_loss"] == pytest.approx(
        alone(model, list(data), weighted=True)[0].item(), rel=ALLOWED
    )


def test_weights_need_a_prepared_trainer(data, tmp_path) -> None:
    trainer = hf_trainer(tmp_path, data, hf.WeightedFlattening(), delib_fast.apply(build()))
    with pytest.raises(ValueError, match=r"counts labels and is not the sum of their weights.*hf\.prepare"):
        trainer.train()


def test_hf_rejects(data, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"label_smoothing_factor is 0\.1"):
        hf.prepare(hf_trainer(tmp_path, data, weightless, label_smoothing_factor=0.1))
    trainer = hf_trainer(tmp_path, data, weightless)
    trainer.compute_loss_func = lambda *_, **__: 0
    with pytest.raises(ValueError, match="compute_loss_func"):
        hf.prepare(trainer)
    with pytest.raises(ValueError, match="row 0 of the batch has 3 input_ids and 2 loss_weights"):
        hf.WeightedFlattening()([{"input_ids": [1, 2, 3], "loss_weights": [1.0, 1.0]}])
    batch = hf.WeightedFlattening()(rows((3,)))
    trainer = hf.prepare(hf_trainer(tmp_path, data, weightless))
    with pytest.raises(ValueError, match="some batches of a step have loss_weights and some do not"):
        trainer._get_num_items_in_batch([batch, weightless(rows((3,)))], "cpu")


# --- TRL ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w2", unk_token="w0")


def prepare_sft(trainer):
    from delib_fast.integrations import trl

    return trl.prepare(trainer)


def sft_trainer(tmp_path, data, tokenizer, model=None, collator=None, **keys):
    from trl import SFTConfig, SFTTrainer

    keys = {
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "max_length": None,
        "bf16": False,
        "gradient_checkpointing": False,
        **keys,
    }
    return SFTTrainer(
        model=model or build(),
        args=SFTConfig(str(tmp_path), **COMMON, **keys),
        train_dataset=data,
        data_collator=collator,
        processing_class=tokenizer,
    )


@pytest.fixture
def no_trl_loss(monkeypatch) -> None:
    from trl.trainer import utils

    def forbidden(*_):
        raise AssertionError("TRL's own loss was computed")

    monkeypatch.setattr(utils._ChunkedLogProbFunction, "apply", forbidden)


@pytest.mark.parametrize("keys", [{}, {"padding_free": True}, {"gradient_checkpointing": True}], ids=str)
@pytest.mark.parametrize("applied_first", [False, True])
def test_sft_trainer_gives_the_same_run(keys, applied_first, data, tokenizer, tmp_path, monkeypatch, request) -> None:
    data = data.remove_columns("loss_weights")
    theirs = sft_trainer(tmp_path, data, tokenizer, **keys)
    expected = trained(theirs)
    request.getfixturevalue("no_trl_loss")
    trainer = sft_trainer(tmp_path, data, tokenizer, delib_fast.apply(build()) if applied_first else None, **keys)
    assert_same_run(trained(prepare_sft(trainer)), expected)
    for mine, other in zip(trainer.state.log_history[:STEPS], theirs.state.log_history[:STEPS], strict=True):
        for metric in ("mean_token_accuracy", "num_tokens"):
            assert mine[metric] == pytest.approx(other[metric], rel=1e-6), metric
    trained_weight = trainer.model.lm_head.weight
    delib_fast.unapply(trainer.model)
    assert "forward" not in vars(trainer.model)
    assert trainer.model.lm_head.weight is trained_weight


def test_sft_packing(tokenizer, tmp_path, no_trl_loss) -> None:
    """TRL packs and marks where sequences start; its own sdpa mask separates them too, so the losses agree."""
    data = Dataset.from_list([{"input_ids": row["input_ids"]} for row in rows(LENGTHS * 3)])
    keys = {"packing": True, "max_length": 64, "dataset_kwargs": None}
    trainer = prepare_sft(sft_trainer(tmp_path, data, tokenizer, **keys))
    batch = next(iter(trainer.get_train_dataloader()))
    model = copy.deepcopy(trainer.model)
    ours = model(**batch).loss
    delib_fast.unapply(model)
    batch = {k: v for k, v in batch.items() if "seq" not in k and "max" not in k}
    torch.testing.assert_close(ours, model(**batch, use_cache=False).loss, rtol=ALLOWED, atol=0)
    trained(trainer)


def test_weights_through_sft_trainer(data, tokenizer, tmp_path, no_trl_loss) -> None:
    trainer = sft_trainer(tmp_path, data, tokenizer, collator=hf.WeightedFlattening())
    prepare_sft(trainer)
    model, order = copy.deepcopy(trainer.model), []
    collate = trainer.data_collator
    trainer.data_collator = lambda some: (order.extend(some), collate(some))[1]
    first = trained(trainer)[0][0]
    delib_fast.unapply(model)
    assert first == pytest.approx(alone(model, order[: BATCH * ACCUMULATED], weighted=True)[0].item(), rel=ALLOWED)


def test_sft_rejects(data, tokenizer, tmp_path) -> None:
    trainer = sft_trainer(tmp_path, data.remove_columns("loss_weights"), tokenizer, loss_type="dft")
    with pytest.raises(ValueError, match="loss_type is 'dft'"):
        prepare_sft(trainer)


# --- axolotl: with its own plugin manager if it is installed (`pip install --no-deps axolotl addict` is enough; axolotl
# pins many packages), and always with a fake of its protocol -------------------------------------------------------


@pytest.fixture(params=["fake", "axolotl"])
def plugin(request, monkeypatch):
    name = "delib_fast.integrations.axolotl"
    monkeypatch.delitem(sys.modules, name, raising=False)
    if request.param == "axolotl":
        if importlib.util.find_spec("axolotl") is None:
            pytest.skip("axolotl is not installed")
        from axolotl.integrations.base import BasePlugin, PluginManager

        manager = PluginManager.get_instance()
        manager.register(f"{name}.Plugin")
        assert manager.get_input_args() == [f"{name}.Args"]
        loaded = manager.plugins.pop(f"{name}.Plugin")
        assert isinstance(loaded, BasePlugin)
        yield loaded
    else:
        base = ModuleType("axolotl.integrations.base")
        base.BasePlugin = type("BasePlugin", (), {})
        for part, module in {
            "axolotl": ModuleType("axolotl"),
            base.__name__: base,
            "axolotl.integrations": ModuleType("axolotl.integrations"),
        }.items():
            monkeypatch.setitem(sys.modules, part, module)
        yield importlib.import_module(name).Plugin()
    del sys.modules[name]


def test_axolotl_hooks_in_their_order(plugin, data, tmp_path) -> None:
    module_name, class_name = plugin.get_input_args().rsplit(".", 1)
    arguments = getattr(sys.modules[module_name], class_name)()
    assert list(arguments.model_dump().values()) == [True, True, "eager"]
    cfg, model, data = dict(arguments), build(), data.remove_columns("loss_weights")
    expected = trained(hf_trainer(tmp_path, data, weightless))
    plugin.register(cfg)
    plugin.post_model_load(cfg, model)
    assert is_applied(model)
    trainer = hf_trainer(tmp_path, data, weightless, model)
    plugin.post_trainer_create(cfg, trainer)
    assert_same_run(trained(trainer), expected)
    plugin.post_train(cfg, model)
    assert not is_applied(model)


def test_axolotl_rejects_conflicting_keys(plugin) -> None:
    with pytest.raises(ValueError, match="cut_cross_entropy is on, and so is delib_fast's loss"):
        plugin.register({"cut_cross_entropy": True})
    plugin.register({"cut_cross_entropy": True, "delib_fast_loss": False})
    model = build()
    plugin.post_model_load({"delib_fast_loss": False}, model)
    assert model(input_ids=torch.arange(4)[None], labels=torch.arange(4)[None]).logits is not None


def test_a_call_that_cannot_be_a_pack_is_logged(caplog) -> None:
    model = delib_fast.apply(build())
    with caplog.at_level(logging.INFO, "delib_fast"):
        model(input_ids=torch.arange(4)[None], labels=torch.arange(4)[None], output_hidden_states=True)
    assert "runs with its own attention: it requests output_hidden_states" in caplog.text
