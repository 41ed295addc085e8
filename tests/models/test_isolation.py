"""The probe before training: passes what keeps runs apart, and catches every way of leaking that we know."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_models import build
from transformers import AutoConfig, AutoModelForCausalLM

from delib_fast.models import LeakError, TrainableLM, check_isolation
from delib_fast.models.attention import packed_inputs


@pytest.mark.parametrize("name", ["qwen2 tied", "qwen3 sliding", "llama", "qwen3 moe", "gemma3 text"])
def test_passes(name) -> None:
    check_isolation(TrainableLM(build(name)), "cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_passes_in_other_dtypes(dtype) -> None:
    check_isolation(TrainableLM(build("qwen3 sliding")).to(dtype), "cpu")


def test_passes_at_the_usual_initialisation() -> None:
    """Weights of std 0.02, where a token hardly moves the next one's loss."""
    config = AutoConfig.for_model(
        "llama", vocab_size=512, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    check_isolation(TrainableLM(AutoModelForCausalLM.from_config(config)).bfloat16(), "cpu")


def test_leaves_the_model_as_it_was() -> None:
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
def test_catches_stock_attention(attention, how, monkeypatch) -> None:
    """The two ways in which transformers' own attention leaks with positions that restart."""
    trainable = TrainableLM(build("qwen3"))
    trainable.model.set_attn_implementation(attention)
    if how == "cache":
        cached = {"use_cache": True, "attention_mask": None}
        monkeypatch.setattr(
            "delib_fast.models.lm.packed_inputs", lambda batch, backend, _: packed_inputs(batch, backend) | cached
        )
    with pytest.raises(LeakError, match=r"changing token 3 of run 1 changes the loss of the runs behind it"):
        check_isolation(trainable, "cpu")


def one_run(batch, *_):
    """As if cu_seqlens were lost on the way."""
    return packed_inputs(
        replace(batch, cu_seqlens=batch.cu_seqlens[[0, -1]], cu_seqlens_host=None, max_seqlen=len(batch.input_ids))
    )


def two_runs(batch, *_):
    """Only the last border is lost."""
    if len(batch.cu_seqlens) < 4:
        return packed_inputs(batch)
    return packed_inputs(
        replace(batch, cu_seqlens=batch.cu_seqlens[[0, 1, 3]], cu_seqlens_host=None, max_seqlen=len(batch.input_ids))
    )


@pytest.mark.parametrize(("lost", "run"), [(one_run, 1), (two_runs, 2)])
def test_catches_lost_borders(lost, run, monkeypatch) -> None:
    monkeypatch.setattr("delib_fast.models.lm.packed_inputs", lost)
    with pytest.raises(LeakError, match=f"changing token 3 of run {run} changes the loss of the runs behind it"):
        check_isolation(TrainableLM(build("llama")), "cpu")


def test_catches_looking_ahead(monkeypatch) -> None:
    def both_ways(q, k, v, cu_seqlens, max_seqlen, **_):
        lengths = cu_seqlens.diff().tolist()
        runs = zip(*(x.transpose(0, 1)[None].split(lengths, 2) for x in (q, k, v)), strict=True)
        return torch.cat(
            [torch.nn.functional.scaled_dot_product_attention(*run, enable_gqa=True)[0].transpose(0, 1) for run in runs]
        )

    monkeypatch.setattr("delib_fast.models.attention.varlen_attention", both_ways)
    with pytest.raises(LeakError, match="changes the loss of the tokens before it in its own run"):
        check_isolation(TrainableLM(build("llama")), "cpu")


def test_catches_positions_that_do_not_restart(monkeypatch) -> None:
    """No run sees another, but learned positions make a packed document another document."""
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

    def counting_on(batch, backend, _):
        return packed_inputs(replace(batch, position_ids=torch.arange(len(batch.input_ids))), backend)

    monkeypatch.setattr("delib_fast.models.lm.packed_inputs", counting_on)
    with pytest.raises(LeakError, match=r"run 2 of a pack has another loss than alone .* does not heed .*position_ids"):
        check_isolation(trainable, "cpu")


def test_refuses_to_judge_what_it_can_not_see() -> None:
    blind = build("llama")
    for layer in blind.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    with pytest.raises(LeakError, match="changing token 3 of run 1 changes no loss behind it"):
        check_isolation(TrainableLM(blind), "cpu")
    trainable = TrainableLM(build("llama"))
    trainable.model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(LeakError, match="not finite"):
        check_isolation(trainable, "cpu")


@pytest.mark.parametrize("name", ["qwen2 tied", "llama", "qwen3 moe"])
def test_shared_prompts_are_tried(name, monkeypatch) -> None:
    trainable = TrainableLM(build(name))
    check_isolation(trainable, "cpu", shares_prompts=True)
    monkeypatch.setattr(
        "delib_fast.models.lm.packed_inputs",
        lambda *args, **more: packed_inputs(*args, **more) | {"varlen_prefix": None},
    )
    check_isolation(trainable, "cpu")
    with pytest.raises(LeakError, match=r"replies that share a prompt have another loss .* share_prompts: never"):
        check_isolation(trainable, "cpu", shares_prompts=True)
