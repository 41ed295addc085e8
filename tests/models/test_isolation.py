"""The check before training: models that isolate sequences pass, and every known way of leaking is caught."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.small_models import build


@pytest.fixture(scope="module", autouse=True)
def heavy_imports():
    """Import when the first test runs, not when tests are collected."""
    global AutoConfig, AutoModelForCausalLM, LeakError, TrainableLM, attention, check_isolation, packed_inputs
    from transformers import AutoConfig, AutoModelForCausalLM

    from delib_fast.models import LeakError, TrainableLM, attention, check_isolation
    from delib_fast.models.attention import packed_inputs


@pytest.mark.parametrize("name", ["qwen2 tied", "qwen3 sliding", "llama", "qwen3 moe", "gemma3 text"])
def test_isolating_models_pass(name) -> None:
    check_isolation(TrainableLM(build(name)), "cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_isolating_models_pass_in_other_dtypes(dtype) -> None:
    check_isolation(TrainableLM(build("qwen3 sliding")).to(dtype), "cpu")


def test_passes_at_the_usual_initialisation() -> None:
    """With weights of std 0.02, a token hardly changes the loss of the next one."""
    config = AutoConfig.for_model(
        "llama", vocab_size=512, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    check_isolation(TrainableLM(AutoModelForCausalLM.from_config(config)).bfloat16(), "cpu")


def test_restores_the_model() -> None:
    trainable = TrainableLM(build("qwen3")).train()
    state = torch.get_rng_state()
    check_isolation(trainable, "cpu")
    assert trainable.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in trainable.parameters())


def test_passes_through_a_wrapper() -> None:
    class Wrapper(torch.nn.Module):
        def __init__(self, module) -> None:
            super().__init__()
            self.module = module

        def forward(self, batch):
            return self.module(batch)

    check_isolation(Wrapper(TrainableLM(build("llama"))), "cpu")
    with pytest.raises(TypeError, match="takes a TrainableLM or a module around one, not Linear"):
        check_isolation(torch.nn.Linear(1, 1), "cpu")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("how", ["mask of ones", "cache"])
def test_catches_attention_of_transformers(attention, how, monkeypatch) -> None:
    """The two ways in which transformers' own attention leaks with positions that restart."""
    trainable = TrainableLM(build("qwen3"))
    trainable.model.set_attn_implementation(attention)
    if how == "cache":
        cached = {"use_cache": True, "attention_mask": None}
        monkeypatch.setattr(
            "delib_fast.models.lm.packed_inputs", lambda batch, backend, _: packed_inputs(batch, backend) | cached
        )
    with pytest.raises(LeakError, match=r"changing token 3 of sequence 1 changes the loss of the sequences after it"):
        check_isolation(trainable, "cpu")


def no_boundaries(batch, *_):
    """As if cu_seqlens were lost."""
    return packed_inputs(
        replace(batch, cu_seqlens=batch.cu_seqlens[[0, -1]], cu_seqlens_host=None, max_seqlen=len(batch.input_ids))
    )


def one_boundary(batch, *_):
    """As if only the last boundary were lost."""
    if len(batch.cu_seqlens) < 4:
        return packed_inputs(batch)
    return packed_inputs(
        replace(batch, cu_seqlens=batch.cu_seqlens[[0, 1, 3]], cu_seqlens_host=None, max_seqlen=len(batch.input_ids))
    )


@pytest.mark.parametrize(("inputs", "sequence"), [(no_boundaries, 1), (one_boundary, 2)])
def test_catches_lost_boundaries(inputs, sequence, monkeypatch) -> None:
    monkeypatch.setattr("delib_fast.models.lm.packed_inputs", inputs)
    message = f"changing token 3 of sequence {sequence} changes the loss of the sequences after it"
    with pytest.raises(LeakError, match=message):
        check_isolation(TrainableLM(build("llama")), "cpu")


def test_catches_looking_ahead(monkeypatch) -> None:
    def both_ways(q, k, v, cu_seqlens, max_seqlen, **_):
        lengths = cu_seqlens.diff().tolist()
        sequences = zip(*(x.transpose(0, 1)[None].split(lengths, 2) for x in (q, k, v)), strict=True)
        return torch.cat(
            [
                torch.nn.functional.scaled_dot_product_attention(*qkv, enable_gqa=True)[0].transpose(0, 1)
                for qkv in sequences
            ]
        )

    trainable = TrainableLM(build("llama"))
    monkeypatch.setattr("delib_fast.models.attention.varlen_attention", both_ways)
    with pytest.raises(LeakError, match="changes the loss of the earlier tokens of its own sequence"):
        check_isolation(trainable, "cpu")


def test_catches_a_leak_of_the_backward_pass_alone(monkeypatch) -> None:
    """As from a kernel that is wrong only there."""

    class Spread(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient + gradient.roll(-1, 0)

    right = attention.varlen_attention
    monkeypatch.setattr(
        attention, "varlen_attention", lambda q, k, v, *args, **more: right(q, Spread.apply(k), v, *args, **more)
    )
    trainable = TrainableLM(build("llama"))
    with pytest.raises(
        LeakError, match=r"leak in the backward pass: the loss of sequence 2 has a gradient of .* at other"
    ):
        check_isolation(trainable, "cpu")
    assert all(parameter.grad is None for parameter in trainable.parameters())


def test_catches_positions_that_do_not_restart(monkeypatch) -> None:
    """No sequence attends to another, but a packed document gets the learned embeddings of later positions."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "gpt2",
            vocab_size=96,
            n_embd=32,
            n_layer=2,
            n_head=4,
            attn_pdrop=0.0,
            initializer_range=0.2,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    trainable = TrainableLM(model)  # in train mode, with dropout between its layers
    check_isolation(trainable, "cpu")

    def not_restarting(batch, backend, _):
        return packed_inputs(replace(batch, position_ids=torch.arange(len(batch.input_ids))), backend)

    monkeypatch.setattr("delib_fast.models.lm.packed_inputs", not_restarting)
    with pytest.raises(
        LeakError, match=r"sequence 2 of a pack has a different loss than alone .* does not respect .*position_ids"
    ):
        check_isolation(trainable, "cpu")


def test_rejects_a_model_in_which_leaks_cannot_be_seen() -> None:
    blind = build("llama")
    for layer in blind.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    with pytest.raises(LeakError, match="changing token 3 of sequence 1 changes no later loss"):
        check_isolation(TrainableLM(blind), "cpu")
    trainable = TrainableLM(build("llama"))
    trainable.model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(LeakError, match="not finite"):
        check_isolation(trainable, "cpu")


@pytest.mark.parametrize("name", ["qwen2 tied", "llama", "qwen3 moe"])
def test_shared_prompts_are_checked(name, monkeypatch) -> None:
    trainable = TrainableLM(build(name))
    check_isolation(trainable, "cpu", shares_prompts=True)
    monkeypatch.setattr(
        "delib_fast.models.lm.packed_inputs",
        lambda *args, **more: packed_inputs(*args, **more) | {"varlen_prefix": None},
    )
    check_isolation(trainable, "cpu")
    with pytest.raises(LeakError, match=r"replies that share a prompt have a different loss .* share_prompts: never"):
        check_isolation(trainable, "cpu", shares_prompts=True)
